"""Places of tensors on a device: aligned, disjoint, inside their block, and reached by the copy table."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlift.device_layout import LARGE_BYTES, SLAB_BYTES, entries_between, lay_out_on_device
from weightlift.formats import describe
from weightlift.operations import COPY_FIELDS
from weightlift.testing import TensorSpec, every_dtype_specs, write_checkpoint
from weightlift.units import MIB

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from weightlift.description import Description
    from weightlift.device_layout import DeviceLayout

SPECS = [
    *every_dtype_specs(),
    TensorSpec("a.large", "F32", (3 * MIB,)),
    TensorSpec("b.exactly", "U8", (LARGE_BYTES,)),
    TensorSpec("c.under", "U8", (LARGE_BYTES - 1,)),
    *(TensorSpec(f"d.{number:03}", "BF16", (700_001,)) for number in range(40)),
]


def require_sound(description: Description, layout: DeviceLayout) -> None:
    """What every layout keeps."""
    taken: dict[int, list[tuple[int, int]]] = {}
    for index, row in enumerate(layout.layout.rows):
        length, block, offset = description.lengths[row], layout.block_of[index], layout.offset_of[index]
        if not length:
            assert block == -1
            continue
        assert offset + length <= layout.blocks[block].nbytes
        alignment = 512 if length >= 512 else 16 if length >= 16 else description.dtype(row).alignment
        assert offset % alignment == 0
        taken.setdefault(block, []).append((offset, offset + length))
        # What the copy table does to the tensor's bytes puts them where the tensor is said to be.
        copied = 0
        for table in layout.tables:
            if layout.layout.spans[layout.tables.index(table)].shard != description.shard_indexes[row]:
                continue
            begin = description.offsets[row]
            for entry in entries_between(table, begin, begin + length):
                at, nbytes, place = layout.numbers[COPY_FIELDS * entry : COPY_FIELDS * entry + 3]
                overlap = min(at + nbytes, begin + length) - max(at, begin)
                assert layout.entry_blocks[entry] == block
                assert place + max(begin - at, 0) == offset + max(at - begin, 0)
                copied += overlap
        assert copied == length
    for places in taken.values():
        places.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


@pytest.mark.parametrize("padding", ["reference", "none"])
def test_every_tensor_has_its_place(tmp_path: Path, padding: Any) -> None:
    description = describe(write_checkpoint(tmp_path, SPECS, shards=3, padding=padding, sparse=True))
    layout = lay_out_on_device(description, range(len(description)))
    require_sound(description, layout)
    alone = {description.names[block.row] for block in layout.blocks if block.row >= 0}
    assert alone == {"a.large", "b.exactly"}
    assert all(block.nbytes <= SLAB_BYTES for block in layout.blocks if block.row < 0)
    assert sum(block.nbytes for block in layout.blocks) <= description.total_bytes + MIB


@given(kept=st.sets(st.integers(0, len(SPECS) - 1), min_size=1))
def test_any_selection_has_its_place(tmp_path_factory: pytest.TempPathFactory, kept: set[int]) -> None:
    path = tmp_path_factory.getbasetemp() / "selected"
    if not path.exists():
        write_checkpoint(path, SPECS, shards=2, sparse=True)
    description = describe(path)
    rows = sorted(kept)
    require_sound(description, lay_out_on_device(description, rows))


def test_neighbours_in_the_file_are_one_copy(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{number:05}", "F16", (64,)) for number in range(5000)]
    description = describe(write_checkpoint(tmp_path, specs, sparse=True))
    layout = lay_out_on_device(description, range(len(description)))
    assert len(layout.entry_blocks) == 1
    assert len(layout.blocks) == 1


@pytest.mark.parametrize("padding", ["reference", "none"])
def test_tensors_lie_no_worse_than_in_memory_of_their_own(tmp_path: Path, padding: Any) -> None:
    """In the file they lie at any multiple of 8 or less, which is too little for the kernels that read them."""
    specs = [
        TensorSpec(f"{number:03}.{name}", "F16", shape)
        for number in range(100)
        for name, shape in {"weight": (320, 640), "bias": (320,), "scale": (3,), "zero": (0,)}.items()
    ]
    description = describe(write_checkpoint(tmp_path, specs, padding=padding, sparse=True))
    layout = lay_out_on_device(description, range(len(description)))
    require_sound(description, layout)
    # What touches a bias in the file does in the slab, the weight before it and the scale behind; weights begin anew.
    assert len(layout.entry_blocks) == 101


def test_selected_neighbours_are_one_copy(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{number:05}", "F16", (64,)) for number in range(5000)]
    description = describe(write_checkpoint(tmp_path, specs, sparse=True))
    # Gaps make the span a packed one; what touches on either side of them is still copied together.
    rows = [row for row in range(len(description)) if not 1000 <= row < 1010 and not 3000 <= row < 3010]
    layout = lay_out_on_device(description, rows)
    require_sound(description, layout)
    assert len(layout.entry_blocks) == 3
