"""The arguments of ``safe_open``, judged as the safetensors library judges them."""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from weightlift.compat.safetensors.refusals import SafetensorError, wrong_type
from weightlift.errors import printable
from weightlift.types import Framework

_TORCH: Final = frozenset(("pt", "torch", "pytorch"))
_NUMPY: Final = frozenset(("np", "numpy"))
OTHER_FRAMEWORKS: Final = frozenset(("tf", "tensorflow", "jax", "flax", "mlx", "paddle"))
"""Frameworks whose tensors only the library itself makes."""

_NUMBERED: Final = frozenset(("cuda", "npu", "xpu", "xla", "mlu", "musa", "hpu"))
_BACKENDS: Final = ("mmap", "pread")
_INDEX_MAX: Final = (1 << 64) - 1


class Device(NamedTuple):
    """Where tensors go.

    Attributes:
        name: what messages call it, ``cpu`` and ``cuda:0`` for example.
        number: a bare number: whichever kind of accelerator the framework uses; ``None`` otherwise.
    """

    name: str
    number: int | None = None


CPU: Final = Device("cpu")


def parse_framework(framework: object) -> Framework | None:
    """Whose tensors are wanted; ``None`` for those of the frameworks that are left to the library.

    Raises:
        SafetensorError: no framework is called that.
        TypeError: it is not text.
    """
    if not isinstance(framework, str):
        raise wrong_type("framework", framework, "str")
    if framework in _TORCH:
        return Framework.TORCH
    if framework in _NUMPY:
        return Framework.NUMPY
    if framework in OTHER_FRAMEWORKS:
        return None
    raise SafetensorError(f"framework {printable(framework)} is invalid: use pt, np, tf, flax, mlx or paddle")


def parse_backend(backend: object) -> bool:
    """Whether slices follow the rules of the library's ``pread`` backend rather than those of torch.

    Raises:
        SafetensorError: there is no such backend.
        TypeError: it is not text.
    """
    if not isinstance(backend, str):
        raise wrong_type("backend", backend, "str")
    if backend not in _BACKENDS:
        raise SafetensorError(f'backend "{printable(backend)}" is invalid (expected one of: "mmap", "pread")')
    return backend == "pread"


def parse_path(filename: object) -> str:
    """The path as text.

    Raises:
        TypeError: it is not a path.
    """
    if isinstance(filename, bytes):
        raise wrong_type("filename", filename, "str")
    return os.fsdecode(os.fspath(filename))  # type: ignore[call-overload] # a TypeError says what it is


def parse_device(device: object) -> Device:
    """A device given by name or number; ``None`` is the CPU.

    Raises:
        SafetensorError: nothing is called that; objects other than text and numbers are not devices here either.
        ValueError: the number behind the name is none.
    """
    if device is None:
        return CPU
    if isinstance(device, int):
        if 0 <= device <= _INDEX_MAX:
            return Device(str(int(device)), int(device))
    elif isinstance(device, str):
        if device == "cpu":
            return CPU
        kind, colon, number = device.partition(":")
        if kind == "mps" and ":" not in number:
            if colon and _number(number):
                raise SafetensorError(f"device {printable(device)} is invalid: only mps or mps:0 is supported")
            return Device("mps")
        if kind in _NUMBERED and ":" not in number:
            return Device(f"{kind}:{_number(number) if colon else 0}")
    raise SafetensorError(
        f"device {printable(str(device) if isinstance(device, str | int) else repr(device))} is invalid: "
        'pass a name such as "cpu" or "cuda:0", or a number'
    )


def _number(text: str) -> int:
    if not text:
        raise ValueError("cannot parse integer from empty string")
    if not (text.isascii() and text.removeprefix("+").isdigit()):
        raise ValueError(f"invalid digit found in string: {printable(text)!r} is not a device's number")
    value = int(text)
    if value > _INDEX_MAX:
        raise ValueError(f"number too large to fit in target type: {printable(text)}")
    return value
