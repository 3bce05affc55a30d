"""Which charts a load's page shows, and what is in them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from weightlift.reports.charts import HALF_WIDTH, WIDTH, Band, Event, Mark, Series, legend, line_chart, share_bar
from weightlift.reports.load import seconds_text, speed_text
from weightlift.units import GIB, KIB, MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightlift.samples import Sample
    from weightlift.types import LoadReport

_SPEED_POINTS_MAX: Final = 80
_WORK_COLOURS: Final = {
    "storage": "blue",
    "page cache": "teal",
    "preparing memory": "gold",
    "copying": "violet",
    "device": "amber",
    "pinning": "sage",
    "waiting for a slot": "grey",
}
_PHASE_COLOURS: Final = {"open": "violet", "plan": "gold", "read": "blue", "finish": "sage"}
_COVERED: Final = 0.8


def charts(report: LoadReport) -> Iterator[str]:
    """The sections with charts; one that says why there is none where nothing was sampled."""
    if not report.samples:
        yield "<section><h2>Over time</h2><p>The load was over before memory was looked at.</p></section>\n"
        return
    yield _speed(report)
    yield _own_memory(report)
    yield _machine(report)
    yield _pressure(report)
    if any(sample.device_bytes is not None for sample in report.samples):
        yield _device(report)
    yield _in_flight(report)


def phase_bar(report: LoadReport) -> str:
    """Wall time by phase; what is in none of them is the making of tensors and, in streams, the program's own time."""
    known = [(name, _PHASE_COLOURS.get(name, "teal"), seconds) for name, seconds in report.phases.items()]
    rest = max(0.0, report.seconds - sum(report.phases.values()))
    if report.consumer_seconds:
        known.append(("the program's", "amber", report.consumer_seconds))
        rest = max(0.0, rest - report.consumer_seconds)
    return share_bar(
        [*known, ("reading for the program" if report.consumer_seconds else "tensors", "teal", rest)], seconds_text
    )


def work_bar(report: LoadReport) -> str:
    """The workers' time by what they did."""
    return share_bar(
        [(name, _WORK_COLOURS.get(name, "grey"), seconds) for name, seconds in report.worker_seconds.items()],
        seconds_text,
    )


def _section(
    title: str,
    explained: str,
    report: LoadReport,
    moments: Sequence[float],
    series: Sequence[Series],
    *,
    text: Callable[[float], str],
    binary: bool = False,
    least_top: float = 1.0,
    marks: Sequence[Mark] = (),
    bands: Sequence[Band] = (),
    width: int = WIDTH,
    height: int = 170,
) -> str:
    drawing = line_chart(
        title,
        moments,
        series,
        end=report.seconds,
        text=text,
        binary=binary,
        least_top=least_top,
        marks=marks,
        bands=bands,
        width=width,
        events=[Event(f"{entry.action}: {entry.reason}", entry.seconds) for entry in report.interventions],
        height=height,
    )
    return f"<section><h2>{title}</h2><p>{explained}</p>{legend(series, text)}{drawing}</section>\n"


def _bytes_text(value: float) -> str:
    if value == 0:
        return "0"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def _moments(report: LoadReport) -> list[float]:
    return [0.0, *(sample.seconds for sample in report.samples)]


def _growth(report: LoadReport, label: str, colour: str, field: str, *, area: bool = False) -> Series:
    """A line of growth, which begins at nothing; memory that shrank is shown as none."""
    values = [getattr(sample, field) for sample in report.samples]
    first = 0 if any(value is not None for value in values) else None
    return Series(label, colour, [first, *(None if value is None else max(0, value) for value in values)], area)


