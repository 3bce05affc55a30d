"""Charts as inline SVG: numbers in, text out. No script; what a chart says at a moment appears when it is pointed at.

Colours are classes that the page's style sheet gives a value in light and in dark.
"""

from __future__ import annotations

import math
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WIDTH: Final = 1000
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 14, 12, 26
_PLOT: Final = WIDTH - _LEFT - _RIGHT
_COLUMNS_MAX: Final = 120
_READOUT_WIDTH: Final = 8.2
"""Width of a character of a readout; a little too much rather than too little."""


class Series(NamedTuple):
    """One line of a chart.

    Attributes:
        label: its name.
        colour: the class that colours it.
        values: one per moment; ``None`` where unknown.
        area: fill what is under it.
    """

    label: str
    colour: str
    values: Sequence[float | None]
    area: bool = False

    @property
    def peak(self) -> float | None:
        """The highest value known."""
        return max((value for value in self.values if value is not None), default=None)


class Mark(NamedTuple):
    """A level that the values are to be compared with."""

    label: str
    value: float


class Event(NamedTuple):
    """Something that happened at a moment."""

    label: str
    seconds: float


def line_chart(
    title: str,
    moments: Sequence[float],
    series: Sequence[Series],
    *,
    end: float,
    text: Callable[[float], str],
    binary: bool = False,
    least_top: float = 1.0,
    marks: Sequence[Mark] = (),
    events: Sequence[Event] = (),
    height: int = 170,
) -> str:
    """Lines over time.

    Args:
        title: what a screen reader says first.
        moments: seconds, by rising time.
        series: the lines, each with a value per moment.
        end: where the axis of time ends.
        text: a value in words.
        binary: ticks are multiples of powers of two instead of ten.
        least_top: the value axis reaches at least this far.
        marks: levels.
        events: vertical lines.
        height: of the drawing, which is 1000 wide.
    """
    end = max(end, moments[-1] if moments else 0.0, 1e-9)
    highest = max([least_top, *(line.peak or 0.0 for line in series), *(mark.value for mark in marks)])
    step = tick_step(highest / 4, binary=binary)
    top = step * math.ceil(highest * 1.02 / step)
    floor = height - _BOTTOM

    def at_x(seconds: float) -> float:
        return _LEFT + _PLOT * min(max(seconds / end, 0.0), 1.0)

    def at_y(value: float) -> float:
        return floor - (floor - _TOP) * min(max(value / top, 0.0), 1.0)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    parts += _value_axis(step, top, at_y, text)
    parts += _time_axis(end, at_x, floor)
    for line in series:
        parts += _paths(line, moments, at_x, at_y, floor)
    parts += (_level(mark, at_y) for mark in marks)
    for event in events:
        x = at_x(event.seconds)
        parts.append(f'<path class="event" d="M{x:.1f} {_TOP}V{floor}"><title>{escape(event.label)}</title></path>')
    parts += _readouts(moments, series, at_x, floor, text)
    parts.append("</svg>")
    return "".join(parts)


def tick_step(wanted: float, *, binary: bool) -> float:
    """The nearest larger step that reads well: 1, 2 or 5 times a power of ten, or a power of two."""
    if binary:
        return float(2 ** math.ceil(math.log2(wanted)))
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted * (1 - 1e-9))


def _value_axis(step: float, top: float, at_y: Callable[[float], float], text: Callable[[float], str]) -> Iterator[str]:
    for index in range(round(top / step) + 1):
        y = at_y(index * step)
        yield f'<path class="{"axis" if index == 0 else "grid"}" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text(index * step))}</text>'


def _time_axis(end: float, at_x: Callable[[float], float], floor: float) -> Iterator[str]:
    step = tick_step(end / 8, binary=False)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    for index in range(int(end / step + 1e-9) + 1):
        x = at_x(index * step)
        anchor = "end" if x > WIDTH - _RIGHT - 20 else "middle"
        yield f'<path class="axis" d="M{x:.1f} {floor}v4"/>'
        yield (
            f'<text class="tick" x="{x:.1f}" y="{floor + 18}" text-anchor="{anchor}">{index * step:.{digits}f} s</text>'
        )


