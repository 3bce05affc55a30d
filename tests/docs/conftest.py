"""The folder of the pages, and the tiny model that their examples load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from weightlift.testing import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``path/to/model``, as the pages call it, below the folder that is current during the test."""
    monkeypatch.chdir(tmp_path)
    specs = [TensorSpec(f"model.layers.{layer}.weight", "F32", (64, 64)) for layer in range(4)]
    return write_checkpoint(tmp_path / "path" / "to" / "model", specs, shards=2)
