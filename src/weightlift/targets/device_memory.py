"""Memory of a device, allocated by the framework so that its accounting stays true, and tensors over it.

Every operation of torch releases the interpreter lock, and beside a busy Python thread getting it back takes a switch
interval of 5 ms: longer than moving 200 MB. So tensors are made through torch's C interface (``aoti_torch_*``, the
stable one that compiled models are linked against), called with the lock held; where that is missing, or memory is
short, torch's ordinary functions are used, whose out-of-memory error reaches the caller untouched.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from weightlift.targets.storages import OwnStorages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SPARE_BYTES: Final = 512 << 20
"""Free device memory under which allocations go the ordinary way, whose errors are the framework's own."""

MANY: Final = 32
"""Tensors of each shape from which on making all in one call is worth releasing the interpreter lock for."""

_EXPECTED_BYTES_MIN: Final = 64 << 20
_ROUNDING_BYTES: Final = 1 << 20

_HELD_AND_USED: Final = ("reserved_bytes", "allocated_bytes")
_DEVICE_TYPES: Final = {"cpu": 0, "cuda": 1}


class Views(Protocol):
    """Makes tensors over one slab, each with a storage of its own where that can be had."""

    def tensor(self, offset: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        """A contiguous tensor over the slab's bytes from ``offset`` on, which is a multiple of the type's size."""
        ...

    def tensors(self, offset: int, dtype: Any, shapes: Sequence[tuple[int, ...]]) -> Sequence[Any]:
        """Contiguous tensors over the slab's bytes, one right behind the other.

        Args:
            offset: where the first begins, a multiple of the type's size.
            dtype: the framework's data type of all of them.
            shapes: the shape of each, of one element or more.
        """
        ...


class DeviceMemory(Protocol):
    """One device's memory, as one framework hands it out."""

    def expect(self, nbytes: int) -> None:
        """Prepare for allocations that take so many bytes together, if that is quicker than making them one by one."""
        ...

    def allocate(self, dtype: Any, shape: tuple[int, ...]) -> Any:
        """An uninitialised tensor with storage of its own, allocated in the order of the caller's current stream."""
        ...

    def address(self, tensor: Any) -> int:
        """The device address of a tensor's first byte."""
        ...

    def views(self, slab: Any) -> Views:
        """A maker of tensors over a slab (one-dimensional, of bytes), which they keep alive."""
        ...

    def current_stream(self) -> int:
        """The handle of the stream on which the calling thread enqueues its work on this device."""
        ...

    def reusable_bytes(self) -> int:
        """What the framework holds of this device's memory without using it."""
        ...


class TorchMemory:
    """Device memory from torch's caching allocator.

    Args:
        torch: the module.
        kind: torch's name of the kind of device: ``cuda`` (also for ROCm).
        ordinal: the device's number.
        free_bytes: memory free on the device now.
    """

    def __init__(self, torch: Any, kind: str, ordinal: int, free_bytes: int) -> None:
        self._torch = torch
        self._device = torch.device(kind, ordinal)
        self._ordinal = ordinal
        self._quick = quick_tensors(torch)
        self._storages = OwnStorages(torch)
        self._kind = _DEVICE_TYPES.get(kind, -1)
        self._room = free_bytes - _SPARE_BYTES if self._kind >= 0 else -1
        self._counted_cache = self._kind < 0

    def _count_cache(self) -> None:
        """Count what the allocator holds without using it as free, once that matters; asking it takes a while."""
        self._counted_cache = True
        self._room += self.reusable_bytes()

    def reusable_bytes(self) -> int:
        """See :class:`DeviceMemory`."""
        if self._device.type != "cuda":
            return 0
        counts = self._torch.cuda.memory_stats_as_nested_dict(self._device)
        held, used = (counts.get(name, {}).get("all", {}).get("current", 0) for name in _HELD_AND_USED)
        return int(held - used)

    def expect(self, nbytes: int) -> None:
        """See :class:`DeviceMemory`.

        One large piece is allocated and given back to the allocator at once, which then cuts the tensors out of it:
        one call to the driver instead of one per tensor, and nothing lost to rounding. Transformers warms the allocator
        up in the same way. Not where the allocator still holds as much from before, which would go to waste.
        """
        if self._quick is None or nbytes < _EXPECTED_BYTES_MIN or self._room <= nbytes:
            return
        if self.reusable_bytes() < nbytes:
            self._quick.empty(self._torch.uint8, (nbytes + _ROUNDING_BYTES,), self._kind, self._ordinal)

    def allocate(self, dtype: Any, shape: tuple[int, ...]) -> Any:
        """See :class:`DeviceMemory`.

        Raises:
            torch.OutOfMemoryError: the device has no room; torch's own error.
        """
        self._room -= math.prod(shape) * dtype.itemsize
        if self._room <= 0 and not self._counted_cache:
            self._count_cache()
        if self._quick is not None and self._room > 0:
            return self._quick.empty(dtype, shape, self._kind, self._ordinal)
        return self._torch.empty(shape, dtype=dtype, device=self._device)

    def address(self, tensor: Any) -> int:
        """See :class:`DeviceMemory`."""
        return int(tensor.data_ptr())

    def views(self, slab: Any) -> Views:
        """See :class:`DeviceMemory`."""
        return (
            _PlainViews(slab, self._storages) if self._quick is None else QuickViews(self._quick, slab, self._storages)
        )

    def current_stream(self) -> int:
        """See :class:`DeviceMemory`."""
        return int(self._torch.cuda.current_stream(self._device).cuda_stream)


def _one_by_one(views: Views, offset: int, dtype: Any, shapes: Sequence[tuple[int, ...]]) -> Sequence[Any]:
    starts = itertools.accumulate((math.prod(shape) * dtype.itemsize for shape in shapes), initial=offset)
    return [views.tensor(start, dtype, shape) for start, shape in zip(starts, shapes, strict=False)]


class _PlainViews:
    """:class:`Views` by torch's ordinary operations.

    Args:
        slab: the tensor that parts are made of.
        storages: gives them storages of their own.
    """

    def __init__(self, slab: Any, storages: OwnStorages) -> None:
        self._slab = slab
        self._storages = storages

    def tensor(self, offset: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        """See :class:`Views`."""
        nbytes = math.prod(shape) * dtype.itemsize
        return self._storages.of(self._slab[offset : offset + nbytes].view(dtype).view(shape), dtype)

    def tensors(self, offset: int, dtype: Any, shapes: Sequence[tuple[int, ...]]) -> Sequence[Any]:
        """See :class:`Views`."""
        return _one_by_one(self, offset, dtype, shapes)


class QuickTensors:
    """Torch tensors made without releasing the interpreter lock.

    Args:
        torch: the module.

    Raises:
        AttributeError: this version of torch lacks a function.
        OSError: its library cannot be found.
    """

    def __init__(self, torch: Any) -> None:
        library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self._torch = torch
        self._library = library
        self._types: dict[Any, int] = {}
        exchange = torch._C._aoti  # noqa: SLF001 - the only way between handles and Python's tensors
        self._to_handle: Callable[[Any], Any] = exchange.unsafe_alloc_void_ptr_from_tensor
        self._to_tensor: Callable[[Any], Any] = exchange.alloc_tensor_by_stealing_from_void_ptr
        self._divide: Callable[[Any, list[Any]], Sequence[Any]] = torch._C._nn.unflatten_dense_tensors  # noqa: SLF001
        self._divides: bool | None = None
        self._empty, self._reinterpret = library.aoti_torch_empty_strided, library.aoti_torch__reinterpret_tensor
        self._delete, self._dtype_of = library.aoti_torch_delete_tensor_object, library.aoti_torch_get_dtype
        for name in ("aoti_torch_view_dtype", "aoti_torch_cpu_view_dtype"):
            if hasattr(library, name):
                self._view_dtype = getattr(library, name)
                break
        else:
            raise AttributeError("no aoti_torch_view_dtype")
        numbers, handle, out = ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
        kind = ctypes.c_int32
        self._empty.argtypes = (ctypes.c_int64, numbers, numbers, kind, kind, kind, out)
        self._reinterpret.argtypes = (handle, ctypes.c_int64, numbers, numbers, ctypes.c_int64, out)
        self._view_dtype.argtypes = (handle, kind, out)
        self._delete.argtypes = (handle,)
        self._dtype_of.argtypes = (handle, ctypes.POINTER(kind))
        python = ctypes.pythonapi
        self._pointer_of, self._capsule = python.PyCapsule_GetPointer, python.PyCapsule_New
        self._steals = True
        self._pointer_of.restype, self._pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        self._capsule.restype = ctypes.py_object
        self._capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        # Whatever its name says, the conversion keeps its handle alive in some versions: then it is ours to delete.
        sample = self._tensor(self._new(torch.uint8, (1,), _DEVICE_TYPES["cpu"], 0))
        self._steals = sample._use_count() == 1  # noqa: SLF001 - references to the tensor inside torch

    def empty(self, dtype: Any, shape: tuple[int, ...], device_type: int, ordinal: int) -> Any:
        """An uninitialised contiguous tensor."""
        return self._tensor(self._new(dtype, shape, device_type, ordinal))

    def _new(self, dtype: Any, shape: tuple[int, ...], device_type: int, ordinal: int) -> ctypes.c_void_p:
        count, sizes, strides = _geometry(shape)
        made = ctypes.c_void_p()
        self._check(self._empty(count, sizes, strides, self._code(dtype), device_type, ordinal, ctypes.byref(made)))
        return made

    def typed(self, slab: Any, dtype: Any) -> ctypes.c_void_p:
        """A handle of the slab seen as another data type; to be deleted."""
        base, typed = ctypes.c_void_p(self._handle(slab)), ctypes.c_void_p()
        try:
            self._check(self._view_dtype(base, self._code(dtype), ctypes.byref(typed)))
        finally:
            self._delete(base)
        return typed

    def part(self, typed: ctypes.c_void_p, first: int, shape: tuple[int, ...]) -> Any:
        """A contiguous tensor over elements of a handle from ``first`` on, sharing its storage."""
        count, sizes, strides = _geometry(shape)
        made = ctypes.c_void_p()
        self._check(self._reinterpret(typed, count, sizes, strides, first, ctypes.byref(made)))
        return self._tensor(made)

    @property
    def divides(self) -> bool:
        """Whether :meth:`divide` does what is expected of it on a sample, which is tried when somebody first asks.

        Trying releases the interpreter lock a dozen times, which few loads need.
        """
        if self._divides is None:
            try:
                self._divides = self._divides_a_sample()
            except (AttributeError, RuntimeError, TypeError):
                self._divides = False
        return self._divides

    def _divides_a_sample(self) -> bool:
        flat = self._torch.empty(6, dtype=self._torch.bfloat16)
        _, second = self.divide(flat, [(2,), (2, 2)])
        (elsewhere,) = self.divide(self._torch.empty(4, device="meta"), [(2, 2)])
        whole = second.data_ptr() == flat.data_ptr() + 4 and tuple(second.shape) == (2, 2)
        return whole and second._base is None and elsewhere.device.type == "meta"  # noqa: SLF001

    def divide(self, flat: Any, shapes: Sequence[tuple[int, ...]]) -> Sequence[Any]:
        """Contiguous tensors of some shapes over a flat one that they fill, made in one call, where it :attr:`divides`.

        That call releases the interpreter lock, once, and takes a third of the time of as many :meth:`part`.
        """
        template = self._torch.empty(())
        like = {shape: template.expand(shape) for shape in set(shapes)}
        # Without this the tensors would be views to the framework, each with a base that autograd keeps.
        with self._below_views():
            made: Sequence[Any] = self._divide(flat, [like[shape] for shape in shapes])
        return made

    def _below_views(self) -> Any:
        keys = self._torch._C.DispatchKeySet(self._torch._C.DispatchKey.ADInplaceOrView)  # noqa: SLF001
        return self._torch._C._ExcludeDispatchKeyGuard(keys)  # noqa: SLF001 - no public way

    def delete(self, handle: ctypes.c_void_p) -> None:
        """Give up a handle."""
        self._delete(handle)

    def _handle(self, tensor: Any) -> int:
        # The capsule holds a new reference that is ours to delete; nothing else frees it.
        return int(self._pointer_of(self._to_handle(tensor), None))

    def _tensor(self, handle: ctypes.c_void_p) -> Any:
        tensor = self._to_tensor(self._capsule(handle, None, None))
        if not self._steals:
            self._delete(handle)
        return tensor

    def _code(self, dtype: Any) -> int:
        code = self._types.get(dtype)
        if code is None:
            name = "aoti_torch_dtype_" + str(dtype).removeprefix("torch.")
            code = getattr(self._library, name)() if hasattr(self._library, name) else self._code_of_sample(dtype)
            self._types[dtype] = code
        return code

    def _code_of_sample(self, dtype: Any) -> int:
        handle, found = self._handle(self._torch.empty(0, dtype=dtype)), ctypes.c_int32()
        self._check(self._dtype_of(handle, ctypes.byref(found)))
        self._delete(handle)
        return found.value

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise RuntimeError("torch refused to make a tensor; its message is on the standard error stream")


class QuickViews:
    """:class:`Views` that keep the interpreter lock.

    Args:
        quick: the way.
        slab: the tensor that parts are made of.
        storages: gives them storages of their own.
    """

    def __init__(self, quick: QuickTensors, slab: Any, storages: OwnStorages) -> None:
        self._quick = quick
        self._slab = slab
        self._storages = storages
        self._typed: dict[Any, ctypes.c_void_p] = {}

    def tensor(self, offset: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        """See :class:`Views`."""
        return self._storages.of(self._part(offset, dtype, shape), dtype)

    def _part(self, offset: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = self._quick.typed(self._slab, dtype)
        return self._quick.part(typed, offset // dtype.itemsize, shape)

    def tensors(self, offset: int, dtype: Any, shapes: Sequence[tuple[int, ...]]) -> Sequence[Any]:
        """See :class:`Views`."""
        if len(shapes) < MANY * len(set(shapes)) or not self._quick.divides:
            return _one_by_one(self, offset, dtype, shapes)
        flat = self._part(offset, dtype, (sum(map(math.prod, shapes)),))
        return self._storages.of_all(self._quick.divide(flat, shapes), dtype)

    def __del__(self) -> None:
        for handle in self._typed.values():
            self._quick.delete(handle)


@functools.lru_cache(maxsize=1024)
def _geometry(shape: tuple[int, ...]) -> tuple[int, Any, Any]:
    """Dimensions, sizes and contiguous strides (in elements) as C arrays."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(1, shape[axis + 1])
    array = ctypes.c_int64 * max(1, len(shape))
    return len(shape), array(*shape), array(*strides)


_found: dict[str, QuickTensors | None] = {}


def quick_tensors(torch: Any) -> QuickTensors | None:
    """The quick way, if this version of torch has it and it does what is expected of it on a sample."""
    if torch.__version__ not in _found:
        _found[torch.__version__] = _tried(torch)
    return _found[torch.__version__]


def _tried(torch: Any) -> QuickTensors | None:
    try:
        quick = QuickTensors(torch)
        slab = quick.empty(torch.uint8, (64,), _DEVICE_TYPES["cpu"], 0)
        typed = quick.typed(slab, torch.bfloat16)
        part = quick.part(typed, 8, (2, 3))
        quick.delete(typed)
    except (AttributeError, OSError, RuntimeError, TypeError):
        return None
    fits = part.dtype == torch.bfloat16 and tuple(part.shape) == (2, 3) and part.is_contiguous()
    same = part.data_ptr() == slab.data_ptr() + 16 and part.untyped_storage().data_ptr() == slab.data_ptr()
    return quick if fits and same else None
