"""Which parts of which tensors are compared with the files after a load: a bounded number, spread over the model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.description import Description

_TENSORS_FIRST: Final = 256
_TENSORS_LATER: Final = 16
_PART_BYTES: Final = MIB


def sample_parts(description: Description, rows: Sequence[int], *, thorough: bool) -> list[list[Any]]:
    """The begin and the end of up to 256 tensors in the first round, and of 16 in later ones.

    Tensors whose elements do not lie one after the other in their file are passed over.

    Args:
        description: the checkpoint.
        rows: the tensors that were loaded.
        thorough: this is the first round.

    Returns:
        Name, file, offset of the tensor there, and start and length of the part, for each.
    """
    wanted = _TENSORS_FIRST if thorough else _TENSORS_LATER
    chosen = [rows[number * len(rows) // wanted] for number in range(wanted)] if len(rows) > wanted else list(rows)
    parts: list[list[Any]] = []
    for row in chosen:
        length = description.lengths[row]
        if row in description.strides or not length:
            continue
        file = os.path.abspath(description.shards[description.shard_indexes[row]].path)
        # The last part begins behind the first.
        starts = dict.fromkeys((0, max(0, length - _PART_BYTES)))
        parts += [
            [description.names[row], file, description.offsets[row], start, min(_PART_BYTES, length - start)]
            for start in starts
        ]
    return parts
