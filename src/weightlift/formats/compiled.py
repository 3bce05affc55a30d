"""Passing over JSON values with the compiled library, where it was built.

Owns the two functions of ``_values.c`` and nothing else. The library is the one that lies beside the native engine.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path


class Values:
    """The functions of ``_values.c``.

    Args:
        path: the library.

    Raises:
        OSError: it does not load.
        AttributeError: it is older than these functions.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        where = (ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32)
        self._value, self._unknown = library.wl_skip_value, library.wl_skip_unknown
        self._value.restype = self._unknown.restype = ctypes.c_uint64
        self._value.argtypes = (*where, ctypes.POINTER(ctypes.c_uint32))
        self._unknown.argtypes = where

    def skip_value(self, text: bytes, position: int, depth: int) -> tuple[int, int]:
        """Where a value ends that begins at ``position``; or where it is refused, and a number other than 0."""
        reason = ctypes.c_uint32()
        end = self._value(text, len(text), position, depth, ctypes.byref(reason))
        return end, reason.value

    def skip_unknown(self, text: bytes, position: int, depth: int) -> int:
        """Where the first member of a tensor begins that is known, is the last, or is refused."""
        return int(self._unknown(text, len(text), position, depth))


@functools.cache
def library() -> Values | None:
    """The compiled functions, or ``None`` where there are none."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    try:
        return Values(Path(__file__).parent.with_name("engines") / f"libweightlift_engine{suffix}")
    except (OSError, AttributeError):
        return None
