"""The benchmark of verifying divides within rounds, and holds a disk back."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING

import pytest

from weightlift.testing.fast_disk import FastDiskUnavailable, fast_disk
from weightlift.units import MIB

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path


def test_overhead_is_taken_within_rounds(scripts: Path) -> None:
    runs = {
        "mine": [{"seconds": 1.1}, {"seconds": 4.0}, {"seconds": 2.0}],
        "less": [{"seconds": 1.0}, {"seconds": 2.0}, {"seconds": 2.0}],
    }
    found = importlib.import_module("verify").overhead("mine", "less", runs)
    assert found["value"]["median"] == pytest.approx(0.1)
    assert (found["value"]["min"], found["value"]["max"]) == (0.0, 1.0)
    assert found["reached"] is (found["value"]["median"] <= found["at_most"])


@pytest.mark.root
@pytest.mark.slow
def test_a_run_on_a_disk_that_is_held_back(
    tmp_path: Path, scripts: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    try:
        with fast_disk(MIB):
            pass
    except FastDiskUnavailable as err:
        pytest.skip(str(err))
    if not importlib.import_module("verify").GROUPS.exists():
        pytest.skip("no block controller of control groups, version 1")
    output = tmp_path / "verify.json"
    done = run_script("verify.py", "--size", "256", "--rounds", "1", "--rates", "0.2", "--output", output)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text(encoding="utf-8"))["rates"]
    for case in row["cases"]:
        # Some bytes are let through at once before a disk is held back.
        assert case["gigabytes_per_second"]["max"] < 0.3, case["name"]