def _paths(
    line: Series, moments: Sequence[float], at_x: Callable[[float], float], at_y: Callable[[float], float], floor: float
) -> Iterator[str]:
    for run in _runs(line, moments):
        points = " ".join(f"{at_x(seconds):.1f} {at_y(value):.1f}" for seconds, value in run)
        if line.area:
            first, last = at_x(run[0][0]), at_x(run[-1][0])
            yield f'<path class="area {line.colour}" d="M{first:.1f} {floor}L{points}L{last:.1f} {floor}Z"/>'
        yield f'<path class="line {line.colour}" d="M{points}"/>'


def _runs(line: Series, moments: Sequence[float]) -> Iterator[list[tuple[float, float]]]:
    """The stretches in which the value is known."""
    run: list[tuple[float, float]] = []
    for seconds, value in zip(moments, line.values, strict=True):
        if value is not None:
            run.append((seconds, value))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _level(mark: Mark, at_y: Callable[[float], float]) -> str:
    y = at_y(mark.value)
    below = y < _TOP + 16
    return (
        f'<path class="mark" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
        f'<text class="marked" x="{WIDTH - _RIGHT - 4}" y="{y + 14 if below else y - 5:.1f}" text-anchor="end">'
        f"{escape(mark.label)}</text>"
    )


def _readouts(
    moments: Sequence[float],
    series: Sequence[Series],
    at_x: Callable[[float], float],
    floor: float,
    text: Callable[[float], str],
) -> Iterator[str]:
    """Columns that show their moment's values while they are pointed at."""
    every = max(1, -(-len(moments) // _COLUMNS_MAX))
    chosen = range(0, len(moments), every)
    middles = [at_x(moments[index]) for index in chosen]
    borders = [float(_LEFT), *((left + right) / 2 for left, right in pairwise(middles)), float(WIDTH - _RIGHT)]
    for index, middle, (left, right) in zip(chosen, middles, pairwise(borders), strict=True):
        known = ((line.label, line.values[index]) for line in series)
        values = (f"{label} {text(value)}" for label, value in known if value is not None)
        words = " · ".join((f"{moments[index]:.2f} s", *values))
        width = len(words) * _READOUT_WIDTH + 16
        start = min(max(middle - width / 2, _LEFT), WIDTH - _RIGHT - width)
        yield (
            f'<g class="at"><rect class="hit" x="{left:.1f}" y="0" width="{max(right - left, 0.1):.1f}" '
            f'height="{floor:.0f}"/><g class="readout"><path d="M{middle:.1f} {_TOP}V{floor:.0f}"/>'
            f'<rect x="{start:.1f}" y="0" width="{width:.0f}" height="22" rx="4"/>'
            f'<text x="{start + 8:.1f}" y="15.5">{escape(words)}</text></g></g>'
        )


def share_bar(parts: Sequence[tuple[str, str, float]], text: Callable[[float], str]) -> str:
    """What a whole is made of, as one bar with its legend.

    Args:
        parts: label, colour class and value of each; those of nothing are left out.
        text: a value in words.
    """
    shown = [part for part in parts if part[2] > 0]
    total = sum(value for *_, value in shown)
    if not total:
        return '<p class="quiet">nothing was measured</p>'
    bar = "".join(
        f'<span class="{colour}" style="flex-grow:{max(value / total * 1000, 2):.0f}" '
        f'title="{escape(f"{label}: {text(value)}")}"></span>'
        for label, colour, value in shown
    )
    entries = "".join(
        f'<li><i class="{colour}"></i>{escape(label)} <b>{escape(text(value))}</b> '
        f'<span class="quiet">{value / total:.0%}</span></li>'
        for label, colour, value in shown
    )
    return f'<div class="bar">{bar}</div><ul class="legend">{entries}</ul>'


def legend(series: Sequence[Series], text: Callable[[float], str]) -> str:
    """The names and peaks of some lines."""
    entries = "".join(
        f'<li><i class="{line.colour}"></i>{escape(line.label)} '
        f'<span class="quiet">peak</span> <b>{escape(text(line.peak))}</b></li>'
        for line in series
        if line.peak is not None
    )
    return f'<ul class="legend">{entries}</ul>'
