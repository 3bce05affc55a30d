"""The scripts under ``benchmarks``: importable, and run as a user would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from weightlift.host import residency

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the scripts, whose modules can be imported during the test."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return SCRIPTS


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script by its name with arguments."""

    def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    return run


@pytest.fixture(scope="session")
def forgetful_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on a disk whose pages can be dropped, which every benchmark does before a run."""
    folder = tmp_path_factory.mktemp("disk")
    if sys.platform != "linux":
        pytest.skip(f"the benchmarks need Linux, this is {sys.platform}")
    probe = folder / "probe"
    probe.write_bytes(bytes(1 << 16))
    descriptor = os.open(probe, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        left = residency.residency(descriptor, 1 << 16)
    finally:
        os.close(descriptor)
    probe.unlink()
    if left != 0:
        pytest.skip(f"the file system under {folder} keeps pages it is asked to drop, or does not tell")
    return folder
