"""Draws ``results/cpu.json``: loads into CPU memory along every path under raw reads, and beside other loaders.

``python benchmarks/cpu_plot.py`` writes ``docs/pictures/cpu.svg``: a panel per state of the page cache, each with a
scale of its own. Mapped tensors out of the page cache, for which nothing is copied, have a panel to themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import readme_table
from plot_command import plot

from weightlift.reports.bench_chart import speed_axis
from weightlift.reports.drawing import Box, Picture, Stroke, Words, as_svg

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weightlift.reports.drawing import Shape

    Spread = Mapping[str, float]

ROOT: Final = Path(__file__).resolve().parent
RESULTS: Final = ROOT / "results" / "cpu.json"
PICTURE: Final = ROOT.parent / "docs" / "pictures" / "cpu.svg"
OURS: Final = "weightlift"
OWN, OTHER, LIMIT, QUIET = "#d3402a", "#8a8f98", "#2b6ea8", "#666666"
WIDTH, LEFT, RIGHT, TOP = 860, 270, 70, 70
ROW, BAR, HEAD, FOOT = 24, 13, 30, 30


class Bar(NamedTuple):
    """One line of a panel: its name, whether it is weightlift's, and its speeds in GB/s."""

    name: str
    own: bool
    speed: Spread


class Panel(NamedTuple):
    """Bars on one scale, and what bounds them, if that was measured."""

    title: str
    bars: Sequence[Bar]
    limit: Spread | None


def panels(results: Mapping[str, Any]) -> Iterator[Panel]:
    """What was measured of every path, then of every loader."""
    cases = {case["name"]: case for case in results["paths"]["cases"]}
    for state in readme_table.STATES:
        copied = [label for label in readme_table.ROWS if (label, state) != ("mmap", "warm")]
        bars = _bars({label: cases.get(f"{label} → cpu, {state}") for label in copied}, own=True)
        raw = readme_table.fastest_raw(cases, state, "fresh")
        yield Panel(f"every path, {state}", bars, raw["gigabytes_per_second"] if raw else None)
    for state in ("cold", "warm"):
        found = _loaders(results["peers"]["cases"], state)
        mapped = {name: case for name, case in found.items() if "mmap" in name}
        owned = {name: case for name, case in found.items() if name not in mapped}
        if state == "cold":
            yield Panel("beside other loaders, cold", _bars(found), None)
        else:
            yield Panel("beside other loaders, warm", _bars(owned), None)
            yield Panel("beside other loaders, warm and mapped: nothing is copied", _bars(mapped), None)


def _loaders(cases: Sequence[Mapping[str, Any]], state: str) -> dict[str, Mapping[str, Any]]:
    """Every loader in one state, at the faster of its settings."""
    found: dict[str, Mapping[str, Any]] = {}
    for case in cases:
        name, _, rest = case["name"].partition(f", {state}")
        if case["state"] == state and rest in ("", ", best") and case.get("gigabytes_per_second"):
            before = found.get(name)
            if before is None or _median(case) > _median(before):
                found[name] = case
    return found


def _median(case: Mapping[str, Any]) -> float:
    return float(case["gigabytes_per_second"]["median"])


def _bars(cases: Mapping[str, Mapping[str, Any] | None], *, own: bool = False) -> list[Bar]:
    return [
        Bar(name, own or name.startswith(OURS), case["gigabytes_per_second"])
        for name, case in cases.items()
        if case is not None and case.get("gigabytes_per_second")
    ]


def draw(results: Mapping[str, Any]) -> Picture:
    """The picture."""
    taken = results["paths"]["taken"]
    size = taken["checkpoints"]["main"]["tensor_bytes"] / 1e9
    machine = f"{size:.1f} GB, {taken['usable_processors']} processors, a disk made of memory, {taken['date'][:10]}"
    caption = f"{machine}; medians with the smallest and the largest; blue: the fastest raw read"
    shapes: list[Shape] = [
        Words(20, 28, "Loads into CPU memory in GB/s, by state of the page cache", 16, bold=True),
        Words(20, 50, caption, colour=QUIET),
    ]
    top = float(TOP)
    for panel in panels(results):
        if panel.bars:
            shapes += _panel(panel, top)
            top += HEAD + ROW * len(panel.bars) + FOOT
    return Picture(WIDTH, int(top) + 8, "Loads into CPU memory, by state of the page cache", shapes)


def _panel(panel: Panel, top: float) -> Iterator[Shape]:
    highest = max(bar.speed["max"] for bar in panel.bars)
    highest = 1.04 * max(highest, panel.limit["median"] if panel.limit else 0.0)
    scale = (WIDTH - LEFT - RIGHT) / highest
    bottom = top + HEAD + ROW * len(panel.bars)
    yield Words(20, top + 18, panel.title, 14, bold=True)
    yield from speed_axis(highest, LEFT, WIDTH - LEFT - RIGHT, top + HEAD, bottom)
    for number, bar in enumerate(panel.bars):
        y = top + HEAD + ROW * (number + 0.5)
        low, high = LEFT + scale * bar.speed["min"], LEFT + scale * bar.speed["max"]
        said = f"{bar.speed['median']:.1f}"
        yield Words(LEFT - 12, y + 4, bar.name, anchor="end", bold=bar.own)
        yield Box(LEFT, y - BAR / 2, scale * bar.speed["median"], BAR, OWN if bar.own else OTHER, f"{bar.name}: {said}")
        yield Stroke(low, y, high, y, "#222222", 1.5)
        yield Words(high + 8, y + 4, said, 12)
    if panel.limit:
        x = LEFT + scale * panel.limit["median"]
        yield Stroke(x, top + HEAD, x, bottom, LIMIT, 2)


def main() -> None:
    """The command line."""
    plot((__doc__ or "").splitlines()[0], "cpu.py", RESULTS, PICTURE, lambda results: as_svg(draw(results)))


if __name__ == "__main__":
    main()
