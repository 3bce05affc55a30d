"""Files for the safetensors face."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from weightlift.compat.safetensors.opened import OpenedFile
from weightlift.testing.factory import write_checkpoint
from weightlift.testing.shapes import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

SPECS = [
    TensorSpec("cube", "F32", (3, 4, 5)),
    TensorSpec("wide", "BF16", (6, 40)),
    TensorSpec("long", "I64", (17,)),
    TensorSpec("bytes", "U8", (5, 3)),
    TensorSpec("number", "F16", ()),
    TensorSpec("empty", "F32", (0, 4)),
    TensorSpec("flags", "BOOL", (2, 3)),
    TensorSpec("complex", "C64", (2, 2)),
]


@pytest.fixture(scope="session")
def specs() -> list[TensorSpec]:
    return SPECS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a tensor of every shape that indexing treats differently."""
    return write_checkpoint(tmp_path / "file.safetensors", SPECS, metadata={"format": "pt", "x": "y"})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every range that is read in the caller's thread, as ``(offset, length)``."""
    seen: list[tuple[int, int]] = []
    into, whole = OpenedFile._read_into, OpenedFile._read_at_once

    def read_into(self: OpenedFile, target: memoryview, offset: int) -> None:
        seen.append((offset, len(target)))
        into(self, target, offset)

    def read_at_once(self: OpenedFile, target: Any, offset: int, length: int) -> bool:
        done = whole(self, target, offset, length)
        if done:
            seen.append((offset, length))
        return done

    monkeypatch.setattr(OpenedFile, "_read_into", read_into)
    monkeypatch.setattr(OpenedFile, "_read_at_once", read_at_once)
    return seen
