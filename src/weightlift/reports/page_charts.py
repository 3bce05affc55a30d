"""Which charts a load's page shows, and what is in them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from weightlift.reports.charts import Event, Mark, Series, legend, line_chart, share_bar
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
_START: Final = "start"


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
    series = [Series("arrived", "blue", [landed for *_, landed in points], area=True)]
    if any(abs(read - landed) > 0.01 * max(landed, 0.01) for _, read, landed in points):
        series.insert(0, Series("read from storage", "teal", [read for _, read, _ in points]))
    marks = [
        Mark(f"ceiling of the {name.replace('_', ' ')}, {speed_text(value)}", value)
        for name, value in report.ceilings.items()
        if value
    ]
    explained = "Gigabytes a second, over time."
    if not marks:
        explained += " What storage, memory and link could do at most is not known: nobody probed them."
    moments = [seconds for seconds, *_ in points]
    return _section(
        "Speed", explained, report, moments, series, text=speed_text_short, least_top=0.01, marks=marks, height=220
    )


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
        "Anonymous memory is what only swap can take back, and what the budget bounds; pages of mapped files are dropped "
        "when somebody needs the room.",
        report,
        _moments(report),
        series,
        text=_bytes_text,
        binary=True,
        least_top=MIB,
        marks=[Mark(f"budget, {format_bytes(budget)}", budget)],
    )


def _machine(report: LoadReport) -> str:
    left = [sample.available_bytes for sample in report.samples]
    series = [
        Series("left for programs", "green", [left[0], *left]),
        _growth(report, "in tensors", "blue", "tensor_bytes", area=True),
        _growth(report, "page cache, growth", "sage", "page_cache_bytes", area=True),
    ]
    floor = report.floor_bytes
    return _section(
        "Memory of the machine",
        "What is left before somebody has to give something up, as the machine or the control group sees it, what the "
        "tensors took, and by how much the page cache grew.",
        report,
        _moments(report),
        series,
        text=_bytes_text,
        binary=True,
        least_top=MIB,
        marks=[] if floor is None else [Mark(f"floor, {format_bytes(floor)}", floor)],
    )


def _pressure(report: LoadReport) -> str:
    swap = [
        _growth(report, "swapped out", "red", "swap_out_bytes"),
        _growth(report, "swapped in", "amber", "swap_in_bytes"),
    ]
    stalls = [
        Series("some program of the machine", "red", _stalled(report.samples, "machine_stall_seconds"), area=True),
        Series("of this control group", "amber", _stalled(report.samples, "group_stall_seconds")),
    ]
    swapped = _section(
        "Swap", "By the whole machine, since the start.", report, _moments(report), swap,
        text=_bytes_text, binary=True, least_top=MIB,
    )  # fmt: skip
    pressure = _section(
        "Pressure",
        "Share of the time in which programs waited for memory.",
        report,
        _moments(report),
        stalls,
        text=lambda value: f"{value:.3g} %",
        least_top=1.0,
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
    values = [float(sample.workers * sample.chunk_bytes) for sample in report.samples]
    return _section(
        "In flight at most",
        "Workers times the size of a chunk: found by trying while the load runs, and cut back when memory gets short.",
        report,
        _moments(report),
        [Series("workers × chunk", "gold", [values[0], *values], area=True)],
        text=_bytes_text,
        binary=True,
        least_top=MIB,
        height=120,
    )
