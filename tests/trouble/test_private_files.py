"""Folders for temporary files are for their owner alone, whatever the process's mask allows."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.health.asking import Child
from weightlift.health.self_test import run_self_test

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SAYS_ITS_MODE = """
import json, os, sys
mode = os.stat(sys.argv[1]).st_mode & 0o777
print(json.dumps({"step": "torch", "begins": True}), flush=True)
print(json.dumps({"step": "torch", "mode": mode}), flush=True)
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for temporary files, and a mask that lets everybody read and write."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    mask = os.umask(0)
    yield folder
    os.umask(mask)
    assert os.listdir(folder) == []


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are kept otherwise on Windows")
def test_the_self_tests_folder(scratch: Path) -> None:
    modes: list[int] = []

    def note(_step: str, _result: dict[str, Any]) -> None:
        modes.extend(path.stat().st_mode & 0o777 for path in scratch.iterdir())

    run_self_test("cuda:0", None, note, step_seconds=0.0)
    assert modes == [0o700]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are kept otherwise on Windows")
def test_the_doctors_folder(scratch: Path) -> None:
    child = Child(["torch"], [sys.executable, "-c", SAYS_ITS_MODE])
    child.wait(60)
    assert child.answers == {"torch": {"mode": 0o700}}
