"""Making tensors of a framework over memory that weightlift filled: torch or numpy, imported only when asked for.

Packed types a framework lacks arrive as ``uint8`` with the logical shape kept where one byte holds whole elements along
the last dimension, else flat; the table is in :mod:`weightlift.dtypes`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
from typing import TYPE_CHECKING, Any, Protocol

from weightlift.errors import MissingExtraError, OptionError, UnsupportedDtypeError, UnsupportedError, printable
from weightlift.types import Framework

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.dtypes import DType

FLOATING = frozenset(("F16", "BF16", "F32", "F64", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"))
"""Types that ``dtype=`` converts; integers, booleans and packed types stay as they are stored."""


class TensorMaker(Protocol):
    """Makes one framework's tensors."""

    name: str

    def over(self, buffer: Any, offset: int, dtype: DType, shape: tuple[int, ...]) -> Any:
        """A tensor over memory, alive for as long as the tensor is.

        Args:
            buffer: an object with the buffer protocol.
            offset: where the tensor's bytes begin in it.
            dtype: the stored data type.
            shape: the logical shape.
        """
        ...

    def empty(self, dtype: Any, shape: tuple[int, ...], device: str) -> Any:
        """An uninitialised tensor of a framework data type."""
        ...

    def strided(self, flat: Any, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """A view of a one-dimensional tensor, from element ``first`` on, with strides in elements."""
        ...

    def check_device(self, device: str) -> None:
        """Raise :class:`UnsupportedError` if the framework cannot use a device."""
        ...

    def resolve_dtype(self, dtype: Any) -> Any:
        """The framework's data type for an object or a name such as ``"float32"``."""
        ...

    def stored_dtype(self, dtype: DType) -> Any:
        """The framework's data type for a stored one."""
        ...

    def assign(self, flat: Any, first: int, buffer: Any, dtype: DType, elements: int) -> None:
        """Convert ``elements`` stored elements in ``buffer`` into ``flat[first : first + elements]``."""
        ...


def pick_framework(requested: Framework) -> TensorMaker:
    """The maker for a framework; ``auto`` takes torch where it is installed, else numpy.

    Raises:
        MissingExtraError: the framework is not installed.
    """
    wanted = [requested] if requested is not Framework.AUTO else [Framework.TORCH, Framework.NUMPY]
    for framework in wanted:
        try:
            return _maker(framework)
        except ImportError:
            continue
    named = " nor ".join(framework.value for framework in wanted)
    extra = wanted[0].value
    raise MissingExtraError(
        f"{'neither ' if len(wanted) > 1 else ''}{named} is{'' if len(wanted) > 1 else ' not'} installed",
        hint=f"pip install 'weightlift[{extra}]', or use device=\"null\" to read without keeping anything",
    )


@functools.cache
def _maker(framework: Framework) -> TensorMaker:
    return TorchMaker() if framework is Framework.TORCH else NumpyMaker()


def stored_shape(dtype: DType, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the framework's tensor: the logical one, but in bytes along the last dimension for packed types.

    Where rows of a packed type do not fill whole bytes, the tensor is flat.
    """
    if dtype.block_elements == 1:
        return shape
    last = dtype.storage_bytes(shape[-1]) if shape else None
    if last is not None:
        return (*shape[:-1], last)
    flat = dtype.storage_bytes(math.prod(shape))
    assert flat is not None
    return (flat,)


class TorchMaker:
    """Makes torch tensors."""

    name = "torch"

    def __init__(self) -> None:
        self._torch = importlib.import_module("torch")
        self._types: dict[str, Any] = {}
        self._view = _numpy_views(self._torch)

    def stored_dtype(self, dtype: DType) -> Any:
        """See :class:`TensorMaker`."""
        known = self._types.get(dtype.name)
        if known is not None:
            return known
        name = dtype.torch or ("uint8" if dtype.block_elements > 1 else None)
        found = getattr(self._torch, name, None) if name else None
        if found is None:
            raise UnsupportedDtypeError(
                f"torch {self._torch.__version__} has no data type for {dtype.name}",
                hint='update torch, or use framework="numpy"',
            )
        self._types[dtype.name] = found
        return found

    def over(self, buffer: Any, offset: int, dtype: DType, shape: tuple[int, ...]) -> Any:
        """See :class:`TensorMaker`."""
        kind = self.stored_dtype(dtype)
        shape = stored_shape(dtype, shape)
        count = math.prod(shape)
        if count == 0:
            return self._torch.empty(shape, dtype=kind)
        viewed = self._view(buffer, offset, dtype, shape) if self._view else None
        if viewed is not None:
            return viewed
        return self._torch.frombuffer(buffer, dtype=kind, count=count, offset=offset).view(shape)

    def empty(self, dtype: Any, shape: tuple[int, ...], device: str) -> Any:
        """See :class:`TensorMaker`."""
        return self._torch.empty(shape, dtype=dtype, device=device)

    def strided(self, flat: Any, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """See :class:`TensorMaker`."""
        return flat.as_strided(shape, strides, flat.storage_offset() + first)

    def check_device(self, device: str) -> None:
        """See :class:`TensorMaker`."""
        if device == "cpu":
            return
        try:
            self._torch.empty(0, device=device)
        except (AssertionError, RuntimeError, NotImplementedError) as err:
            raise UnsupportedError(
                f"torch {self._torch.__version__} cannot use device {printable(device)}: {printable(str(err))}",
                hint='use device="cpu", or install a torch build for this machine\'s devices',
            ) from err

    def resolve_dtype(self, dtype: Any) -> Any:
        """See :class:`TensorMaker`."""
        found = getattr(self._torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if not isinstance(found, self._torch.dtype):
            raise OptionError(
                f"dtype={printable(str(dtype))!r} is not a torch data type",
                hint='for example torch.float16 or "float16"',
            )
        return found

    def assign(self, flat: Any, first: int, buffer: Any, dtype: DType, elements: int) -> None:
        """See :class:`TensorMaker`."""
        source = self._torch.frombuffer(buffer, dtype=self.stored_dtype(dtype), count=elements)
        flat[first : first + elements].copy_(source)


_DLPACK_TYPE_CODE_AT = 20
"""Where a ``DLManagedTensor`` holds its type code: behind data pointer, device (two ints) and number of dimensions."""

_DLPACK_FLOAT_CODES = {"BF16": 4, "F8_E4M3": 10, "F8_E4M3FNUZ": 11, "F8_E5M2": 12, "F8_E5M2FNUZ": 13, "F8_E8M0": 14}
"""``DLDataTypeCode`` of the types that numpy lacks (dlpack.h); torch versions that do not know one refuse it."""


def _numpy_views(torch: Any) -> Callable[[Any, int, DType, tuple[int, ...]], Any] | None:
    """A way to make torch tensors that does not release the interpreter lock, or ``None`` without numpy.

    Every operation of torch, ``view`` too, releases the lock, and getting it back from a busy thread takes a switch
    interval: seconds for a checkpoint of a few hundred tensors. ``from_numpy`` and ``from_dlpack`` do not. Types that
    numpy lacks travel as integers of their size and get their type in the DLPack capsule.
    """
    try:
        numpy = importlib.import_module("numpy")
    except ImportError:
        return None
    from_dlpack, from_numpy, ndarray = torch.utils.dlpack.from_dlpack, torch.from_numpy, numpy.ndarray
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)

    def through_dlpack(buffer: Any, offset: int, dtype: DType, shape: tuple[int, ...]) -> Any:
        code = _DLPACK_FLOAT_CODES[dtype.name]
        capsule = ndarray(shape, f"i{dtype.block_bytes}", buffer, offset).__dlpack__()
        ctypes.c_uint8.from_address(pointer_of(capsule, b"dltensor") + _DLPACK_TYPE_CODE_AT).value = code
        return from_dlpack(capsule)

    def through_numpy(buffer: Any, offset: int, dtype: DType, shape: tuple[int, ...]) -> Any:
        return from_numpy(ndarray(shape, dtype.numpy, buffer, offset))

    ways: dict[str, Callable[[Any, int, DType, tuple[int, ...]], Any] | None] = {}

    def first(buffer: Any, offset: int, dtype: DType, shape: tuple[int, ...]) -> Any:
        """The first tensor of a type shows whether that type can be made this way."""
        ways[dtype.name] = None
        if dtype.block_elements > 1 or dtype.torch is None or not hasattr(torch, dtype.torch):
            return None
        way = through_dlpack if dtype.name in _DLPACK_FLOAT_CODES else through_numpy
        try:
            made = way(buffer, offset, dtype, shape)
        except (RuntimeError, TypeError, ValueError, BufferError):
            return None
        if made.dtype != getattr(torch, dtype.torch):
            return None
        ways[dtype.name] = way
        return made

    def view(buffer: Any, offset: int, dtype: DType, shape: tuple[int, ...]) -> Any:
        way = ways.get(dtype.name, first)
        return way(buffer, offset, dtype, shape) if way else None

    return view


class NumpyMaker:
    """Makes numpy arrays; types numpy lacks come from ``ml_dtypes``."""

    name = "numpy"

    def __init__(self) -> None:
        self._numpy = importlib.import_module("numpy")
        self._types: dict[str, Any] = {}

    def stored_dtype(self, dtype: DType) -> Any:
        """See :class:`TensorMaker`."""
        known = self._types.get(dtype.name)
        if known is None:
            known = self._types[dtype.name] = self._find(dtype)
        return known

    def _find(self, dtype: DType) -> Any:
        if dtype.numpy is None:
            return self._numpy.dtype("uint8")
        if hasattr(self._numpy, dtype.numpy) or dtype.numpy == "bool":
            return self._numpy.dtype(dtype.numpy)
        return self._numpy.dtype(_ml_dtype(dtype.numpy))

    def over(self, buffer: Any, offset: int, dtype: DType, shape: tuple[int, ...]) -> Any:
        """See :class:`TensorMaker`."""
        shape = stored_shape(dtype, shape)
        return self._numpy.ndarray(shape, self.stored_dtype(dtype), buffer, offset)

    def empty(self, dtype: Any, shape: tuple[int, ...], device: str) -> Any:
        """See :class:`TensorMaker`."""
        assert device == "cpu"
        return self._numpy.empty(shape, dtype=dtype)

    def strided(self, flat: Any, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """See :class:`TensorMaker`."""
        steps = tuple(step * flat.itemsize for step in strides)
        return self._numpy.lib.stride_tricks.as_strided(flat[first:], shape, steps)

    def check_device(self, device: str) -> None:
        """See :class:`TensorMaker`."""
        assert device == "cpu"

    def resolve_dtype(self, dtype: Any) -> Any:
        """See :class:`TensorMaker`."""
        try:
            return self._numpy.dtype(dtype)
        except TypeError:
            pass
        try:
            return self._numpy.dtype(_ml_dtype(str(dtype)))
        except (AttributeError, TypeError) as err:
            raise OptionError(
                f"dtype={printable(str(dtype))!r} is not a numpy data type", hint='for example "float32" or "bfloat16"'
            ) from err

    def assign(self, flat: Any, first: int, buffer: Any, dtype: DType, elements: int) -> None:
        """See :class:`TensorMaker`."""
        source = self._numpy.frombuffer(buffer, dtype=self.stored_dtype(dtype), count=elements)
        flat[first : first + elements] = source.astype(flat.dtype)


def _ml_dtype(name: str) -> Any:
    try:
        return getattr(importlib.import_module("ml_dtypes"), name)
    except ImportError as err:
        raise MissingExtraError(
            f"numpy has no data type {name} of its own and ml_dtypes is not installed",
            hint="pip install 'weightlift[numpy]'",
        ) from err
