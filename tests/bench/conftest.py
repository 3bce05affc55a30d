"""Models on a disk whose pages really come and go, and a machine that is known beforehand."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.bench import running
from weightlift.cli.main import main
from weightlift.health import gathering
from weightlift.health.cache.evict import evict
from weightlift.health.cache.files import find_files
from weightlift.host import residency
from weightlift.testing import TensorSpec, machines, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weightlift.health.facts import Facts

    Bench = Callable[..., tuple[int, dict[str, Any]]]


def _cached_bytes(path: Path) -> int | None:
    """What the page cache holds of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return residency.residency(descriptor, path.stat().st_size)
    finally:
        os.close(descriptor)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def shards() -> Callable[[Path], list[Path]]:
    """The files with the tensors of a folder."""
    return _shards


@pytest.fixture
def cached_bytes() -> Callable[[Path], int | None]:
    """What the page cache holds of a file."""
    return _cached_bytes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of 16 MiB each, written out."""
    specs = [TensorSpec(f"layers.{number}.weight", "BF16", (1024, 2048)) for number in range(8)]
    folder = write_checkpoint(tmp_path / "model", specs, shards=2)
    for file in _shards(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return folder


@pytest.fixture
def cold_model(model: Path) -> Path:
    """The same, with nothing of it in the page cache; only where that can be had and verified."""
    stayed = [result.reason for result in evict(find_files(_shards(model))) if not result.gone]
    if stayed:
        pytest.skip(f"the page cache of files under {model.parent} cannot be emptied and verified: {stayed[0]}")
    return model


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up machine, so that no framework has to be asked, and one that is not virtual."""

    def gather(path: str, *, measure: bool) -> Facts:
        assert not measure, "the benchmark measures for itself"
        return machines.workstation()

    monkeypatch.setattr(gathering, "gather", gather)
    monkeypatch.setattr(running, "is_virtual", lambda: False)


@pytest.fixture
def bench(known_machine: None, capsys: pytest.CaptureFixture[str]) -> Bench:
    """``weightlift bench … --json`` on the made-up machine."""

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["bench", *words, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run
