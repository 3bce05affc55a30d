"""What a checkpoint holds, in columns: one entry per tensor in each of a few compact arrays.

A checkpoint may have hundreds of thousands of tensors, so there is no object per tensor here: names, data types,
shapes and byte ranges are columns, and a :class:`TensorInfo` is made when somebody asks for one. The cost is counted
by :attr:`Description.nbytes` and stays under 400 bytes a tensor.

Format readers build a description; the planner, the public face and the command line read it. It holds no open file.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightlift.dtypes import DType


_SMALL_INT_BYTES: Final = 28


def picked(column: array[int], rows: Sequence[int]) -> Sequence[int]:
    """What a column says of some rows; all at once where they are neighbours, as most loads take all there are."""
    if isinstance(rows, range) and rows.step == 1:
        return column[rows.start : rows.stop]
    return [column[row] for row in rows]


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint, as described by its header.

    Attributes:
        name: the tensor's name.
        dtype: its data type as stored.
        shape: its logical shape, outermost dimension first.
        path: the file that holds its bytes.
        offset: where its bytes begin in that file.
        nbytes: how many bytes it takes there.
        strides: element strides where its elements do not lie contiguously there; ``None`` for others.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None


class FileIdentity(NamedTuple):
    """What must not change between reading a file's header and reading its data.

    Attributes:
        device: the number of the device that holds the file.
        inode: the file's number on that device.
        size_bytes: the file's length.
        modified_ns: time of last modification, in nanoseconds since the epoch.
    """

    device: int
    inode: int
    size_bytes: int
    modified_ns: int


class Shard(Struct, frozen=True):
    """One file of a checkpoint.

    Attributes:
        path: where the file was found (a symlink is kept as it was named).
        identity: size, inode and modification time when the header was read.
        data_offset: where tensor data begins in the file.
        metadata: the header's own entries: text, or what else the format has.
        brought_in: offset and length in bytes of what reading the header brought into the page cache.
    """

    path: Path
    identity: FileIdentity
    data_offset: int
    metadata: Mapping[str, Any]
    brought_in: tuple[tuple[int, int], ...] = ()


class Description:
    """The tensors of one checkpoint, in columns, sorted by shard and then by position in it.

    Row ``i`` is described by ``names[i]``, ``dtypes[dtype_codes[i]]``, ``shape(i)``, ``shards[shard_indexes[i]]`` and
    the absolute byte range ``offsets[i] … offsets[i] + lengths[i]`` in that file.

    Args:
        shards: the files, in the order in which their tensors appear.
        dtypes: the data types that ``dtype_codes`` refers to.
        names: tensor names, each once.
        dtype_codes: index into ``dtypes`` per tensor (type code ``B``).
        shard_indexes: index into ``shards`` per tensor (type code ``I``).
        offsets: absolute position of the first byte per tensor (type code ``Q``).
        lengths: bytes per tensor (type code ``Q``).
        dims: the dimensions of all tensors, one after the other (type code ``Q``).
        dim_ends: index in ``dims`` after the last dimension of each tensor (type code ``I``).
        strides: by row, element strides of the tensors whose elements do not lie contiguously in their byte range.
        shared: some tensors share bytes, as tied weights in PyTorch checkpoints do.
        file_format: the name of the files' format.
        notes: sentences about what was chosen on the way, for the person who asked.
    """

    __slots__ = (
        "_names_bytes",
        "_row_of",
        "dim_ends",
        "dims",
        "dtype_codes",
        "dtypes",
        "file_format",
        "lengths",
        "names",
        "notes",
        "offsets",
        "shard_indexes",
        "shards",
        "shared",
        "strides",
    )

    def __init__(
        self,
        *,
        shards: Sequence[Shard],
        dtypes: Sequence[DType],
        names: list[str],
        dtype_codes: array[int],
        shard_indexes: array[int],
        offsets: array[int],
        lengths: array[int],
        dims: array[int],
        dim_ends: array[int],
        strides: Mapping[int, tuple[int, ...]] | None = None,
        shared: bool = False,
        file_format: str = "safetensors",
        notes: Sequence[str] = (),
    ) -> None:
        self.file_format = file_format
        self.strides = strides or {}
        self.shared = shared
        self.notes = tuple(notes)
        self.shards = tuple(shards)
        self.dtypes = tuple(dtypes)
        self.names = names
        self.dtype_codes = dtype_codes
        self.shard_indexes = shard_indexes
        self.offsets = offsets
        self.lengths = lengths
        self.dims = dims
        self.dim_ends = dim_ends
        # Many loads ask for everything and never for a name.
        self._row_of: dict[str, int] | None = None
        self._names_bytes: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._rows_by_name()

    def __iter__(self) -> Iterator[TensorInfo]:
        return map(self.tensor, range(len(self.names)))

    def row(self, name: str) -> int:
        """The row of the tensor called ``name``.

        Raises:
            KeyError: there is no such tensor.
        """
        return self._rows_by_name()[name]

    def _rows_by_name(self) -> dict[str, int]:
        if self._row_of is None:
            self._row_of = {name: row for row, name in enumerate(self.names)}
        return self._row_of

    def shape(self, row: int) -> tuple[int, ...]:
        """The logical shape of the tensor in ``row``."""
        start = self.dim_ends[row - 1] if row else 0
        return tuple(self.dims[start : self.dim_ends[row]])

    def shapes(self, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """The logical shapes of the tensors in some rows; of neighbours in a fraction of the time of each alone."""
        if len(rows) < 2 or not isinstance(rows, range) or rows.step != 1:
            return [self.shape(row) for row in rows]
        start = self.dim_ends[rows[0] - 1] if rows[0] else 0
        ends = self.dim_ends[rows.start : rows.stop]
        rank, dims = ends[0] - start, self.dims[start : ends[-1]].tolist()
        if rank and ends == array(ends.typecode, range(start + rank, start + rank * len(rows) + 1, rank)):
            return list(zip(*[iter(dims)] * rank, strict=True))
        places = [0, *(end - start for end in ends)]
        return [tuple(dims[first:end]) for first, end in pairwise(places)]

    def dtype(self, row: int) -> DType:
        """The data type of the tensor in ``row``."""
        return self.dtypes[self.dtype_codes[row]]

    def tensor(self, row: int) -> TensorInfo:
        """Everything known of the tensor in ``row``."""
        shard = self.shards[self.shard_indexes[row]]
        return TensorInfo(
            self.names[row],
            self.dtype(row),
            self.shape(row),
            shard.path,
            self.offsets[row],
            self.lengths[row],
            self.strides.get(row),
        )

    def tensor_at(self, shard_index: int, offset: int) -> str | None:
        """The name of the tensor whose bytes include ``offset`` of a shard, or ``None`` if none does."""
        first = bisect_right(self.shard_indexes, shard_index - 1)
        last = bisect_right(self.shard_indexes, shard_index)
        row = bisect_right(self.offsets, offset, first, last) - 1
        while row >= first and self.lengths[row] == 0:
            row -= 1
        if row < first or offset >= self.offsets[row] + self.lengths[row]:
            return None
        return self.names[row]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together, each counted once where tensors share some."""
        if not self.shared:
            return sum(self.lengths)
        total, shard, end = 0, -1, 0
        for index, offset, length in zip(self.shard_indexes, self.offsets, self.lengths, strict=True):
            if index != shard:
                shard, end = index, 0
            total += max(0, offset + length - max(offset, end))
            end = max(end, offset + length)
        return total

    def bytes_of(self, rows: Sequence[int]) -> int:
        """Bytes of the tensors in some rows together."""
        return sum(picked(self.lengths, rows))

    @property
    def nbytes(self) -> int:
        """Memory this description takes: its columns, its names and, once it was needed, the table from name to row."""
        columns = (self.dtype_codes, self.shard_indexes, self.offsets, self.lengths, self.dims, self.dim_ends)
        if self._names_bytes is None:
            self._names_bytes = sys.getsizeof(self.names) + sum(map(sys.getsizeof, self.names))
        table = sys.getsizeof(self._row_of) + _SMALL_INT_BYTES * len(self.names) if self._row_of is not None else 0
        return sum(column.buffer_info()[1] * column.itemsize for column in columns) + self._names_bytes + table