def stepped(moments: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Values that held since the moment before, as the corners of steps; the first one holds since 0."""
    corners = [0.0, *(moment for moment in moments for _ in range(2))]
    return corners[:-1], [value for value in values for _ in range(2)]


def speeds(samples: Sequence[Sample]) -> list[tuple[float, float, float]]:
    """Seconds, and GB/s read and landed since the point before, in as many points as are readable."""
    every = -(-len(samples) // _SPEED_POINTS_MAX)
    points = [(0.0, 0, 0), *((s.seconds, s.read_bytes, s.landed_bytes) for s in samples[every - 1 :: every])]
    return [
        (now[0], (now[1] - before[1]) / (now[0] - before[0]) / 1e9, (now[2] - before[2]) / (now[0] - before[0]) / 1e9)
        for before, now in pairwise(points)
        if now[0] > before[0]
    ]


def _speed(report: LoadReport) -> str:
    points = speeds(report.samples)
    seconds = [point[0] for point in points]
    moments, landed = stepped(seconds, [point[2] for point in points])
    _, read = stepped(seconds, [point[1] for point in points])
    series = [Series("arrived", "blue", landed, area=True)]
    if any(abs(left - right) > 0.01 * max(left, 0.01) for left, right in zip(read, landed, strict=True)):
        series.insert(0, Series("read from storage", "teal", read))
    marks = [
        Mark(f"ceiling of the {name.replace('_', ' ')}, {speed_text(value)}", value)
        for name, value in report.ceilings.items()
        if value
    ]
    explained = "Gigabytes a second, over time."
    if not marks:
        explained += " What storage, memory and link can do at most was not probed."
    return _section(
        "Speed",
        explained,
        report,
        moments,
        series,
        text=speed_text_short,
        least_top=0.01,
        marks=marks,
        bands=_phases(report),
        height=220,
    )


def _phases(report: LoadReport) -> list[Band]:
    """The phases, one behind the other; none where they do not make up the load, as in streams."""
    if sum(report.phases.values()) < _COVERED * report.seconds:
        return []
    bands, begin = [], 0.0
    for name, seconds in report.phases.items():
        bands.append(Band(name, begin, begin + seconds))
        begin += seconds
    return bands


def speed_text_short(value: float) -> str:
    """A speed for an axis."""
    return "0" if value == 0 else f"{value:.3g} GB/s"


def _own_memory(report: LoadReport) -> str:
    budget = report.host_memory.budget_bytes
    series = [
        _growth(report, "anonymous", "amber", "anonymous_bytes", area=True),
        _growth(report, "file-backed", "teal", "file_bytes"),
        _growth(report, "shared", "violet", "shared_bytes"),
    ]
    if any(sample.pinned_bytes for sample in report.samples):
        series.append(_growth(report, "pinned", "gold", "pinned_bytes"))
    return _section(
        "Memory of the process, beyond the tensors",
        f"Anonymous memory is what only swap can take back, and what the budget of {format_bytes(budget)} bounds; "
        "pages of mapped files are dropped when somebody needs the room.",
        report,
        _moments(report),
        series,
        text=_bytes_text,
        binary=True,
        least_top=MIB,
        marks=[Mark(f"budget, {format_bytes(budget)}", budget)],
        height=150,
    )


def _machine(report: LoadReport) -> str:
    left = [sample.available_bytes for sample in report.samples]
    floor = report.floor_bytes
    rest = _section(
        "Left for other programs",
        "Memory that can be had before somebody has to give something up, as the machine or the control group sees it.",
        report,
        _moments(report),
        [Series("left", "green", [left[0], *left], area=True)],
        text=_bytes_text,
        binary=True,
        least_top=MIB,
        marks=[] if floor is None else [Mark(f"floor, {format_bytes(floor)}", floor)],
        width=HALF_WIDTH,
    )
    taken = _section(
        "Taken by the load",
        "What the tensors hold in host memory, and by how much the page cache grew, whoever made it grow.",
        report,
        _moments(report),
        [
            _growth(report, "tensors", "blue", "tensor_bytes", area=True),
            _growth(report, "page cache", "sage", "page_cache_bytes", area=True),
        ],
        text=_bytes_text,
        binary=True,
        least_top=MIB,
        width=HALF_WIDTH,
    )
    return f'<div class="two">{rest}{taken}</div>'


def _pressure(report: LoadReport) -> str:
    swapped = _section(
        "Swap",
        "By the whole machine, since the start.",
        report,
        _moments(report),
        [
            _growth(report, "swapped out", "red", "swap_out_bytes", area=True),
            _growth(report, "swapped in", "amber", "swap_in_bytes"),
        ],
        text=_bytes_text,
        binary=True,
        least_top=MIB,
        width=HALF_WIDTH,
        height=130,
    )
    stalls = [Series("in the machine", "red", _stalled(report.samples, "machine_stall_seconds"), area=True)]
    group = _stalled(report.samples, "group_stall_seconds")
    if group != stalls[0].values:
        stalls.append(Series("in this control group", "amber", group))
    pressure = _section(
        "Pressure",
        "Share of the time in which some program waited for memory.",
        report,
        _moments(report),
        stalls,
        text=lambda value: f"{value:.3g} %",
        width=HALF_WIDTH,
        height=130,
    )
    return f'<div class="two">{swapped}{pressure}</div>'


def _stalled(samples: Sequence[Sample], field: str) -> list[float | None]:
    """Percent of the time since the sample before; the counters are looked at now and then, so it is smoothed."""
    values: list[float | None] = [None if getattr(samples[0], field) is None else 0.0]
    last_seconds = last_stall = share = 0.0
    for sample in samples:
        stall = getattr(sample, field)
        if stall is None:
            values.append(None)
            continue
        if stall != last_stall or sample.seconds - last_seconds > 4 * _spacing(samples):
            share = min(100.0, 100.0 * (stall - last_stall) / max(sample.seconds - last_seconds, 1e-9))
            last_seconds, last_stall = sample.seconds, stall
        values.append(share)
    return values


def _spacing(samples: Sequence[Sample]) -> float:
    return samples[-1].seconds / len(samples)


def _device(report: LoadReport) -> str:
    return _section(
        "Memory of the devices",
        "Growth over the start, of all devices of the load together, whoever uses it.",
        report,
        _moments(report),
        [_growth(report, "in use", "violet", "device_bytes", area=True)],
        text=_bytes_text,
        binary=True,
        least_top=MIB,
    )


def _in_flight(report: LoadReport) -> str:
    moments, values = stepped(
        [sample.seconds for sample in report.samples],
        [float(sample.workers * sample.chunk_bytes) for sample in report.samples],
    )
    return _section(
        "In flight at most",
        "Workers times the size of a chunk: found by trying while the load runs, and cut back when memory gets short.",
        report,
        moments,
        [Series("workers × chunk", "gold", values, area=True)],
        text=_bytes_text,
        binary=True,
        least_top=MIB,
        height=120,
    )
