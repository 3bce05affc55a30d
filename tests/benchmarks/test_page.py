"""The page of published figures says what the results say, missed targets and gaps included."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]

TAKEN = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": [
        "/home/somebody/benchmarks/cpu.py",
        "--only",
        "paths",
        "--match",
        "*cold",
        "--folder",
        "/mnt/some/disk",
    ],
    "git": {"commit": "0123456789abcdef", "changed_files": 2},
    "processor": "a | processor",
    "usable_processors": 4,
    "memory_bytes": 16 * 10**9,
    "load_average_at_start": [9.5, 1.0, 1.0],
    "kernel": "6.18",
    "hypervisor": False,
    "storage": {"file_system": "ext4", "loop_over": None},
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "numpy": None},
    "rounds": 3,
}


def spread(*values: float) -> dict[str, float]:
    low, middle, high = sorted(values)
    return {"median": middle, "min": low, "max": high}


def section(**more: Any) -> dict[str, Any]:
    case = {
        "name": "direct → cpu, cold",
        "errors": [],
        "seconds": spread(1.0, 2.0, 3.0),
        "gigabytes_per_second": spread(1.25, 2.5, 5.0),
        "runs": [],
    }
    return {"taken": TAKEN, "title": "every path.", "cases": [case], "ratios": [], "limits": [], **more}


def ratio(name: str, *values: float, at_least: float | None, reached: bool | None) -> dict[str, Any]:
    return {"name": name, "over": "a", "under": "b", "at_least": at_least, "value": spread(*values), "reached": reached}


@pytest.fixture
def page_of(tmp_path: Path, run_script: Run) -> Callable[..., str]:
    """The page of some results files."""

    def make(**files: Any) -> str:
        for name, result in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
        done = run_script("page.py", "--results", tmp_path, "--output", tmp_path / "page.md")
        assert done.returncode == 0, done.stderr
        return (tmp_path / "page.md").read_text(encoding="utf-8")

    return make


def test_page_and_readme_are_what_the_results_in_the_tree_say(run_script: Run) -> None:
    done = run_script("page.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_figure_makes_the_check_fail(tmp_path: Path, run_script: Run, page_of: Callable[..., str]) -> None:
    page_of(cpu={"schema": 1, "paths": section()})
    changed = section()
    changed["cases"][0]["gigabytes_per_second"] = spread(1.25, 2.51, 5.0)
    (tmp_path / "cpu.json").write_text(json.dumps({"paths": changed}), encoding="utf-8")
    done = run_script("page.py", "--check", "--results", tmp_path, "--output", tmp_path / "page.md")
    assert done.returncode == 1
    assert "run benchmarks/page.py" in done.stdout


def test_missed_targets_stand_first_and_are_counted(page_of: Callable[..., str]) -> None:
    ratios = [
        ratio("kept", 0.9, 1.0, 1.1, at_least=0.95, reached=True),
        ratio("too slow", 0.4, 0.5, 0.6, at_least=0.95, reached=False),
        ratio("without a target", 0.1, 0.2, 0.3, at_least=None, reached=None),
    ]
    limits = [
        {
            "case": "direct",
            "figure": "extra_anonymous_bytes",
            "at_most": 8 << 20,
            "at_least": None,
            "value": spread(9 << 20, 9 << 20, 10 << 20),
            "reached": False,
        }
    ]
    text = page_of(cpu={"schema": 1, "paths": section(ratios=ratios, limits=limits)})
    assert "Of 3 targets 1 were reached and 2 missed." in text
    summary, _, rest = text.partition("\n## Into CPU memory")
    assert "| Into CPU memory | too slow | 0.50 (0.40–0.60) | ≥ 0.95 |" in summary
    assert "| 9.0 (9.0–10.0) | ≤ 8 |" in summary
    assert "without a target" not in summary
    assert "| without a target | 0.20 (0.10–0.30) | – | – |" in rest
    assert "| too slow | 0.50 (0.40–0.60) | ≥ 0.95 | **no** |" in rest


def test_every_figure_names_its_machine_and_a_command_that_fits_other_machines(page_of: Callable[..., str]) -> None:
    text = page_of(cpu={"schema": 1, "paths": section()})
    assert "| direct → cpu, cold | 2.50 (1.25–5.00) | 2.000 (1.000–3.000) |" in text
    assert "Taken 2026-01-02 by `python benchmarks/cpu.py --only paths --match '*cold' --folder disk`." in text
    assert "a \\| processor; 4 processors; 16.0 GB of memory; ext4; Linux 6.18." in text
    assert "torch 2.13.0; commit `0123456` with changes in 2 of its files." in text
    assert "Load average before it began: 9.5, so other work may have been under way." in text
    assert "/home" not in text


def test_no_result_names_the_folders_of_whoever_took_it() -> None:
    for path in (Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.json"):
        assert not re.search(r"/(home|root|Users)/", path.read_text(encoding="utf-8")), path.name


def test_what_is_absent_is_listed_as_not_measured(page_of: Callable[..., str]) -> None:
    text = page_of(cpu={"schema": 1, "paths": section()})
    _, _, gaps = text.partition("## Not measured")
    assert "`python benchmarks/giant.py`" in gaps
    assert "`python benchmarks/cpu.py --only busy`" in gaps
    assert "`python benchmarks/cpu.py --only paths`" not in gaps
    assert "benchmarks/results/giant.json" not in text


def test_a_smoke_run_is_called_one(page_of: Callable[..., str]) -> None:
    smoke = section(taken={**TAKEN, "quick": True})
    assert "**A smoke run: its figures mean nothing.**" in page_of(scaling={"schema": 1, "bytes": smoke})


def test_a_results_file_that_nobody_knows_is_shown_all_the_same(page_of: Callable[..., str]) -> None:
    unknown = {
        "schema": 1,
        "cases_tried": 1200,
        "parsers": [{"name": "gguf|v3", "crashes": 0}],
        "deep": {"seconds": 1.5},
    }
    suites = {"plan": {"mutants": 40, "killed": 39}, "buffers": {"mutants": 7, "killed": 7, "minutes": 0.5}}
    text = page_of(unheard=unknown, unheard_suites=suites)
    assert "\n## unheard\n" in text
    assert "| plan | 40 | 39 | – |" in text
    assert "| buffers | 7 | 7 | 0.500 |" in text
    assert "| cases tried | 1,200 |" in text
    assert "| gguf\\|v3 | 0 |" in text
    assert "| seconds | 1.500 |" in text


def test_sections_on_the_page_are_those_of_the_scripts(scripts: Path) -> None:
    known = importlib.import_module("page").KNOWN
    assert tuple(known["cpu"].sections) == importlib.import_module("cpu").NAMES
    assert tuple(known["gpu"].sections) == tuple(importlib.import_module("gpu_sections").SECTIONS)
    assert tuple(known["scaling"].sections) == tuple(importlib.import_module("scaling_sections").SECTIONS)
    for entry in known.values():
        assert not entry.command or (scripts.parent / entry.command.partition(" ")[0]).exists(), entry.command


def test_ratios_of_the_readme_divide_within_rounds(scripts: Path) -> None:
    table = importlib.import_module("readme_table")
    ours = [{"gigabytes_per_second": value} for value in (2.0, 8.0, 3.0)]
    theirs = [{"gigabytes_per_second": value} for value in (1.0, 2.0, 3.0)]
    cases = {"ours": {"runs": ours}, "theirs": {"runs": theirs}}
    assert table.times(cases, "ours", ("theirs",)) == "2.00"  # of 2, 4 and 1; the ratio of medians is 1.5
    assert table.times(cases, "ours", ("absent",)) == "–"
