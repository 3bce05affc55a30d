"""What the face refuses, in the exception classes of the safetensors library, with weightlift's sentences.

Where that library is installed its own ``SafetensorError`` is raised, so that programs which catch it keep working.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from weightlift.errors import FormatError, MissingExtraError, NotACheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

_library_safe_open: Any = None

try:
    from safetensors import SafetensorError, safe_open

    _library_safe_open = safe_open
except ImportError:

    class SafetensorError(Exception):  # type: ignore[no-redef]
        """A file, or what was asked of it, breaks a rule of the format."""


__all__ = ["SafetensorError", "library_safe_open", "reference", "refusing", "wrong_type"]


def reference(submodule: str) -> Any:
    """A module of the safetensors library itself.

    Args:
        submodule: ``"torch"``, ``"numpy"``, or empty for the package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(f"safetensors.{submodule}" if submodule else "safetensors")
    except ImportError as err:
        raise MissingExtraError(
            "this call is passed on to the safetensors library, which is not installed",
            hint="pip install safetensors",
        ) from err


def library_safe_open() -> Any:
    """The library's own ``safe_open``, as it was before anything took its place.

    Raises:
        MissingExtraError: it is not installed.
    """
    return _library_safe_open or reference("").safe_open


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turn what weightlift says of a file into the exception that the library would raise for it."""
    try:
        yield
    except NotACheckpointError as err:
        # A folder or a device cannot be mapped, which the library reports as the operating system does.
        if err.path is not None and not err.hint.startswith("weights are read at many positions"):
            raise SafetensorError(str(err)) from err
        raise OSError(str(err)) from err
    except FormatError as err:
        raise SafetensorError(str(err)) from err


def wrong_type(argument: str, value: object, wanted: str) -> TypeError:
    """The error for an argument of a wrong type."""
    return TypeError(f"argument '{argument}': {type(value).__name__!r} object is not an instance of {wanted!r}")
