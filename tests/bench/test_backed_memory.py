"""Telling virtual machines apart, and backing memory piece by piece."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import pytest

from weightlift.bench import backed_memory
from weightlift.bench.backed_memory import back_memory, is_virtual
from weightlift.host import kernel
from weightlift.units import MIB

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("told", "virtual"),
    [
        ("processor : 0\nflags : fpu hypervisor avx\n", True),
        ("processor : 0\nflags : fpu avx\n", False),
        ("model name : hypervisor\n", False),
        (None, False),
    ],
)
def test_a_virtual_machine_is_told_by_its_processor(tmp_path: Path, told: str | None, virtual: bool) -> None:
    (tmp_path / "proc").mkdir()
    if told is not None:
        (tmp_path / "proc/cpuinfo").write_text(told)
    assert is_virtual(tmp_path) == virtual


def test_memory_is_backed_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        try:
            page.madvise(kernel.MADV_POPULATE_WRITE)
        except (OSError, AttributeError):
            pytest.skip("this system cannot populate memory on request")
    monkeypatch.setattr(backed_memory, "spare_memory", lambda: None)
    monkeypatch.setattr(backed_memory, "_PIECE_BYTES", MIB)
    assert back_memory(2 * MIB + 4096) == 2 * MIB + 4096
    monkeypatch.setattr(backed_memory, "spare_memory", lambda: 5 * MIB)
    assert back_memory(100 * MIB) == 4 * MIB
