"""``safetensors.numpy`` over weightlift: loading is weightlift's, saving and bytes in memory are the library's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightlift.compat.safetensors.handle import safe_open
from weightlift.compat.safetensors.refusals import reference

if TYPE_CHECKING:
    import os


def load_file(filename: str | os.PathLike[str], *, backend: str = "mmap") -> dict[str, Any]:
    """Every array of a file by name.

    Args:
        filename: the file.
        backend: see :class:`~weightlift.compat.safetensors.handle.safe_open`.

    Raises:
        SafetensorError: the file breaks a rule of the format.
        OSError: it is not there, or cannot be read.
    """
    with safe_open(filename, framework="np", backend=backend) as file:
        return file.get_tensors()


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(reference("numpy"), name)
