"""What a checkpoint holds, as numbers and as text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from weightlift.api import open as open_checkpoint
from weightlift.description import TensorInfo
from weightlift.dtypes import SAFETENSORS
from weightlift.reports.console import show
from weightlift.reports.inspection import Inspection, Share, SortKey, inspect_checkpoint
from weightlift.reports.inspection_tables import inspect_tables, tensor_lines
from weightlift.testing import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

SPECS = [
    TensorSpec("b.weight", "F32", (2, 3)),
    TensorSpec("a.weight", "BF16", (10,)),
    TensorSpec("scalar", "I64", ()),
    TensorSpec("empty", "U8", (0, 7)),
    TensorSpec("packed", "F4", (4, 4)),
]


def tensor(name: str, shape: tuple[int, ...] = (2, 2)) -> TensorInfo:
    return TensorInfo(name, SAFETENSORS["F32"], shape, Path("model.safetensors"), 80, 16)


def inspection(listed: Sequence[TensorInfo], *, tensors: int = 5) -> Inspection:
    part = Share(name="F32", tensors=tensors, parameters=1_500_000_000, nbytes=6_000_000_000)
    return Inspection(
        path="model",
        tensors_total=9,
        tensors=tensors,
        parameters=part.parameters,
        nbytes=part.nbytes,
        dtypes=(part,),
        files=(part,),
        file_bytes={"F32": 1},
        metadata={},
        description_bytes=2048,
        listed=tuple(listed),
    )


def plain(value: Inspection, limit: int | None = None) -> str:
    stream = io.StringIO()
    show(stream, *inspect_tables(value, limit=limit))
    stream.writelines(f"{line}\n" for line in tensor_lines(value))
    return stream.getvalue()


def test_sums_by_dtype_and_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", SPECS, shards=2))
    found = inspect_checkpoint(checkpoint, range(len(SPECS)), path="m")
    assert (found.tensors, found.parameters, found.nbytes) == (5, 6 + 10 + 1 + 0 + 16, 24 + 20 + 8 + 0 + 8)
    assert {part.name: (part.tensors, part.parameters, part.nbytes) for part in found.dtypes} == {
        "F32": (1, 6, 24),
        "BF16": (1, 10, 20),
        "I64": (1, 1, 8),
        "F4": (1, 16, 8),
        "U8": (1, 0, 0),
    }
    assert sum(part.nbytes for part in found.files) == found.nbytes
    assert [found.file_bytes[part.name] for part in found.files] == [
        Path(part.name).stat().st_size for part in found.files
    ]


def test_a_selection_counts_only_itself(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m.safetensors", SPECS))
    row = checkpoint.description.row("b.weight")
    found = inspect_checkpoint(checkpoint, [row], path="m")
    assert (found.tensors_total, found.tensors, found.nbytes) == (5, 1, 24)
    assert [part.name for part in found.dtypes] == ["F32"]


@pytest.mark.parametrize(
    ("sort", "first"), [(SortKey.NAME, ["a.weight", "b.weight"]), (SortKey.SIZE, ["b.weight", "a.weight"])]
)
def test_order_and_limit(tmp_path: Path, sort: SortKey, first: list[str]) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m.safetensors", SPECS))
    found = inspect_checkpoint(checkpoint, range(5), path="m", sort=sort, limit=2)
    assert [info.name for info in found.listed] == first


def test_file_order_is_the_order_of_offsets(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m.safetensors", SPECS))
    found = inspect_checkpoint(checkpoint, range(5), path="m")
    offsets = [info.offset for info in found.listed]
    assert offsets == sorted(offsets)


def test_text_of_totals() -> None:
    lines = plain(inspection([tensor("x")])).splitlines()
    assert "tensors      5 of 9 in 1 file" in lines
    assert "parameters   1,500,000,000 (1.5 billion)" in lines
    assert "size         5.59 GiB (6,000,000,000 bytes)" in lines


def test_tensor_lines_align_and_say_what_is_left() -> None:
    lines = list(tensor_lines(inspection([tensor("x", (1024, 8)), tensor("y", ())])))
    assert [line.split()[-1] for line in lines[:3]] == ["name", "x", "y"]
    assert {line.index(name) for line, name in zip(lines[:3], ("name", "x", "y"), strict=True) if name != "x"} == {
        lines[1].rindex("x")
    }
    assert "scalar" in lines[2]
    assert lines[3].startswith("… and 3 more")


def test_no_list_and_no_remark_without_tensors() -> None:
    assert list(tensor_lines(inspection([]))) == []


def test_hostile_names_and_metadata_print_as_text(tmp_path: Path) -> None:
    hostile = "[bold red]\x1b[2J\x9b31m[/bold red]\r\n:boom:\u2066"
    path = write_checkpoint(tmp_path / "m.safetensors", [TensorSpec(hostile, "F32", (1,))], metadata={hostile: hostile})
    found = inspect_checkpoint(open_checkpoint(path), range(1), path="m")
    printed = plain(found)
    assert printed.isprintable() or set(printed) - {c for c in printed if c.isprintable()} == {"\n"}
    assert printed.count("[bold red]") == 3
    assert printed.count(":boom:") == 3


def test_long_lists_of_files_are_cut(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{number}", "U8", (4,)) for number in range(12)]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", specs, shards=12))
    found = inspect_checkpoint(checkpoint, range(12), path="m", list_tensors=False)
    assert plain(found, limit=5).count(".safetensors") == 5
    assert "… and 7 files more" in plain(found, limit=5)
    assert plain(found).count(".safetensors") == 12
