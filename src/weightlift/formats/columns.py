"""The tensors of one file in columns, as a format reader fills them, and how files join into one description.

Owns the arrays between a parsed header and a :class:`~weightlift.description.Description`. Knows no file format and
opens nothing; rows carry positions relative to the start of the file's data until they are joined.
"""

from __future__ import annotations

from array import array
from itertools import accumulate
from typing import TYPE_CHECKING

from msgspec import Struct, field

from weightlift.description import Description, Shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.dtypes import DType


def _column(typecode: str) -> array[int]:
    return array(typecode)


class TensorColumns(Struct):
    """The tensors of one file, one entry per tensor in every column.

    Attributes:
        names: tensor names.
        dtype_codes: index into the format's table of data types.
        begins: first byte, counted from the start of the file's data.
        ends: first byte after the tensor, counted likewise.
        ranks: number of dimensions.
        dims: the dimensions of all tensors, one after the other.
        strides: by row, element strides of the tensors that are not contiguous.
        shared: some tensors share bytes.
    """

    names: list[str] = field(default_factory=list)
    dtype_codes: array[int] = field(default_factory=lambda: _column("B"))
    begins: array[int] = field(default_factory=lambda: _column("Q"))
    ends: array[int] = field(default_factory=lambda: _column("Q"))
    ranks: array[int] = field(default_factory=lambda: _column("I"))
    dims: array[int] = field(default_factory=lambda: _column("Q"))
    strides: dict[int, tuple[int, ...]] = field(default_factory=dict)
    shared: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows: Sequence[int]) -> TensorColumns:
        """The same columns with only ``rows``, in the order given."""
        ends = array("Q", accumulate(self.ranks, initial=0))
        dims = _column("Q")
        for row in rows:
            dims.extend(self.dims[ends[row] : ends[row + 1]])
        return TensorColumns(
            [self.names[row] for row in rows],
            array("B", [self.dtype_codes[row] for row in rows]),
            array("Q", [self.begins[row] for row in rows]),
            array("Q", [self.ends[row] for row in rows]),
            array("I", [self.ranks[row] for row in rows]),
            dims,
            {new: self.strides[old] for new, old in enumerate(rows) if old in self.strides} if self.strides else {},
            self.shared,
        )


class ShardContents(Struct, frozen=True):
    """One file whose header was read and judged: the file itself and its tensors, sorted by position."""

    shard: Shard
    columns: TensorColumns


def join(
    contents: Sequence[ShardContents],
    dtypes: Sequence[DType],
    *,
    file_format: str = "safetensors",
    notes: Sequence[str] = (),
) -> Description:
    """One description of all ``contents``, in their order. Names must be unique across them."""
    indexes, offsets, lengths = _column("I"), _column("Q"), _column("Q")
    for index, item in enumerate(contents):
        columns, start = item.columns, item.shard.data_offset
        indexes += array("I", [index]) * len(columns)
        offsets.fromlist([start + begin for begin in columns.begins])
        lengths.fromlist([end - begin for begin, end in zip(columns.begins, columns.ends, strict=True)])
    # Of one file the columns are taken as they are: opening a small one should cost next to nothing.
    joined = contents[0].columns if len(contents) == 1 else _concatenated(contents)
    return Description(
        shards=[item.shard for item in contents],
        dtypes=dtypes,
        names=joined.names,
        dtype_codes=joined.dtype_codes,
        shard_indexes=indexes,
        offsets=offsets,
        lengths=lengths,
        dims=joined.dims,
        dim_ends=array("I", accumulate(joined.ranks)),
        strides=joined.strides,
        shared=joined.shared,
        file_format=file_format,
        notes=notes,
    )


def _concatenated(contents: Sequence[ShardContents]) -> TensorColumns:
    """The columns of all files one after the other, but for positions, which mean nothing without a file."""
    joined = TensorColumns(shared=any(item.columns.shared for item in contents))
    for columns in (item.columns for item in contents):
        joined.strides |= {len(joined) + row: steps for row, steps in columns.strides.items()}
        joined.names += columns.names
        joined.dtype_codes += columns.dtype_codes
        joined.dims += columns.dims
        joined.ranks += columns.ranks
    return joined
