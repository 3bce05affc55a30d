"""Draws ``results/scaling.json``: time and memory over bytes, tensors, workers and budgets, as one SVG.

``python benchmarks/scaling_plot.py`` writes ``docs/pictures/scaling.svg``. One column a section; above the time or the
throughput, below the peak of anonymous memory beside the tensors. It knows nothing of how the figures were taken.
"""

from __future__ import annotations

import dataclasses
import html
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from plot_command import plot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Case = Mapping[str, Any]

ROOT: Final = Path(__file__).resolve().parent
RESULTS: Final = ROOT / "results" / "scaling.json"
PICTURE: Final = ROOT.parent / "docs" / "pictures" / "scaling.svg"

WIDTH: Final = 1000
HEIGHT: Final = 560
GUTTER: Final = 48
RIGHT: Final = 14
UPPER: Final = (164, 152)
LOWER: Final = (371, 140)
"""Top and height of either row of panels."""

MIB: Final = 1 << 20
BUDGET_MIB: Final = 128
MEMORY_MIB: Final = (1.0, 1024.0)
TICK_PIXELS: Final = 27
PARTS_OF_A_DECADE: Final = ((1,), (1, 3), (1, 2, 5))

SPARSE: Final = "direct → null, sparse"
LINES: Final = {
    "direct → null": ("direct", "direct, read and discarded"),
    "direct → null, sparse": ("sparse", "the same, from a sparse file"),
    "direct → null, sparse, 4 workers": ("fixed", "sparse, always 4 workers"),
    "buffered → null": ("buffered", "buffered, read and discarded"),
    "auto → cpu": ("auto", "auto, into CPU memory"),
    "mmap → cpu": ("mmap", "mmap, pages touched"),
    "safetensors → cpu": ("stock", "safetensors, pages touched"),
}
"""Class and words of every line, by its series."""

