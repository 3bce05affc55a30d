"""Finding the tensor at a place in a file."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import pytest

from weightlift.description import picked
from weightlift.formats import describe
from weightlift.testing import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_the_tensor_at_an_offset(tmp_path: Path) -> None:
    specs = [
        TensorSpec("a", "U8", (10,)),
        TensorSpec("none", "F32", (0,)),
        TensorSpec("b", "U8", (1,)),
        TensorSpec("c", "U8", (5,)),
        TensorSpec("nothing", "U8", (0, 4)),
    ]
    description = describe(write_checkpoint(tmp_path, specs, shards=1, sort=False))
    begin = description.offsets[0]
    found = [description.tensor_at(0, begin + position) for position in range(-1, 18)]
    assert found == [None] + 10 * ["a"] + ["b"] + 5 * ["c"] + 2 * [None]


def test_each_shard_has_its_own_offsets(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{n}", "U8", (100,)) for n in range(6)]
    description = describe(write_checkpoint(tmp_path, specs, shards=3))
    for info in description:
        shard = description.shard_indexes[description.row(info.name)]
        assert description.tensor_at(shard, info.offset) == info.name
        assert description.tensor_at(shard, info.offset + 99) == info.name
    assert description.tensor_at(2, 0) is None


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3), (4, 5), (1, 1)],
        [(), (), ()],
        [(7,), (2, 3), (), (0, 4), (1, 2, 3)],
        [(2, 3)],
        # As many dimensions in all as three matrices have.
        [(2, 3, 4), (5,), (6, 7)],
    ],
    ids=["matrices", "scalars", "mixed", "one", "mixed, by chance as many"],
)
def test_shapes_of_neighbours(tmp_path: Path, shapes: list[tuple[int, ...]]) -> None:
    specs = [TensorSpec(f"t{n}", "U8", shape) for n, shape in enumerate(shapes)]
    description = describe(write_checkpoint(tmp_path, specs, shards=1, sort=False))
    for first in range(len(shapes)):
        for end in range(first + 1, len(shapes) + 1):
            assert description.shapes(range(first, end)) == shapes[first:end]
    backwards = range(len(shapes) - 1, -1, -1)
    assert description.shapes(backwards) == description.shapes(list(backwards)) == shapes[::-1]
    assert description.shapes(range(0)) == []


def test_what_a_column_says_of_rows() -> None:
    column = array("Q", range(0, 100, 10))
    for rows in (range(2, 5), range(0), [3, 1, 1], range(1, 8, 3), range(5, 2, -1)):
        assert list(picked(column, rows)) == [10 * row for row in rows]
