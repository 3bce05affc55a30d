"""Random checkpoints and states of the page cache for property tests; needs hypothesis.

Nothing is written: descriptions and maps are made of numbers alone.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hypothesis import strategies as st

from weightlift.description import Description, FileIdentity, Shard
from weightlift.dtypes import SAFETENSORS
from weightlift.host.residency import Residency, ResidencyMap, ResidencyRun
from weightlift.plan import GRANULE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

_KINDS: Final = ("U8", "BOOL", "F16", "F32", "F64", "C64", "F8_E8M0", "F6_E2M3", "F4")


def describe_lengths(shards: Sequence[tuple[int, Sequence[tuple[str, int]]]]) -> Description:
    """A description of shards given as data offset and (data type, blocks) of each tensor."""
    names: list[str] = []
    codes, indexes = array("B"), array("I")
    offsets, lengths, dims, ends = array("Q"), array("Q"), array("Q"), array("I")
    made = []
    for shard, (data_offset, tensors) in enumerate(shards):
        position = data_offset
        for kind, blocks in tensors:
            dtype = SAFETENSORS[kind]
            names.append(f"tensor.{len(names)}")
            codes.append(list(SAFETENSORS).index(kind))
            indexes.append(shard)
            offsets.append(position)
            lengths.append(blocks * dtype.block_bytes)
            dims.append(blocks * dtype.block_elements)
            ends.append(len(dims))
            position += blocks * dtype.block_bytes
        made.append(Shard(Path(f"shard{shard}"), FileIdentity(1, shard, position, 0), data_offset, {}))
    return Description(
        shards=made,
        dtypes=list(SAFETENSORS.values()),
        names=names,
        dtype_codes=codes,
        shard_indexes=indexes,
        offsets=offsets,
        lengths=lengths,
        dims=dims,
        dim_ends=ends,
    )


_BLOCKS = st.one_of(st.just(0), st.integers(1, 40), st.integers(1000, 40_000), st.integers(100_000, 3_000_000))
_TENSOR = st.tuples(st.sampled_from(_KINDS), _BLOCKS)
_SHARD = st.tuples(st.integers(8, 20_000), st.lists(_TENSOR, max_size=25))


@st.composite
def selections(draw: st.DrawFn) -> tuple[Description, list[int]]:
    """A checkpoint of up to three shards with data at any offset, and the rows of it that are selected."""
    description = describe_lengths(draw(st.lists(_SHARD, min_size=1, max_size=3)))
    every = draw(st.booleans())
    chosen = [row for row in range(len(description)) if every or draw(st.booleans())]
    return description, chosen


@st.composite
def residencies(draw: st.DrawFn, size: int) -> ResidencyMap | None:
    """What the page cache may hold of a file of ``size`` bytes."""
    kind = draw(st.sampled_from(["unknown", "absent", "resident", "mixed"]))
    if kind == "unknown" or size == 0:
        return None
    if kind != "mixed":
        state = Residency.ABSENT if kind == "absent" else Residency.RESIDENT
        return ResidencyMap(GRANULE_BYTES, size, size if kind == "resident" else 0, (ResidencyRun(0, size, state),))
    runs: list[ResidencyRun] = []
    position = 0
    while position < size:
        length = min(GRANULE_BYTES * draw(st.integers(1, 6)), size - position)
        others = [state for state in Residency if not runs or state is not runs[-1].state]
        runs.append(ResidencyRun(position, length, draw(st.sampled_from(others))))
        position += length
    cached = sum(run.length for run in runs if run.state is Residency.RESIDENT)
    return ResidencyMap(GRANULE_BYTES, size, cached, tuple(runs))
