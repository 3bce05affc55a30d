"""Reading headers with the compiled library, where it was built.

Owns the functions of ``_values.c`` and nothing else. The library is the one that lies beside the native engine.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightlift.formats.columns import TensorColumns

ROWS: Final = 1 << 12
"""How many tensors are read at once."""

DIMENSIONS: Final = 1 << 14
"""How many dimensions these may have together; a tensor that has more by itself is left to the caller."""

_TENSOR_BYTES_MIN: Final = len('"":["U8",[],[0,0]],')


class _Table(ctypes.Structure):
    """``columns`` of ``_values.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("name_begins", "name_ends", "begins", "ends", "dims", "ranks", "codes")),
        *((name, ctypes.c_uint64) for name in ("rows_max", "dims_max", "rows", "dims_used")),
    )


class TensorBatch:
    """Room for the tensors that are read at once.

    Args:
        dtypes: the names of the data types, in the order of their codes.
        text_bytes: how long the header is that they are read from; a short one needs little room.
        strict: whether nothing but the form that writers use is to be read.
    """

    def __init__(self, dtypes: Sequence[str], text_bytes: int, *, strict: bool) -> None:
        rows, dims = min(ROWS, text_bytes // _TENSOR_BYTES_MIN + 1), min(DIMENSIONS, text_bytes // 2 + 1)
        self.dtypes = b"".join(name.encode() + b"\0" for name in dtypes)
        self.strict = strict
        self._codes = array("B", bytes(rows))
        self._ranks = array("I", bytes(4 * rows))
        self._dims = array("Q", bytes(8 * dims))
        self._name_begins, self._name_ends, self._begins, self._ends = (array("Q", bytes(8 * rows)) for _ in range(4))
        filled = (self._name_begins, self._name_ends, self._begins, self._ends, self._dims, self._ranks, self._codes)
        self.table = _Table(*(column.buffer_info()[0] for column in filled), rows, dims)

    @property
    def rows(self) -> int:
        """How many tensors there are in it."""
        return int(self.table.rows)

    def names(self) -> Iterator[tuple[int, int]]:
        """Where the name of each tensor begins and ends, with its quotes."""
        rows = self.rows
        return zip(self._name_begins[:rows], self._name_ends[:rows], strict=True)

    def append_to(self, columns: TensorColumns) -> None:
        """Add everything but the names to the columns of a file."""
        rows = self.rows
        columns.dtype_codes += self._codes[:rows]
        columns.ranks += self._ranks[:rows]
        columns.begins += self._begins[:rows]
        columns.ends += self._ends[:rows]
        columns.dims += self._dims[: self.table.dims_used]


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
        where = (ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64)
        self._value, self._unknown = library.wl_skip_value, library.wl_skip_unknown
        self._tensors, self._wrong = library.wl_read_tensors, library.wl_first_wrong_size
        for function in (self._value, self._unknown, self._tensors, self._wrong):
            function.restype = ctypes.c_uint64
        self._value.argtypes = (*where, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint32))
        self._unknown.argtypes = (*where, ctypes.c_uint32)
        self._tensors.argtypes = (*where, ctypes.c_char_p, ctypes.c_uint32, ctypes.POINTER(_Table))
        self._wrong.argtypes = (*[ctypes.c_void_p] * 5, ctypes.c_uint64, ctypes.c_void_p)

    def skip_value(self, text: bytes, position: int, depth: int) -> tuple[int, int]:
        """Where a value ends that begins at ``position``; or where it is refused, and a number other than 0."""
        reason = ctypes.c_uint32()
        end = self._value(text, len(text), position, depth, ctypes.byref(reason))
        return end, reason.value

    def skip_unknown(self, text: bytes, position: int, depth: int) -> int:
        """Where the first member of a tensor begins that is known, is the last, or is refused."""
        return int(self._unknown(text, len(text), position, depth))

    def read_tensors(self, text: bytes, position: int, batch: TensorBatch) -> int:
        """Fill a batch with the tensors that begin at ``position``, as long as others follow and it has room.

        Returns:
            Where the first member of the header begins that was not taken: the last one, one that is no tensor or is
            refused, or the next after a full batch.
        """
        table = batch.table
        table.rows = table.dims_used = 0
        return int(self._tensors(text, len(text), position, batch.dtypes, batch.strict, ctypes.byref(table)))

    def first_wrong_size(self, columns: TensorColumns, bits: array[int]) -> int:
        """The first row whose range of bytes does not have the size of its data type and shape; their number if none.

        Args:
            columns: the tensors.
            bits: of an element, by data type (type code ``Q``).
        """
        filled = (columns.dtype_codes, columns.ranks, columns.dims, columns.begins, columns.ends)
        addresses = [column.buffer_info()[0] for column in filled]
        return int(self._wrong(*addresses, len(columns), bits.buffer_info()[0]))


@functools.cache
def library() -> Values | None:
    """The compiled functions, or ``None`` where there are none."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    try:
        return Values(Path(__file__).parent.with_name("engines") / f"libweightlift_engine{suffix}")
    except (OSError, AttributeError):
        return None
