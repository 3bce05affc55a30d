"""The bytes of what a loader returned: having them read, and comparing parts of them with the files.

Takes tensors of numpy and torch, on whatever device, and needs no more of either than is installed. Imports the
standard library alone, as the worker has to.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_TOUCH_BYTES: Final = 4096
_READ_ONLY: Final = 0x100
"""``PyBUF_READ`` of Python's C interface."""

Used = TypeVar("Used")


def flat_bytes(tensor: Any) -> Any:
    """A tensor's bytes as a flat array of its own framework, without a copy where it is contiguous."""
    if hasattr(tensor, "data_ptr"):
        import torch

        return tensor.detach().reshape(-1).view(torch.uint8)
    import numpy

    return tensor.reshape(-1).view(numpy.uint8)


def with_bytes(flat: Any, use: Callable[[memoryview], Used]) -> Used:
    """Call a function with the bytes of a flat array, which are in host memory until it returns.

    Args:
        flat: what :func:`flat_bytes` gives, or a part of it.
        use: what is done with them.
    """
    if not hasattr(flat, "data_ptr"):
        return use(memoryview(flat))
    # Not by numpy, which need not be installed where torch is.
    held = flat.cpu().contiguous()
    return use(_view(held.data_ptr(), held.numel()))


def _view(address: int, nbytes: int) -> memoryview:
    if not nbytes:
        return memoryview(b"")
    function = ctypes.pythonapi.PyMemoryView_FromMemory
    function.restype, function.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
    made: memoryview = function(address, nbytes, _READ_ONLY)
    return made


def size_of(tensor: Any) -> int:
    """Bytes of a tensor's elements."""
    return int(tensor.numel() * tensor.element_size() if hasattr(tensor, "data_ptr") else tensor.nbytes)


def touch_tensors(tensors: Mapping[str, Any]) -> int:
    """Read one byte of every page of tensors, which is what a mapping has put off; returns how many."""
    return sum(with_bytes(flat_bytes(tensor), _touch) for tensor in tensors.values())


def touch_mappings(files: Iterable[str]) -> int:
    """The same of all that this process has mapped of some files.

    That costs the same however many tensors there are.

    Raises:
        RuntimeError: nothing of a file is mapped.
    """
    return sum(_touch_mapped(os.path.realpath(file)) for file in files)


def _touch_mapped(file: str) -> int:
    touched = sum(map(_touch, _mapped(file)))
    if not touched:
        raise RuntimeError(f"nothing of {file} is mapped")
    return touched


def _mapped(file: str) -> Iterator[memoryview]:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            if line.endswith(f" {file}\n"):
                begin, end = (int(number, 16) for number in line.split()[0].split("-"))
                yield _view(begin, end - begin)


def _touch(view: memoryview) -> int:
    return len(view[::_TOUCH_BYTES].tobytes())


def compare_parts(tensors: Mapping[str, Any], samples: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Compare parts of tensors with what a plain read of the files gives.

    Args:
        tensors: what was loaded.
        samples: of each part the tensor's name, its file, its offset there, and the part's start and length in bytes.

    Returns:
        How many parts were compared, how many tensors there are, and their bytes; ``wrong`` names the first that
        differs.
    """
    found: dict[str, Any] = {"tensors": len(tensors), "bytes": sum(map(size_of, tensors.values())), "wrong": None}
    for name, file, offset, start, length in samples:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(offset + start)
            wanted = b""
            while len(wanted) < length and (more := stream.read(length - len(wanted))):
                wanted += more
        if name not in tensors or part_of(tensors[name], start, length) != wanted:
            return found | {"wrong": name}
    return found | {"compared": len(samples)}


def part_of(tensor: Any, start: int, length: int) -> bytes:
    """Some of a tensor's bytes, from whatever device it is on.

    Args:
        tensor: of torch or numpy.
        start: the first byte.
        length: how many.
    """
    return with_bytes(flat_bytes(tensor)[start : start + length], bytes)
