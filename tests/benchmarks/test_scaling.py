"""The scaling benchmark runs through every section, and its picture shows what the results say."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Run = Callable[..., subprocess.CompletedProcess[str]]

MIB = 1 << 20
DOT = re.compile(r'<circle class="dot" cx="([\d.]+)" cy="([\d.]+)" r="3.2"><title>([^<]*)</title>')


@pytest.fixture(scope="module")
def quick(forgetful_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_script: Run) -> dict[str, Any]:
    """Results of the smoke run, its sections taken one after the other into one file."""
    output = tmp_path_factory.mktemp("results") / "scaling.json"
    for only in ("bytes,tensors", "workers,budgets"):
        words = ("--framework", "numpy", "--folder", forgetful_folder, "--only", only, "--output", output)
        done = run_script("scaling.py", "--quick", *words)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert not list(forgetful_folder.iterdir()), "checkpoints were left behind"
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def test_the_smoke_run_measures_every_section_in_verified_states(quick: Mapping[str, Any], scripts: Path) -> None:
    sections = importlib.import_module("scaling_sections")
    assert set(quick) == {"schema", *sections.SECTIONS}
    for section in (quick[name] for name in sections.SECTIONS):
        assert section["taken"]["quick"] is True
        for case in section["cases"]:
            assert not case["errors"]
            before = case["resident_before"]["median"]
            assert before >= 0.99 if case["state"] == "warm" else before <= 0.01, case["name"]


def test_every_quantity_of_a_section_is_measured(quick: Mapping[str, Any], scripts: Path) -> None:
    sizes = importlib.import_module("scaling_sections").QUICK
    expected = {
        "bytes": {count * sizes.shard_bytes for count in (*sizes.sparse, *sizes.written)},
        "tensors": set(sizes.tensors),
        "workers": {0, *sizes.workers},
        "budgets": set(sizes.budgets),
    }
    for name, quantities in expected.items():
        assert {case["x"] for case in quick[name]["cases"]} == quantities, name
    for case in quick["bytes"]["cases"]:
        assert case["tensor_bytes"] == pytest.approx(case["x"], rel=0.02)
        assert case["sparse"] is ("sparse" in case["series"])
    assert {case["tensors"] for case in quick["tensors"]["cases"]} == set(sizes.tensors)
    assert len({case["tensor_bytes"] for case in quick["tensors"]["cases"]}) == 1


def test_the_safetensors_library_is_measured_beside(quick: Mapping[str, Any]) -> None:
    for name in ("bytes", "tensors"):
        runs = [run for case in quick[name]["cases"] if case["series"] == "safetensors → cpu" for run in case["runs"]]
        assert runs
        assert all(run["touched_seconds"] >= run["seconds"] and run["tensors_checked"] for run in runs)


def results(*, exponent: float = 1.0, anonymous: int = 100 * MIB) -> dict[str, Any]:
    """Results as of a machine whose time grows with some power of the bytes."""
    taken = {
        "processor": "made <up>",
        "usable_processors": 2,
        "memory_bytes": 8 * 10**9,
        "storage": {"loop_over": "tmpfs", "file_system": "ext4"},
        "rounds": 3,
        "date": "2026-01-01T00:00:00+00:00",
    }

    def case(gigabytes: int) -> dict[str, Any]:
        seconds = 0.2 * gigabytes**exponent
        return {
            "series": "direct → null, sparse",
            "sparse": True,
            "x": gigabytes * 10**9,
            "seconds": {"median": seconds, "min": seconds, "max": seconds},
            "extra_anonymous_bytes": dict.fromkeys(("median", "min", "max"), anonymous),
        }

    return {"bytes": {"taken": taken, "cases": [case(size) for size in (1, 4, 16, 64)]}}


def dots(picture: str) -> list[tuple[float, float, str]]:
    return [(float(x), float(y), title) for x, y, title in DOT.findall(picture)]


def slope(picture: str, unit: str) -> list[float]:
    """Rise from point to point, in pixels for a pixel to the right."""
    points = [(x, y) for x, y, title in dots(picture) if title.endswith(unit)]
    assert len(points) == 4
    return [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]


def test_time_in_proportion_is_drawn_along_the_guide(scripts: Path) -> None:
    plot = importlib.import_module("scaling_plot")
    picture = plot.draw(results())
    rises = slope(picture, " s")
    assert min(rises) > 0
    assert max(rises) == pytest.approx(min(rises), rel=0.02)
    first, last = (dots(picture)[index] for index in (0, 3))
    guide = re.search(r'<path class="guide" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', picture)
    assert guide is not None
    assert [float(value) for value in guide.groups()] == pytest.approx([*first[:2], *last[:2]], abs=0.2)


def test_time_beyond_proportion_leaves_the_guide(scripts: Path) -> None:
    picture = importlib.import_module("scaling_plot").draw(results(exponent=1.5))
    last = dots(picture)[3]
    guide = re.search(r'<path class="guide" d="M.*L([\d.]+) ([\d.]+)"', picture)
    assert guide is not None
    assert float(guide[2]) > last[1] + 10  # lower in the picture: less time


def test_memory_is_drawn_flat_below_its_budget(scripts: Path) -> None:
    picture = importlib.import_module("scaling_plot").draw(results())
    heights = {y for _, y, title in dots(picture) if title.endswith("MiB")}
    assert len(heights) == 1
    budgets = re.findall(r'<path class="budget" d="M[\d.]+ ([\d.]+)L', picture)
    assert float(budgets[0]) < heights.pop()


def test_what_a_machine_calls_itself_cannot_break_the_picture(scripts: Path) -> None:
    assert "made &lt;up&gt;" in importlib.import_module("scaling_plot").draw(results())


def test_every_measured_point_is_drawn_with_time_and_memory(
    quick: Mapping[str, Any], tmp_path: Path, run_script: Run, scripts: Path
) -> None:
    source, picture = tmp_path / "scaling.json", tmp_path / "pictures" / "scaling.svg"
    source.write_text(json.dumps(quick), encoding="utf-8")
    done = run_script("scaling_plot.py", "--results", source, "--output", picture)
    assert done.returncode == 0, done.stderr
    text = picture.read_text(encoding="utf-8")
    known = importlib.import_module("scaling_plot").LINES
    cases = [case for name in ("bytes", "tensors", "workers", "budgets") for case in quick[name]["cases"]]
    assert len(dots(text)) == 2 * sum(case["series"] in known for case in cases)
    assert "these figures mean nothing" in text
