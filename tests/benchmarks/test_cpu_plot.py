"""The picture of loads into CPU memory shows every path and loader, the faster of its settings, and nothing else."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def plot(scripts: Path) -> ModuleType:
    return importlib.import_module("cpu_plot")


def case(name: str, state: str, speed: float | None) -> dict[str, Any]:
    spread = {"median": speed, "min": speed - 0.5, "max": speed + 0.5} if speed else None
    return {"name": name, "state": state, "gigabytes_per_second": spread}


def results() -> dict[str, Any]:
    taken = {
        "date": "2026-01-02T03:04:05",
        "usable_processors": 4,
        "checkpoints": {"main": {"tensor_bytes": 2 * 10**9}},
    }
    paths = [
        case("auto → cpu, cold", "cold", 3.0),
        case("raw direct, fresh-huge, 4 × 2 MiB, cold", "cold", 5.0),
        case("raw direct, reused, 4 × 2 MiB, cold", "cold", 9.0),
        case("mmap → cpu, warm", "warm", 80.0),
        case("auto → cpu, warm", "warm", 20.0),
        case("direct → cpu, warm", "warm", None),
    ]
    peers = [
        case("weightlift auto, cold", "cold", 3.0),
        case("other <1>, cold", "cold", 1.5),
        case("other <1>, cold, best", "cold", 2.5),
        case("weightlift mmap, warm", "warm", 80.0),
        case("other <1>, warm", "warm", 7.5),
        case("other <1>, warm, best", "warm", None),
    ]
    return {"paths": {"taken": taken, "cases": paths}, "peers": {"cases": peers}}


def test_every_panel_has_its_cases_and_the_paths_their_limit(plot: ModuleType) -> None:
    found = [
        (panel.title, [(bar.name, bar.own, bar.speed["median"]) for bar in panel.bars], panel.limit)
        for panel in plot.panels(results())
        if panel.bars
    ]
    assert found == [
        ("every path, cold", [("auto", True, 3.0)], {"median": 5.0, "min": 4.5, "max": 5.5}),
        ("every path, warm", [("auto", True, 20.0)], None),
        ("beside other loaders, cold", [("weightlift auto", True, 3.0), ("other <1>", False, 2.5)], None),
        ("beside other loaders, warm", [("other <1>", False, 7.5)], None),
        (
            "beside other loaders, warm and mapped: nothing is copied",
            [("weightlift mmap", True, 80.0)],
            None,
        ),
    ]


def test_bars_are_as_long_as_their_medians(plot: ModuleType) -> None:
    shapes = plot.draw(results()).shapes
    long, short = (
        next(shape for shape in shapes if getattr(shape, "title", "") == title)
        for title in (
            "weightlift auto: 3.0",
            "other <1>: 2.5",
        )
    )
    assert long.width / short.width == pytest.approx(3.0 / 2.5)
    assert (long.colour, short.colour) == (plot.OWN, plot.OTHER)


def test_the_picture_in_the_tree_is_of_the_results_in_the_tree(
    plot: ModuleType, tmp_path: Path, run_script: Run
) -> None:
    done = run_script("cpu_plot.py", "--output", tmp_path / "cpu.svg")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "cpu.svg").read_text(encoding="utf-8")
    assert text == plot.PICTURE.read_text(encoding="utf-8"), "run benchmarks/cpu_plot.py"
    recorded = json.loads(plot.RESULTS.read_text(encoding="utf-8"))
    assert recorded["paths"]["taken"]["date"][:10] in text
