"""What a selection of tensors reaches of a checkpoint's files: which shards, and which parts of them.

Pure arithmetic on the description. Looking at what the page cache holds takes time in proportion to the pages it finds,
so a load of one layer must not look at the files of the whole model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.host.residency import BLOCK_GRANULES
from weightlift.plan import GRANULE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightlift.description import Description
    from weightlift.host.residency import Part

_BLOCK_BYTES: Final = GRANULE_BYTES * BLOCK_GRANULES
_BLOCKS_BEFORE: Final = 1
_BLOCKS_AFTER: Final = 2
"""The system reads around faults and ahead of reads, and what that brings in is to be recorded too."""


class Reach(NamedTuple):
    """What a load reaches.

    Attributes:
        shards: indexes of the shards to be read.
        parts: offset and length in bytes of the parts, in file order, that reading may bring into the page cache, by
            shard; each begins at a multiple of 16 MiB. A shard that is not named is read as a whole.
    """

    shards: Sequence[int]
    parts: Mapping[int, Sequence[Part]]


def reach_of(description: Description, rows: Sequence[int]) -> Reach:
    """What a load of some rows reaches.

    Args:
        description: the checkpoint.
        rows: the rows that will be read.
    """
    if len(rows) == len(description) and _fill_files(description):
        return Reach(sorted(set(description.shard_indexes)), {})
    blocks: dict[int, set[int]] = {}
    for row in rows:
        found = blocks.setdefault(description.shard_indexes[row], set())
        offset, length = description.offsets[row], description.lengths[row]
        if length:
            last = (offset + length - 1) // _BLOCK_BYTES
            found.update(range(offset // _BLOCK_BYTES - _BLOCKS_BEFORE, last + 1 + _BLOCKS_AFTER))
    sizes = {index: description.shards[index].identity.size_bytes for index in blocks}
    return Reach(sorted(blocks), {index: _parts(found, sizes[index]) for index, found in blocks.items()})


def _fill_files(description: Description) -> bool:
    """Whether the tensors are most of their files, as those of a whole checkpoint are.

    A description may also be of ranges of files that hold much else, as frameworks ask for them one module at a time.
    """
    return 2 * sum(description.lengths) >= sum(shard.identity.size_bytes for shard in description.shards)


def _parts(blocks: set[int], size_bytes: int) -> list[Part]:
    parts: list[Part] = []
    for block in sorted(blocks):
        start, end = block * _BLOCK_BYTES, min((block + 1) * _BLOCK_BYTES, size_bytes)
        if start < 0 or start >= end:
            continue
        if parts and sum(parts[-1]) == start:
            parts[-1] = (parts[-1][0], end - parts[-1][0])
        else:
            parts.append((start, end - start))
    return parts
