"""Tensors that are views of mapped files: lazy, shared with every process that maps them, and following the file.

This is the one exception to ownership. A mapping handed out is private copy-on-write, so that in-place edits work and
reach nobody else; with ``readonly`` it is shared and read-only. Tensors that the file holds at addresses wrong for
their data type are left to another target.
"""

from __future__ import annotations

import mmap
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weightlift.description import Description
    from weightlift.targets.frameworks import TensorMaker


def mappable_rows(description: Description, rows: Sequence[int]) -> list[int]:
    """The rows whose place in the file suits their data type."""
    alignments = [dtype.alignment for dtype in description.dtypes]
    return [row for row in rows if description.offsets[row] % alignments[description.dtype_codes[row]] == 0]


def map_shards(
    description: Description, used: Sequence[int], descriptors: Mapping[int, int], *, readonly: bool
) -> dict[int, mmap.mmap]:
    """Map shards for handing out.

    Args:
        description: the checkpoint.
        used: indexes of the shards.
        descriptors: their open descriptors; the mappings do not need them any longer.
        readonly: shared and read-only instead of private copy-on-write.
    """
    access = mmap.ACCESS_READ if readonly else mmap.ACCESS_COPY
    mappings = {}
    for index in used:
        size = description.shards[index].identity.size_bytes
        if size:
            mappings[index] = mmap.mmap(descriptors[index], size, access=access)
    return mappings


def mapped_tensors(
    description: Description, rows: Sequence[int], mappings: Mapping[int, mmap.mmap], maker: TensorMaker
) -> Iterator[tuple[str, Any]]:
    """Tensors over the mappings, which live as long as any of them.

    Args:
        description: the checkpoint.
        rows: rows from :func:`mappable_rows`.
        mappings: the mapped shards.
        maker: whose tensors.
    """
    with warnings.catch_warnings():
        # torch warns that it cannot stop writes to read-only memory; whoever asked for it was told so.
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        for row in rows:
            name, dtype, shape = description.names[row], description.dtype(row), description.shape(row)
            if description.lengths[row]:
                buffer: Any = mappings[description.shard_indexes[row]]
                yield name, maker.over(buffer, description.offsets[row], dtype, shape)
            else:
                yield name, maker.over(bytearray(0), 0, dtype, shape)
