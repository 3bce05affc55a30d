"""What a header says arrives in the columns, and the columns stay small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from weightlift.formats import describe
from weightlift.testing import (
    TensorSpec,
    every_dtype_specs,
    exl3_specs,
    llama_specs,
    moe_specs,
    tensor_bytes,
    write_checkpoint,
)

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.description import Description

CHECKPOINTS = {
    "dtypes": every_dtype_specs(),
    "llama": llama_specs(3_000_000, layers=3),
    "exl3": exl3_specs(layers=2, hidden=64, keys=16, inner=128, vocabulary=64),
    "none": [],
    "unicode": [TensorSpec('ü\U0001f600"\\\n', "U8", (3,)), TensorSpec("", "F32", (2,))],
}


def require_contents(description: Description, specs: list[TensorSpec], seed: int) -> None:
    assert sorted(description.names) == sorted(spec.name for spec in specs)
    for spec in specs:
        info = description.tensor(description.row(spec.name))
        assert (info.dtype.name, info.shape, info.nbytes) == (spec.dtype, spec.shape, spec.nbytes)
        with info.path.open("rb") as file:
            file.seek(info.offset)
            assert file.read(info.nbytes) == tensor_bytes(spec, seed=seed)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("padding", ["reference", "none", 3])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_columns_lead_to_the_bytes(tmp_path: Path, name: str, padding: str | int, shards: int) -> None:
    specs = CHECKPOINTS[name]
    count = min(shards, max(len(specs), 1))
    write_checkpoint(tmp_path, specs, shards=count, seed=5, padding=padding, metadata={"format": "pt"})  # type: ignore[arg-type]
    description = describe(tmp_path)
    require_contents(description, specs, 5)
    assert description.total_bytes == sum(spec.nbytes for spec in specs)
    assert len(description.shards) == count
    assert {shard.metadata["format"] for shard in description.shards} == {"pt"}
    for shard in description.shards:
        status = shard.path.stat()
        assert shard.identity == (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        assert padding != 3 or shard.data_offset % 4096 == 3


def test_tensors_are_sorted_by_position_whatever_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = (
        b'{"late":{"dtype":"U8","shape":[2],"data_offsets":[4,6]},"empty":{"dtype":"U8","shape":[0],"data_offsets":'
        b'[4,4]},"early":{"dtype":"I16","shape":[2,1],"data_offsets":[0,4]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    description = describe(path)
    assert description.names == ["early", "empty", "late"]
    assert [description.shape(row) for row in range(3)] == [(2, 1), (0,), (2,)]
    start = 8 + len(header)
    assert list(description.offsets) == [start, start + 4, start + 4]
    assert list(description.lengths) == [4, 0, 2]
    assert description.tensor_at(0, start + 4) == "late"


def test_a_description_of_many_tensors_is_small(tmp_path: Path) -> None:
    specs = moe_specs()
    assert len(specs) > 200_000
    description = describe(write_checkpoint(tmp_path / "moe.safetensors", specs, sparse=True))
    assert len(description) == len(specs)
    before = description.nbytes
    assert specs[7].name in description
    # With the table that finds names.
    assert before + 28 * len(specs) < description.nbytes <= 400 * len(specs)
