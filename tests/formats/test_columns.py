"""Columns of files: what is selected and joined keeps its dimensions, strides and places."""

from __future__ import annotations

from array import array
from pathlib import Path

from weightlift.description import FileIdentity, Shard
from weightlift.dtypes import PYTORCH
from weightlift.formats.columns import ShardContents, TensorColumns, join

DTYPES = tuple(PYTORCH.values())


def columns() -> TensorColumns:
    """Four tensors; the second and the last are strided, and share bytes."""
    return TensorColumns(
        ["a", "b", "c", "d"],
        array("B", [1, 2, 3, 4]),
        array("Q", [0, 8, 20, 30]),
        array("Q", [8, 20, 30, 70]),
        array("I", [1, 2, 0, 3]),
        array("Q", [5, 6, 7, 8, 9, 10]),
        {1: (1, 6), 3: (90, 1, 9)},
        shared=True,
    )


def contents(name: str, part: TensorColumns, data_offset: int) -> ShardContents:
    return ShardContents(Shard(Path(name), FileIdentity(1, 2, 3, 4), data_offset, {}), part)


def test_a_selection_in_another_order() -> None:
    assert columns().select([3, 0, 1]) == TensorColumns(
        ["d", "a", "b"],
        array("B", [4, 1, 2]),
        array("Q", [30, 0, 8]),
        array("Q", [70, 8, 20]),
        array("I", [3, 1, 2]),
        array("Q", [8, 9, 10, 5, 6, 7]),
        {0: (90, 1, 9), 2: (1, 6)},
        shared=True,
    )
    found = columns().select([2])
    assert (found.names, list(found.dims), found.strides, found.shared) == (["c"], [], {}, True)
    assert columns().select(range(4)) == columns()
    one = TensorColumns(["x"], array("B", [0]), array("Q", [0]), array("Q", [0]), array("I", [0]))
    assert one.select([0]).shared is False


def test_files_joined_in_their_order() -> None:
    plain = TensorColumns(
        ["e"], array("B", [0]), array("Q", [4]), array("Q", [12]), array("I", [2]), array("Q", [1, 2])
    )
    found = join(
        [contents("one", plain, 100), contents("two", columns(), 1000)],
        DTYPES,
        file_format="PyTorch",
        notes=["a note"],
    )
    assert [shard.path.name for shard in found.shards] == ["one", "two"]
    assert found.names == ["e", "a", "b", "c", "d"]
    assert [found.shape(row) for row in range(5)] == [(1, 2), (5,), (6, 7), (), (8, 9, 10)]
    assert [list(column) for column in (found.dtype_codes, found.shard_indexes)] == [[0, 1, 2, 3, 4], [0, 1, 1, 1, 1]]
    assert list(found.offsets) == [104, 1000, 1008, 1020, 1030]
    assert list(found.lengths) == [8, 8, 12, 10, 40]
    assert found.strides == {2: (1, 6), 4: (90, 1, 9)}
    assert [info.strides for info in found] == [None, None, (1, 6), None, (90, 1, 9)]
    assert (found.shared, found.file_format, list(found.notes)) == (True, "PyTorch", ["a note"])
    # The typecodes say how large a number may be.
    columns_of = (found.dtype_codes, found.shard_indexes, found.offsets, found.lengths, found.dims, found.dim_ends)
    assert "".join(column.typecode for column in columns_of) == "BIQQQI"


def test_files_joined_by_default() -> None:
    plain = TensorColumns(["e"], array("B", [0]), array("Q", [4]), array("Q", [12]), array("I", [0]))
    found = join([contents("one", plain, 8)], DTYPES)
    assert (found.shared, found.file_format, list(found.notes), found.strides) == (False, "safetensors", [], {})
    assert join([contents("x", columns(), 0)], DTYPES).shared
