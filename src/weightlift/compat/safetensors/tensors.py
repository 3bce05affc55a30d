"""What differs between torch and numpy where tensors are made for the safetensors face, refusals included."""

from __future__ import annotations

import functools
import importlib
import math
from typing import TYPE_CHECKING, Any, Protocol

from weightlift.compat.safetensors.refusals import SafetensorError
from weightlift.targets.access import gpu_access
from weightlift.targets.frameworks import pick_framework
from weightlift.types import Framework

if TYPE_CHECKING:
    from weightlift.compat.safetensors.arguments import Device
    from weightlift.compat.safetensors.ranges import Piece, View
    from weightlift.dtypes import DType


class Tensors(Protocol):
    """Makes one framework's tensors, and refuses what the library refuses for it."""

    def check(self, dtype: DType, shape: tuple[int, ...]) -> None:
        """Raise if the framework has no such tensors."""
        ...

    def check_part(self, dtype: DType, shape: tuple[int, ...], view: View) -> None:
        """Raise if a part of such a tensor cannot be had by the library's own rules."""
        ...

    def meta(self, dtype: DType, shape: tuple[int, ...], nbytes: int) -> Any:
        """A tensor of this type and shape without contents."""
        ...

    def over(self, buffer: Any, dtype: DType, shape: tuple[int, ...]) -> Any:
        """A tensor over a buffer."""
        ...

    def strided(self, tensor: Any, view: View) -> Any:
        """A view of a contiguous tensor."""
        ...


@functools.cache
def maker(framework: Framework) -> Tensors:
    """What makes a framework's tensors.

    Raises:
        MissingExtraError: the framework is not installed.
    """
    return _Torch() if framework is Framework.TORCH else _Numpy()


class _Torch:
    def __init__(self) -> None:
        self._maker = pick_framework(Framework.TORCH)
        self._torch = importlib.import_module("torch")

    def check(self, dtype: DType, shape: tuple[int, ...]) -> None:
        """See :class:`Tensors`."""
        if dtype.block_elements == 1:
            return
        if dtype.torch is None:
            raise SafetensorError(f"torch has no data type for {dtype.name}: weightlift.load hands its bytes out")
        if not shape or shape[-1] % dtype.packed:
            raise SafetensorError(
                f"{dtype.name} of shape {list(shape)} does not fill whole bytes along its last dimension"
            )

    def check_part(self, dtype: DType, shape: tuple[int, ...], view: View) -> None:
        """See :class:`Tensors`."""
        _check_whole_bytes(dtype, view)
        self.check(dtype, shape)
        if dtype.block_elements > 1:
            raise RuntimeError(f"torch cannot slice {dtype.name} of shape {list(shape)}: it counts whole bytes")

    def meta(self, dtype: DType, shape: tuple[int, ...], nbytes: int) -> Any:
        """See :class:`Tensors`."""
        kind = self._maker.stored_dtype(dtype)
        if dtype.block_elements == 1:
            return self._torch.empty(shape, dtype=kind, device="meta")
        return self._torch.empty(nbytes, dtype=kind, device="meta").reshape(shape)

    def over(self, buffer: Any, dtype: DType, shape: tuple[int, ...]) -> Any:
        """See :class:`Tensors`."""
        return self._maker.over(buffer, 0, dtype, shape)

    def strided(self, tensor: Any, view: View) -> Any:
        """See :class:`Tensors`."""
        return tensor.as_strided(view.shape, view.strides, tensor.storage_offset() + view.offset)


class _Numpy:
    def __init__(self) -> None:
        self._maker = pick_framework(Framework.NUMPY)
        self._numpy = importlib.import_module("numpy")

    def check(self, dtype: DType, shape: tuple[int, ...]) -> None:  # noqa: ARG002 - see Tensors
        """See :class:`Tensors`."""
        self._type(dtype)

    def _type(self, dtype: DType) -> Any:
        if dtype.name == "BF16":
            # Known to numpy once ml_dtypes has been imported by somebody; until then this is a TypeError.
            return self._numpy.dtype("bfloat16")
        if dtype.torch is None:
            raise SafetensorError(f"numpy has no data type for {dtype.name}: weightlift.load hands its bytes out")
        return self._numpy.dtype(getattr(self._numpy, dtype.torch))

    def check_part(self, dtype: DType, shape: tuple[int, ...], view: View) -> None:
        """See :class:`Tensors`."""
        _check_whole_bytes(dtype, view)
        self.check(dtype, shape)

    def meta(self, dtype: DType, shape: tuple[int, ...], nbytes: int) -> Any:
        """See :class:`Tensors`; numpy has nothing like it."""
        raise NotImplementedError

    def over(self, buffer: Any, dtype: DType, shape: tuple[int, ...]) -> Any:
        """See :class:`Tensors`."""
        return self._numpy.ndarray(shape, self._type(dtype), buffer)

    def strided(self, tensor: Any, view: View) -> Any:
        """See :class:`Tensors`."""
        item = tensor.itemsize
        steps = tuple(stride * item for stride in view.strides)
        flat = tensor.reshape(-1)
        return self._numpy.ndarray(view.shape, tensor.dtype, flat, view.offset * item, steps)


def _check_whole_bytes(dtype: DType, view: View) -> None:
    if dtype.block_elements == 1:
        return
    ends = (view.offset, view.shape[-1] if view.shape else 1)
    if any(end % dtype.packed for end in ends):
        raise SafetensorError(f"the slice cuts through bytes that hold {dtype.packed} elements of {dtype.name}")


def resolve_device(device: Device) -> str:
    """The framework's name of a device.

    Raises:
        RuntimeError: torch has no such device; other kinds come from torch itself.
    """
    if device.name.startswith("cuda:"):
        gpu_access(device.name, pick_framework(Framework.TORCH))
    if device.name == "cpu" or device.name.startswith("cuda:"):
        return device.name
    torch = importlib.import_module("torch")
    wanted = device.name if device.number is None else device.number
    return str(torch.empty(0, device=wanted).device)


@functools.cache
def _numpy() -> Any:
    try:
        return importlib.import_module("numpy")
    except ImportError:
        return None


def buffer(nbytes: int) -> Any:
    """Fresh memory of the caller's, not cleared where that can be avoided."""
    numpy = _numpy()
    return bytearray(nbytes) if numpy is None else numpy.empty(nbytes, "u1")


def pick(scratch: memoryview, piece: Piece, item_bytes: int, target: memoryview) -> None:
    """Copy what a piece wants out of what was read for it.

    Args:
        scratch: what was read.
        piece: what is wanted of it.
        item_bytes: bytes of one element.
        target: where the view's elements are brought together.
    """
    numpy = _numpy()
    if numpy is None:
        _pick_slowly(scratch, piece, item_bytes, target)
        return
    kind = f"V{item_bytes}"
    source = numpy.ndarray(piece.shape, kind, scratch, 0, piece.strides)
    numpy.ndarray(piece.shape, kind, target, piece.place)[...] = source


def _pick_slowly(scratch: memoryview, piece: Piece, item_bytes: int, target: memoryview) -> None:
    """The same with torch, for the rare installation that has no numpy."""
    torch = importlib.import_module("torch")
    source = torch.frombuffer(scratch, dtype=torch.uint8)
    taken = source.as_strided((*piece.shape, item_bytes), (*piece.strides, 1))
    count = math.prod(piece.shape) * item_bytes
    torch.frombuffer(target, dtype=torch.uint8, count=count, offset=piece.place).view(taken.shape).copy_(taken)
