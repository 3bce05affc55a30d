"""The tensors of one file in columns, as a format reader fills them, and how files join into one description.

Owns the arrays between a parsed header and a :class:`~weightlift.description.Description`. Knows no file format and
opens nothing; rows carry positions relative to the start of the file's data until they are joined.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from weightlift.description import Description, Shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.dtypes import DType


def _column(typecode: str) -> array[int]:
    return array(typecode)


@dataclass(slots=True)
class TensorColumns:
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


@dataclass(frozen=True, slots=True)
class ShardContents:
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
    names: list[str] = []
    codes, indexes, offsets, lengths = _column("B"), _column("I"), _column("Q"), _column("Q")
    dims, ranks = _column("Q"), _column("I")
    strides: dict[int, tuple[int, ...]] = {}
    for index, item in enumerate(contents):
        columns, start = item.columns, item.shard.data_offset
        strides |= {len(names) + row: steps for row, steps in columns.strides.items()}
        names += columns.names
        codes += columns.dtype_codes
        indexes += array("I", [index]) * len(columns)
        offsets.fromlist([start + begin for begin in columns.begins])
        lengths.fromlist([end - begin for begin, end in zip(columns.begins, columns.ends, strict=True)])
        dims += columns.dims
        ranks += columns.ranks
    return Description(
        shards=[item.shard for item in contents],
        dtypes=dtypes,
        names=names,
        dtype_codes=codes,
        shard_indexes=indexes,
        offsets=offsets,
        lengths=lengths,
        dims=dims,
        dim_ends=array("I", accumulate(ranks)),
        strides=strides,
        shared=any(item.columns.shared for item in contents),
        file_format=file_format,
        notes=notes,
    )
