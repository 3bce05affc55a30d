"""What is loaded in place of tensors that share bytes, from descriptions alone."""

from __future__ import annotations

from array import array
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
from hypothesis import given
from hypothesis import strategies as st

from weightlift.description import Description, FileIdentity, Shard
from weightlift.dtypes import SAFETENSORS
from weightlift.targets.frameworks import pick_framework
from weightlift.types import Framework
from weightlift.views import View, carry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Row = tuple[int, int, tuple[int, ...], int]
"""Shard, first element, shape, length in elements."""


def made(
    rows: Sequence[Row], strides: Mapping[int, tuple[int, ...]] | None = None, *, shared: bool = True
) -> Description:
    return Description(
        shards=[Shard(Path(f"s{number}"), FileIdentity(0, number, 1 << 20, 0), 0, {}) for number in range(2)],
        dtypes=[SAFETENSORS["F32"]],
        names=[f"t{number}" for number in range(len(rows))],
        dtype_codes=array("B", bytes(len(rows))),
        shard_indexes=array("I", [row[0] for row in rows]),
        offsets=array("Q", [4 * row[1] for row in rows]),
        lengths=array("Q", [4 * row[3] for row in rows]),
        dims=array("Q", [size for row in rows for size in row[2]]),
        dim_ends=array("I", accumulate(len(row[2]) for row in rows)),
        strides=strides,
        shared=shared,
    )


def test_ordinary_tensors_are_loaded_as_they_are() -> None:
    rows: list[Row] = [(0, 0, (4,), 4), (0, 4, (2, 3), 6), (1, 0, (4,), 4)]
    assert carry(made(rows, shared=False), range(3)) is None
    assert carry(made(rows), range(3)) is None


def test_what_overlaps_is_one_range() -> None:
    description = made([(0, 0, (10, 2), 20), (0, 4, (3, 2), 6), (0, 18, (4,), 4), (0, 22, (5,), 5), (1, 0, (9,), 9)])
    carried = carry(description, range(5))
    assert carried is not None
    assert carried.description.names == ["t0", "t3", "t4"]
    assert list(carried.description.lengths) == [88, 20, 36]
    assert carried.description.shape(0) == (22,)
    assert carried.description.shape(1) == (5,)
    assert carried.views == {
        "t0": (View("t0", 0, (10, 2), (2, 1)), View("t1", 4, (3, 2), (2, 1)), View("t2", 18, (4,), (1,)))
    }


def test_strides_alone_and_scalars() -> None:
    description = made([(0, 0, (2, 3), 6), (0, 6, (), 1)], {0: (1, 2)}, shared=False)
    carried = carry(description, range(2))
    assert carried is not None
    assert carried.views == {"t0": (View("t0", 0, (2, 3), (1, 2)),)}
    assert carry(description, [1]) is None


def test_tensors_without_bytes_stay_alone() -> None:
    description = made([(0, 0, (8,), 8), (0, 2, (0, 3), 0), (0, 4, (2,), 2)])
    carried = carry(description, range(3))
    assert carried is not None
    assert sorted(carried.description.names) == ["t0", "t1"]
    assert carried.description.total_bytes == 32


def test_the_same_range_in_two_files_is_two_ranges() -> None:
    assert carry(made([(0, 0, (8,), 8), (1, 0, (8,), 8)]), range(2)) is None


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=12), st.data()
)
def test_every_tensor_comes_out_as_it_lies_in_the_file(parts: list[tuple[int, int, int]], data: st.DataObject) -> None:
    rows: list[Row] = [(shard, first, (count,), count) for shard, first, count in sorted(parts)]
    description = made(rows)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    files = [numpy.arange(100 * shard, 100 * shard + 50, dtype="float32") for shard in range(2)]
    carried = carry(description, chosen)
    if carried is None:
        return
    read = carried.description
    loaded = [
        (read.names[row], files[read.shard_indexes[row]][read.offsets[row] // 4 :][: read.lengths[row] // 4])
        for row in carried.rows
    ]
    found = dict(carried.expand(loaded, pick_framework(Framework.NUMPY).strided))
    assert sorted(found) == sorted(description.names[row] for row in chosen)
    for row in chosen:
        shard, first, shape, count = rows[row]
        assert found[description.names[row]].shape == shape
        assert list(found[description.names[row]]) == list(files[shard][first : first + count])
    # Nothing is read twice.
    ends = [(read.shard_indexes[row], read.offsets[row], read.offsets[row] + read.lengths[row]) for row in carried.rows]
    ends = [part for part in ends if part[2] > part[1]]
    assert all(before[0] != after[0] or before[2] <= after[1] for before, after in pairwise(ends))