STYLE: Final = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-size: 12px; }
text { fill: #5c606b; stroke: none; } .ground { fill: #ffffff; } .panel { fill: #f6f5f1; }
.title, .head { font-weight: 650; fill: #1c1d21; } .title { font-size: 13.5px; } .head { font-size: 17px; }
.grid { stroke: #e3e0d8; } .guide { stroke: #5c606b; stroke-dasharray: 2 3; stroke-width: 1.4; fill: none; }
.budget { stroke: #1c1d21; stroke-dasharray: 5 4; fill: none; }
.line { fill: none; stroke-width: 2; } .dot { stroke-width: 1.5; } .whisker { stroke-width: 1.2; }
.sparse .line, .fixed .line { stroke-dasharray: 4 3; } .sparse .dot, .fixed .dot { fill: #ffffff; }
.fixed { stroke: #a58a1c; fill: #a58a1c; }
.direct, .sparse { stroke: #d9652b; fill: #d9652b; } .buffered { stroke: #2f8f5b; fill: #2f8f5b; }
.auto { stroke: #2f6fb5; fill: #2f6fb5; } .mmap { stroke: #8a55b0; fill: #8a55b0; }
.stock { stroke: #777b85; fill: #777b85; }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa0ad; } .ground { fill: #0d1117; } .panel { fill: #1a1e26; } .title, .head { fill: #e9eaee; }
  .grid { stroke: #2b303a; } .guide { stroke: #b4b9c4; } .budget { stroke: #e9eaee; }
  .sparse .dot, .fixed .dot { fill: #0d1117; }
  .fixed { stroke: #d3b94a; fill: #d3b94a; }
  .direct, .sparse { stroke: #f07f45; fill: #f07f45; } .buffered { stroke: #58bd86; fill: #58bd86; }
  .auto { stroke: #69a7ea; fill: #69a7ea; } .mmap { stroke: #b98ade; fill: #b98ade; }
  .stock { stroke: #a0a5b0; fill: #a0a5b0; }
}
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """Values to pixels.

    Attributes:
        low: the value at ``start``.
        high: the value at ``end``.
        start: pixels.
        end: pixels.
        logarithmic: equal ratios take equal room.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = True

    def at(self, value: float) -> float:
        """The pixel of a value; one beyond an end lies on that end."""
        inside = min(max(value, self.low), self.high)
        low, high, here = (
            map(math.log, (self.low, self.high, inside)) if self.logarithmic else (self.low, self.high, inside)
        )
        return self.start + (self.end - self.start) * (here - low) / ((high - low) or 1.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One section's words and units.

    Attributes:
        title: heading.
        state: what the files are in before a load.
        speed: throughput stands above, not time.
        quantity: words for a value of the growing quantity.
        short: words for it below its tick.
        unit: what the short words count.
        held: what the memory below is of.
    """

    title: str
    state: str
    speed: bool
    quantity: Callable[[int], str]
    short: Callable[[int], str]
    unit: str
    held: str = "MiB beside the tensors, at most"


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """What a panel shows.

    Attributes:
        unit: its unit.
        read: the figure of a case with its spread, if it has one.
    """

    unit: str
    read: Callable[[Case], Mapping[str, float] | None]


def thousands(count: int) -> str:
    """``220k``."""
    return f"{count // 1000}k" if count >= 1000 else str(count)


def bytes_words(count: int) -> str:
    """Bytes as in case names."""
    return f"{count / 1e9:g} GB" if count >= 10**9 else f"{count / 1e6:g} MB"


COLUMNS: Final = {
    "bytes": Column(
        "Seconds over bytes", "cold", False, bytes_words, lambda count: f"{count / 1e9:g}", "GB in shards of one size"
    ),
    "tensors": Column(
        "Seconds over tensors",
        "warm",
        False,
        lambda count: f"{count:,} tensors",
        thousands,
        "tensors, same bytes",
        "MiB with Python's objects",
    ),
    "workers": Column(
        "GB/s over workers", "cold; buffered warm", True, lambda count: f"{count} workers", str, "reading threads"
    ),
    "budgets": Column(
        "GB/s over budget",
        "cold; buffered warm",
        True,
        lambda count: f"{count // MIB} MiB",
        lambda count: f"{count // MIB}",
        "MiB of host memory allowed",
    ),
}


def seconds(case: Case) -> Mapping[str, float] | None:
    """Time until everything was read, with its spread."""
    found: Mapping[str, float] | None = case.get("touched_seconds") or case.get("seconds")
    return found


def speed(case: Case) -> Mapping[str, float] | None:
    """Throughput with its spread."""
    return case.get("gigabytes_per_second")


def memory(case: Case) -> dict[str, float] | None:
    """Peak of anonymous memory beside the tensors in MiB, with its spread."""
    found = case.get("extra_anonymous_bytes")
    return {key: value / MIB for key, value in found.items()} if found else None


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Round values between two, as many as can be told apart."""
    ticks: list[float] = []
    for parts in PARTS_OF_A_DECADE:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [part * 10.0**decade for decade in decades for part in parts if low <= part * 10.0**decade <= high]
        if len(ticks) >= 3:
            break
    return ticks


def linear_ticks(high: float) -> list[float]:
    """Zero and round values up to one that is not beyond ``high``."""
    power = 10.0 ** math.floor(math.log10(high / 3))
    step = next(part * power for part in (1, 2, 5, 10) if high / (part * power) <= 5)
    return [step * number for number in range(int(high / step) + 1)]


def draw(results: Mapping[str, Any]) -> str:
    """The picture of what there is in results; a section that is absent leaves its column empty."""
    present = [results[name] for name in COLUMNS if name in results]
    words = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'role="img"><title>Time and memory of loads over bytes, tensors, workers and budgets</title>'
            f'<style>{STYLE}</style><rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>'
        ),
        f'<text class="head" x="{GUTTER}" y="28">How loads grow</text>',
        f'<text x="{GUTTER}" y="48">{html.escape(caption(present))}</text>',
        *legend(present),
    ]
    width = (WIDTH - RIGHT) / len(COLUMNS) - GUTTER
    for number, (name, column) in enumerate(COLUMNS.items()):
        left = GUTTER + number * (width + GUTTER)
        words.append(f'<text class="title" x="{left:.1f}" y="136">{column.title}</text>')
        words.append(f'<text x="{left:.1f}" y="152">{column.state}</text>')
        words.append(f'<text x="{left:.1f}" y="362">{column.held}</text>')
        if name in results:
            words += panels(name, column, results[name]["cases"], left, left + width)
    return "\n".join([*words, "</svg>\n"])


def caption(present: Sequence[Mapping[str, Any]]) -> str:
    """Machine, date and rounds."""
    if not present:
        return "nothing was measured"
    taken = present[0]["taken"]
    if taken.get("quick"):
        return "a smoke run: these figures mean nothing"
    memory_bytes = (taken["memory_bytes"] or 0) / 1e9
    count = taken["rounds"]
    runs = f"medians of {count} runs, bars from the least to the most" if count > 1 else "one run each"
    where = "a disk made of memory" if taken["storage"]["loop_over"] == "tmpfs" else taken["storage"]["file_system"]
    return (
        f"{taken['processor']}, {taken['usable_processors']} processors, {memory_bytes:.0f} GB, {where}; "
        f"{runs}; {taken['date'][:10]}"
    )


def legend(present: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every line that is drawn."""
    drawn = {case["series"] for section in present for case in section["cases"]}
    entries = [(f'<g class="{kind}">', words) for series, (kind, words) in LINES.items() if series in drawn]
    entries += [("budget", "the budget"), ("guide", "in proportion to bytes")]
    for number, (kind, words) in enumerate(entries):
        x, y = GUTTER + 310 * (number % 3), 70 + 18 * (number // 3)
        if kind.startswith("<"):
            yield f'{kind}<path class="line" d="M{x} {y}h24"/><circle class="dot" cx="{x + 12}" cy="{y}" r="3.5"/></g>'
        else:
            yield f'<path class="{kind}" d="M{x} {y}h24"/>'
        yield f'<text x="{x + 32}" y="{y + 4}">{words}</text>'


def panels(name: str, column: Column, cases: Sequence[Case], left: float, right: float) -> Iterator[str]:
    """Both panels of a section."""
    drawn = [case for case in cases if case["series"] in LINES]
    quantities = sorted({case["x"] for case in drawn})
    across = Axis(quantities[0], quantities[-1], left + 10, right - 10)
    figure = Figure("GB/s", speed) if column.speed else Figure("s", seconds)
    known = [found for case in drawn if (found := figure.read(case))]
    top, height = UPPER
    if not known:
        return
    most, least = max(found["max"] for found in known), min(found["min"] for found in known)
    guide: Sequence[tuple[int, float]] = ()
    if column.speed:
        upper = Axis(0.0, most * 1.05, top + height - 4, top + 6, logarithmic=False)
        ticks = linear_ticks(most * 1.05)
    else:
        guide = proportion(drawn)
        most = max([most, *(y for _, y in guide)])
        upper = Axis(least / 1.25, most * 1.25, top + height - 4, top + 6)
        ticks = logarithmic_ticks(upper.low, upper.high)
    yield from frame(left, right, UPPER, upper, ticks)
    if guide:
        yield f'<path class="guide" d="M{"L".join(f"{across.at(x):.1f} {upper.at(y):.1f}" for x, y in guide)}"/>'
    yield from lines(column, drawn, figure, across, upper)
    yield from below(column, quantities, across, top + height + 16)
    low_top, low_height = LOWER
    lower = Axis(*MEMORY_MIB, low_top + low_height - 6, low_top + 6)
    yield from frame(left, right, LOWER, lower, (1, 8, 64, 512))
    if name != "tensors":
        yield budget(name, quantities, across, lower)
    yield from lines(column, drawn, Figure("MiB", memory), across, lower)
    yield from below(column, quantities, across, low_top + low_height + 16)
    yield f'<text x="{left:.1f}" y="{low_top + low_height + 34}">{column.unit}</text>'


def frame(left: float, right: float, row: tuple[int, int], axis: Axis, ticks: Sequence[float]) -> Iterator[str]:
    """A panel's ground, grid and labels."""
    top, height = row
    yield f'<rect class="panel" x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{height}" rx="3"/>'
    for value in ticks:
        y = axis.at(value)
        yield f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>'
        yield f'<text x="{left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'


def proportion(cases: Sequence[Case]) -> Sequence[tuple[int, float]]:
    """What time in proportion to bytes would be, from the smallest sparse file to the largest; nothing without them."""
    known = sorted(
        (case for case in cases if case["series"] == SPARSE and seconds(case)), key=lambda case: int(case["x"])
    )
    if len(known) < 2:
        return ()
    first, last = known[0]["x"], known[-1]["x"]
    begin = float(known[0]["seconds"]["median"])
    return ((first, begin), (last, begin * last / first))


def budget(name: str, quantities: Sequence[int], across: Axis, axis: Axis) -> str:
    """The memory that a load was allowed."""
    ends = (quantities[0], quantities[-1])
    allowed = [x / MIB if name == "budgets" else BUDGET_MIB for x in ends]
    points = (f"{across.at(x):.1f} {axis.at(y):.1f}" for x, y in zip(ends, allowed, strict=True))
    return f'<path class="budget" d="M{"L".join(points)}"/>'


def lines(
    column: Column,
    cases: Sequence[Case],
    figure: Figure,
    across: Axis,
    axis: Axis,
) -> Iterator[str]:
    """Every series as a line with its points and their spread."""
    for series, (kind, words) in LINES.items():
        mine = sorted((case for case in cases if case["series"] == series), key=lambda case: float(case["x"]))
        known = [(case, found) for case in mine if (found := figure.read(case))]
        if not known:
            continue
        path = "L".join(f"{across.at(case['x']):.1f} {axis.at(found['median']):.1f}" for case, found in known)
        yield f'<g class="{kind}"><path class="line" d="M{path}"/>'
        for case, found in known:
            x, y = across.at(case["x"]), axis.at(found["median"])
            least, most = axis.at(found["min"]), axis.at(found["max"])
            title = f"{words}, {column.quantity(case['x'])}: {found['median']:.3g} {figure.unit}"
            yield f'<path class="whisker" d="M{x:.1f} {least:.1f}V{most:.1f}"/>'
            yield f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{html.escape(title)}</title></circle>'
        yield "</g>"


def below(column: Column, quantities: Sequence[int], across: Axis, y: float) -> Iterator[str]:
    """Labels of the growing quantity, those left out that would touch the next; the last one is always there."""
    after = math.inf
    for quantity in reversed(quantities):
        x = across.at(quantity)
        if after - x >= TICK_PIXELS:
            after = x
            yield f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{column.short(quantity)}</text>'


def main() -> None:
    """The command line."""
    plot((__doc__ or "").splitlines()[0], "scaling.py", RESULTS, PICTURE, draw)


if __name__ == "__main__":
    main()
