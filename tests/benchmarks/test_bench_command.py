"""What the command bench finds is recorded without this machine's folders, and shown on the page as it is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from weightlift.testing.fast_disk import FastDiskUnavailable, fast_disk
from weightlift.units import MIB

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.root
@pytest.mark.needs("preadv", "cachestat")
def test_the_command_is_run_recorded_and_shown(tmp_path: Path, run_script: Run) -> None:
    try:
        with fast_disk(MIB):
            pass
    except FastDiskUnavailable as err:
        pytest.skip(str(err))
    options = ("--size", "0.03", "--rounds", "3", "--device", "null", "--paths", "auto,direct", "--against", "")
    done = run_script("bench_command.py", *options, "--output", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "bench.json").read_text(encoding="utf-8")
    assert "fast-disk" not in text
    assert str(tmp_path) not in text
    found = json.loads(text)["bench"]
    assert [(case["name"], case["state"], case["errors"]) for case in found["cases"]] == [
        (name, state, []) for state in ("cold", "warm") for name in ("auto", "direct")
    ]
    shown = run_script("page.py", "--results", tmp_path, "--output", tmp_path / "page.md")
    assert shown.returncode == 0, shown.stderr
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| loads of weightlift's that gave the right bytes | all | all | yes |" in page
    speed = found["cases"][1]["gigabytes_per_second"]
    assert f"| direct | {speed['median']:.2f} ({speed['smallest']:.2f}–{speed['largest']:.2f}) | " in page
    assert f"| storage, direct | {found['ceilings']['direct']['gigabytes_per_second']['median']:.2f} (" in page
