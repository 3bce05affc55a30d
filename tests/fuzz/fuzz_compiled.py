"""The functions of ``_values.c`` on any bytes, in memory behind whose end nothing may be read."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING, Any

from weightlift.engines.native import library_path
from weightlift.errors import HeaderError
from weightlift.formats import compiled
from weightlift.formats.header_text import HeaderText

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.errors import WeightliftError


class _Guarded:
    """Memory behind whose last byte nothing may be read."""

    def __init__(self) -> None:
        self.pages = mmap.mmap(-1, 64 * mmap.PAGESIZE)
        self.room = 63 * mmap.PAGESIZE
        self.begin = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mprotect(ctypes.c_void_p(self.begin + self.room), ctypes.c_size_t(mmap.PAGESIZE), 0)
        assert not failed, os.strerror(ctypes.get_errno())

    def put(self, text: bytes) -> Any:
        """A pointer to a text that ends where memory does."""
        assert len(text) <= self.room
        self.pages[self.room - len(text) : self.room] = text
        return ctypes.c_char_p(self.begin + self.room - len(text))


_COMPILED: list[tuple[compiled.Values, _Guarded]] = []


def examine_values(content: bytes, _: Path) -> WeightliftError | None:
    """The functions of ``_values.c`` on a text that ends where memory does, beside what they stand for."""
    if not _COMPILED:
        _COMPILED.append((compiled.Values(library_path()), _Guarded()))
    values, guarded = _COMPILED[0]
    depth, text = (content[0] % 128, content[1:]) if content else (0, b"")
    pointer, length = guarded.put(text), len(text)
    reason = ctypes.c_uint32()
    end = values._value(pointer, length, 0, depth, ctypes.byref(reason))
    assert end <= length
    assert values._unknown(pointer, length, 0, depth) <= length
    _check_tensors(values, pointer, text)
    try:
        text.decode()
    except UnicodeDecodeError:
        return None
    here = HeaderText(text, "values")
    try:
        here.skip_value_here(depth)
    except HeaderError as err:
        assert reason.value, text
        return err
    assert (end, reason.value) == (here.position, 0), text
    return None


def _check_tensors(values: compiled.Values, pointer: Any, text: bytes) -> None:
    """Columns are filled within their bounds, and names lie in the text one after the other."""
    for strict in (False, True):
        batch = compiled.TensorBatch(("F32", "U8"), 64, strict=strict)
        batch.table.rows_max, batch.table.dims_max = 2, 3
        end = values._tensors(pointer, len(text), 0, batch.dtypes, strict, ctypes.byref(batch.table))
        assert end <= len(text)
        assert batch.rows <= 2
        assert batch.table.dims_used <= 3
        last = 0
        for begin, stop in batch.names():
            assert last <= begin < stop <= end
            assert text[begin : begin + 1] == text[stop - 1 : stop] == b'"'
            last = stop
