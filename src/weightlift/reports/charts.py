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
HALF_WIDTH: Final = 480
"""Widths of a drawing that spans the page, and of one of two beside each other: letters are as large in both."""
_COLUMNS_MAX: Final = 120
_TICK_WIDTH: Final = 110
_MARK_AT_MOST: Final = 4
_READOUT_WIDTH: Final = 6.6
"""Width of a character of a readout; a little too much for most letters."""


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


class Band(NamedTuple):
    """A stretch of time with a name."""

    label: str
    begin: float
    end: float


class Frame(NamedTuple):
    """Where a chart draws: seconds and values in, coordinates out.

    Attributes:
        width: of the drawing.
        height: of the drawing.
        end: where the axis of time ends.
        top: where the axis of values ends.
    """

    width: int
    height: int
    end: float
    top: float

    @property
    def right(self) -> int:
        """The right end of the plot."""
        return self.width - _RIGHT

    @property
    def floor(self) -> int:
        """The lower end of the plot."""
        return self.height - _BOTTOM

    def x(self, seconds: float) -> float:
        """Where a moment is."""
        return _LEFT + (self.right - _LEFT) * min(max(seconds / self.end, 0.0), 1.0)

    def y(self, value: float) -> float:
        """Where a value is."""
        return self.floor - (self.floor - _TOP) * min(max(value / self.top, 0.0), 1.0)


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
    bands: Sequence[Band] = (),
    width: int = WIDTH,
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
        marks: levels; those far above all values are left out.
        events: vertical lines.
        bands: stretches of time with a name.
        width: of the drawing.
        height: of the drawing.
    """
    end = max(end, moments[-1] if moments else 0.0, 1e-9)
    highest = max([least_top, *(line.peak or 0.0 for line in series)])
    marks = [mark for mark in marks if mark.value <= _MARK_AT_MOST * highest]
    highest = max([highest, *(mark.value for mark in marks)])
    step = tick_step(highest / 4, binary=binary)
    frame = Frame(width, height, end, step * math.ceil(highest * 1.02 / step))
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts += (part for index, band in enumerate(bands) for part in _band(band, frame, shaded=index % 2 == 0))
    parts += _value_axis(step, frame, text)
    parts += _time_axis(frame)
    for line in series:
        parts += _paths(line, moments, frame)
    parts += (_level(mark, frame) for mark in marks)
    for event in events:
        x = frame.x(event.seconds)
        parts.append(
            f'<path class="event" d="M{x:.1f} {_TOP}V{frame.floor}"><title>{escape(event.label)}</title></path>'
        )
    parts += _readouts(moments, series, frame, text)
    parts.append("</svg>")
    return "".join(parts)


def tick_step(wanted: float, *, binary: bool) -> float:
    """The nearest larger step that reads well: 1, 2 or 5 times a power of ten, or a power of two."""
    if binary:
        return float(2 ** math.ceil(math.log2(wanted)))
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted * (1 - 1e-9))


def _band(band: Band, frame: Frame, *, shaded: bool) -> Iterator[str]:
    left, right = frame.x(band.begin), frame.x(band.end)
    if shaded:
        yield (
            f'<rect class="band" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{frame.floor - _TOP}"/>'
        )
    if right - left > _READOUT_WIDTH * len(band.label):
        yield f'<text class="banded" x="{left + 5:.1f}" y="{_TOP + 13}">{escape(band.label)}</text>'


def _value_axis(step: float, frame: Frame, text: Callable[[float], str]) -> Iterator[str]:
    for index in range(round(frame.top / step) + 1):
        y, words = frame.y(index * step), escape(text(index * step))
        yield f'<path class="{"axis" if index == 0 else "grid"}" d="M{_LEFT} {y:.1f}H{frame.right}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{words}</text>'


def _time_axis(frame: Frame) -> Iterator[str]:
    step = tick_step(frame.end * _TICK_WIDTH / frame.width, binary=False)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    for index in range(int(frame.end / step + 1e-9) + 1):
        x, y = frame.x(index * step), frame.floor
        anchor = "end" if x > frame.right - 20 else "middle"
        yield f'<path class="axis" d="M{x:.1f} {y}v4"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{y + 18}" text-anchor="{anchor}">{index * step:.{digits}f} s</text>'


def _paths(line: Series, moments: Sequence[float], frame: Frame) -> Iterator[str]:
    for run in _runs(line, moments):
        points = " ".join(f"{frame.x(seconds):.1f} {frame.y(value):.1f}" for seconds, value in run)
        if line.area:
            first, last, floor = frame.x(run[0][0]), frame.x(run[-1][0]), frame.floor
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


def _level(mark: Mark, frame: Frame) -> str:
    y = frame.y(mark.value)
    below = y < _TOP + 16
    return (
        f'<path class="mark" d="M{_LEFT} {y:.1f}H{frame.right}"/>'
        f'<text class="marked" x="{frame.right - 4}" y="{y + 14 if below else y - 5:.1f}" text-anchor="end">'
        f"{escape(mark.label)}</text>"
    )


def _readouts(
    moments: Sequence[float], series: Sequence[Series], frame: Frame, text: Callable[[float], str]
) -> Iterator[str]:
    """Columns that show their moment's values while they are pointed at."""
    every = max(1, -(-len(moments) // _COLUMNS_MAX))
    chosen = range(0, len(moments), every)
    middles = [frame.x(moments[index]) for index in chosen]
    borders = [float(_LEFT), *((left + right) / 2 for left, right in pairwise(middles)), float(frame.right)]
    for index, middle, (left, right) in zip(chosen, middles, pairwise(borders), strict=True):
        known = ((line.label, line.values[index]) for line in series)
        values = (f"{label} {text(value)}" for label, value in known if value is not None)
        words = " · ".join((f"{moments[index]:.2f} s", *values))
        width = len(words) * _READOUT_WIDTH + 16
        start = max(min(middle - width / 2, frame.right - width), 0)
        yield (
            f'<g class="at"><rect class="hit" x="{left:.1f}" y="0" width="{max(right - left, 0.1):.1f}" '
            f'height="{frame.floor}"/><g class="readout"><path d="M{middle:.1f} {_TOP}V{frame.floor}"/>'
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
