"""What a load reaches of its files: all that it reads and a little around it, and nothing far away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlift.formats import describe
from weightlift.host.residency import Residency
from weightlift.integrations.raw import RawRange, describe_ranges, open_raw
from weightlift.reach import Reach, reach_of
from weightlift.shards import OpenShards
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weightlift.description import Description
    from weightlift.host.probes import Probe

BLOCK = 16 * MIB
TENSORS, TENSOR_BYTES = 40, 10 * MIB + 77


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> Description:
    """Two sparse shards of some 200 MiB, with tensors without bytes among the others."""
    specs = [TensorSpec(f"t{n:02}", "U8", (TENSOR_BYTES if n % 8 else 0,)) for n in range(TENSORS)]
    return describe(write_checkpoint(tmp_path_factory.mktemp("reach"), specs, shards=2, sparse=True))


@given(chosen=st.sets(st.integers(0, TENSORS - 1), max_size=TENSORS - 1))
def test_all_that_is_read_is_reached(description: Description, chosen: set[int]) -> None:
    rows = sorted(chosen)
    reach = reach_of(description, rows)
    assert reach.shards == sorted({description.shard_indexes[row] for row in rows})
    assert sorted(reach.parts) == reach.shards
    for row in rows:
        parts = reach.parts[description.shard_indexes[row]]
        start, end = description.offsets[row], description.offsets[row] + description.lengths[row]
        # What the system reads around and ahead of a range is reached too.
        size = description.shards[description.shard_indexes[row]].identity.size_bytes
        wanted = (max(0, start - BLOCK), min(size, end + BLOCK))
        assert start == end or any(part <= wanted[0] and wanted[1] <= part + length for part, length in parts)
    for index, parts in reach.parts.items():
        last = -1
        for offset, length in parts:
            assert offset % BLOCK == 0
            assert offset > last, "parts that touch are one"
            last = offset + length
            assert length > 0
            assert last <= description.shards[index].identity.size_bytes


def test_all_tensors_reach_whole_files(description: Description) -> None:
    assert reach_of(description, range(TENSORS)) == Reach([0, 1], {})


def test_ranges_of_a_file_reach_little(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(TENSORS * TENSOR_BYTES)
    ranges, _ = describe_ranges([RawRange(open_raw(str(path)), 5 * BLOCK, BLOCK, 0, "cpu")])
    assert reach_of(ranges, [0]) == Reach([0], {0: [(4 * BLOCK, 4 * BLOCK)]})


def test_one_tensor_reaches_little(description: Description) -> None:
    reach = reach_of(description, [TENSORS - 5])
    assert reach.shards == [1]
    assert sum(length for _, length in reach.parts[1]) <= 5 * BLOCK


def test_only_what_is_reached_is_looked_at(description: Description) -> None:
    asked: list[Probe] = []

    def ask(probes: Sequence[Probe]) -> list[int]:
        asked.extend(probes)
        return [0 for _ in probes]

    rows = [1, 17]
    (_, parts) = reach = reach_of(description, rows)
    with OpenShards(description, *reach, want_direct=False, ask=ask) as shards:
        assert sorted((probe.offset, probe.length) for probe in asked) == [
            (start, min(BLOCK, offset + length - start))
            for offset, length in parts[0]
            for start in range(offset, offset + length, BLOCK)
        ]
        cached = shards.facts[0].residency
        assert cached is not None
        assert cached.looked_bytes == sum(length for _, length in parts[0]) < cached.size_bytes
        assert {run.state for run in cached.runs()} == {Residency.ABSENT, Residency.UNSEEN}
        for row in rows:
            assert cached.state(description.offsets[row], description.lengths[row]) is Residency.ABSENT
        asked.clear()
        assert shards.cached_now() == 0
        assert sum(probe.length for probe in asked) == cached.looked_bytes
