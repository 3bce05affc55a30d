"""A benchmark's throughput as a picture: a bar per contestant and state, its spread, and the ceiling it has.

Takes the finished record. Below the number of rounds that makes a result there are no bars, only a dot per run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightlift.reports.charts import tick_step
from weightlift.reports.console import counted
from weightlift.reports.drawing import Box, Dot, Picture, Stroke, Words
from weightlift.reports.load import speed_text
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightlift.bench.results import BenchResult, CaseResult
    from weightlift.reports.drawing import Shape

_WIDTH: Final = 860
_LEFT: Final = 270
_RIGHT: Final = 90
_TOP: Final = 78
_ROW: Final = 30
_BAR: Final = 16
_HEAD: Final = 34
_FOOT: Final = 34
_OURS: Final = "#d3402a"
_PEER: Final = "#8a8f98"
_CEILING: Final = "#2b6ea8"
_QUIET: Final = "#666666"
_GRID: Final = "#e6e6e6"
_TICKS: Final = 5
_LABEL_WIDTH: Final = 80
_NAME_CHARACTERS: Final = 34


def bench_picture(result: BenchResult) -> Picture:
    """Draw a benchmark.

    Args:
        result: of any number of rounds, finished or interrupted.
    """
    states = [state for state in ("cold", "warm") if any(case.good for case in result.cases if case.state == state)]
    shapes: list[Shape] = list(_heading(result))
    y = float(_TOP)
    for state in states:
        cases = [case for case in result.cases if case.state == state and case.good]
        shapes += _panel(state, cases, y)
        y += _HEAD + _ROW * len(cases) + _FOOT
    return Picture(_WIDTH, int(y) + 8, f"Throughput of {result.path} to {result.device}", shapes)


def _heading(result: BenchResult) -> Iterator[Shape]:
    runs = counted(result.rounds_done, "round")
    state = "interrupted, partial; " if result.partial else ""
    said = "medians with the smallest and the largest" if result.conclusive else "single runs, not a result"
    size = f"{counted(result.tensors, 'tensor')}, {format_bytes(result.nbytes)}, to {result.device}"
    yield Words(20, 28, "Throughput in GB/s, by state of the page cache", 16, bold=True)
    yield Words(20, 50, f"{size}; {state}{runs}: {said}; the blue line is what the machine can do", colour=_QUIET)


def _panel(state: str, cases: Sequence[CaseResult], top: float) -> Iterator[Shape]:
    """The cases of one state, on a scale of their own."""
    ceilings = [run.ceiling[1] for case in cases for run in case.good if run.ceiling]
    speeds = [run.gigabytes_per_second for case in cases for run in case.good]
    highest = max([*speeds, *ceilings, 1e-6]) * 1.04
    span = _WIDTH - _LEFT - _RIGHT
    bottom = top + _HEAD + _ROW * len(cases)
    yield Words(20, top + 20, state, 15, bold=True)
    yield from speed_axis(highest, _LEFT, span, top + _HEAD, bottom)
    for number, case in enumerate(cases):
        yield from _row(case, top + _HEAD + _ROW * (number + 0.5), span / highest)


def speed_axis(highest: float, left: float, span: float, top: float, bottom: float) -> Iterator[Shape]:
    """Lines across a panel at round speeds, with the speeds below them.

    Args:
        highest: the speed at the right end.
        left: where 0 is.
        span: from there to the right end.
        top: where the lines begin.
        bottom: where they end.
    """
    step = tick_step(highest / _TICKS, binary=False)
    for index in range(int(highest / step) + 1):
        x = left + span * index * step / highest
        yield Stroke(x, top, x, bottom, _GRID)
        yield Words(x, bottom + 18, f"{index * step:g}", 12, _QUIET, "middle")


def _row(case: CaseResult, y: float, scale: float) -> Iterator[Shape]:
    """One case: its name, its bar or its runs, its spread and its ceiling."""
    colour = _OURS if case.contestant.own else _PEER
    name = case.contestant.name
    shown = name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 1]}…"
    yield Words(_LEFT - 12, y + 4, shown, anchor="end", bold=case.contestant.own)
    title = f"{name}, {case.state}: " + ", ".join(speed_text(run.gigabytes_per_second) for run in case.good)
    speed = case.speed
    if speed is None:
        for run in case.good:
            yield Dot(_LEFT + run.gigabytes_per_second * scale, y, 4.5, colour, title)
        furthest = max(run.gigabytes_per_second for run in case.good)
        text = "single run" if len(case.good) == 1 else "single runs"
    else:
        yield Box(_LEFT, y - _BAR / 2, speed.median * scale, _BAR, colour, title)
        low, high = _LEFT + speed.smallest * scale, _LEFT + speed.largest * scale
        yield Stroke(low, y, high, y, "#222222", 1.5)
        for x in (low, high):
            yield Stroke(x, y - 4, x, y + 4, "#222222", 1.5)
        furthest = speed.largest
        text = f"{speed.median:.2f}" if speed.median < 10 else f"{speed.median:.1f}"
    bounds = sorted(run.ceiling[1] for run in case.good if run.ceiling)
    if bounds:
        x = _LEFT + bounds[len(bounds) // 2] * scale
        yield Stroke(x, y - _ROW / 2 + 2, x, y + _ROW / 2 - 2, _CEILING, 2)
        # The label stands behind what it belongs to, unless the line would go through it.
        if -8 < x - _LEFT - furthest * scale < _LABEL_WIDTH:
            furthest = max(furthest, bounds[len(bounds) // 2])
    yield Words(_LEFT + furthest * scale + 8, y + 4, text, 12)
