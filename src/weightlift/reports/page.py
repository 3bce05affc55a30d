"""A load's report as one page for a browser: a single file, no script, nothing loaded from elsewhere.

Takes the finished record and asks nothing else. Whatever comes from a checkpoint or the file system is escaped.
"""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Final

from weightlift._version import __version__
from weightlift.errors import printable
from weightlift.reports.console import counted
from weightlift.reports.load import seconds_text, size_text, speed_text
from weightlift.reports.page_charts import charts, phase_bar, work_bar
from weightlift.units import format_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from weightlift.types import LoadReport

_FILES_MAX: Final = 200
_NAME_CHARACTERS: Final = 300
_STALL_SECONDS: Final = 0.01

_HEAD: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
"""


def report_page(report: LoadReport, path: str | os.PathLike[str]) -> Iterator[str]:
    """The page, piece by piece.

    Args:
        report: the report of the load.
        path: what was loaded, as the user named it.
    """
    name = _safe(str(path).rstrip("/").rpartition("/")[2] or str(path))
    style = resources.files("weightlift.reports").joinpath("page.css").read_text(encoding="utf-8")
    yield _HEAD.format(title=f"{name} · weightlift", style=style)
    yield f'<header><p class="over">weightlift · report of a load</p><h1>{name}</h1>'
    yield f"<p>{_summary(report, path)}</p></header>\n"
    yield _tiles(report)
    yield _verdict(report)
    yield from charts(report)
    yield _time(report)
    yield _choices(report)
    yield _budget(report)
    yield _files(report)
    yield (
        f"<footer><p>Written by weightlift {escape(__version__)}. Byte counts of memory are growth over the start of "
        "the load. This page is one file: it runs no script and loads nothing from anywhere.</p></footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _safe(text: object, limit: int = _NAME_CHARACTERS) -> str:
    return escape(printable(str(text), limit))


def _summary(report: LoadReport, path: str | os.PathLike[str]) -> str:
    where = "read and discarded" if report.device == "null" else f"onto {_safe(report.device)}"
    files = counted(len(report.files), "file")
    return f"{counted(report.tensors, 'tensor')}, {format_bytes(report.nbytes)} in {files}, {where} · {_safe(path)}"


def _tiles(report: LoadReport) -> str:
    memory = report.host_memory
    peak, budget = memory.peak_anonymous_bytes, memory.budget_bytes
    share = min((peak or 0) / budget, 1.0)
    meter = "" if peak is None else f'<span class="meter"><i style="width:{share:.1%}"></i></span>'
    tiles = (
        ("speed", speed_text(report.gigabytes_per_second), _ceilings(report)),
        ("time", seconds_text(report.seconds), f"{escape(report.engine)} engine, {counted(report.workers, 'worker')}"),
        ("held up by", escape(report.bottleneck), _HELD_UP.get(report.bottleneck, "")),
        (
            "memory beyond the tensors",
            "unknown" if peak is None else format_bytes(peak),
            f"at peak, of a budget of {format_bytes(budget)}{meter}",
        ),
        ("left in the page cache", size_text(report.page_cache_after_bytes), _cache_before(report)),
    )
    cells = (f"<div><dt>{label}</dt><dd>{value}<small>{note}</small></dd></div>" for label, value, note in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>\n'


_HELD_UP: Final = {
    "storage": "reading the drive took the longest",
    "memory copy": "copying in host memory took the longest",
    "link": "the copies to the device took the longest",
    "processor": "converting and hashing took the longest",
    "consumer": "the program took longer with its tensors than the load",
    "none": "nothing had to be read",
}


def _ceilings(report: LoadReport) -> str:
    reached = [
        f"{report.gigabytes_per_second / ceiling:.0%} of the {escape(name.replace('_', ' '))}'s {speed_text(ceiling)}"
        for name, ceiling in report.ceilings.items()
        if ceiling
    ]
    return "<br>".join(reached) or "ceilings not probed"


def _cache_before(report: LoadReport) -> str:
    before = report.page_cache_before_bytes
    return "what it held before is unknown" if before is None else f"of the files; {format_bytes(before)} before"


def _verdict(report: LoadReport) -> str:
    troubles = list(_troubles(report))
    if not troubles and not report.interventions:
        lowest = min((s.available_bytes for s in report.samples if s.available_bytes is not None), default=None)
        left = "" if lowest is None else f" At the lowest, {format_bytes(lowest)} of memory were left to others."
        unknown = report.swap_out_bytes is None or report.pressure_stall_seconds is None
        calm = (
            "No trouble was seen; this system does not tell all."
            if unknown
            else "Nothing was swapped, nothing stalled."
        )
        return f'<div class="verdict"><p><b>The machine stayed healthy.</b> {calm}{left}</p></div>\n'
    done = "".join(
        f"<li>at {entry.seconds:.2f} s: {escape(entry.action)} – {escape(entry.reason)}</li>"
        for entry in report.interventions
    )
    steps = f"<p>What the load did about it:</p><ol>{done}</ol>" if done else ""
    return f'<div class="verdict bad"><p><b>Memory got short.</b> {escape("; ".join(troubles))}</p>{steps}</div>\n'


def _troubles(report: LoadReport) -> Iterator[str]:
    if report.swap_out_bytes:
        yield f"the machine swapped {format_bytes(report.swap_out_bytes)} out"
    if report.swap_in_bytes:
        yield f"the machine swapped {format_bytes(report.swap_in_bytes)} in"
    if (report.pressure_stall_seconds or 0.0) >= _STALL_SECONDS:
        yield f"programs waited {seconds_text(report.pressure_stall_seconds or 0.0)} for memory"


def _time(report: LoadReport) -> str:
    return (
        '<div class="two"><section><h2>Where the time went</h2><p>Wall time of the load by phase.</p>'
        f"{phase_bar(report)}</section><section><h2>What the workers did</h2><p>Time summed over all workers.</p>"
        f"{work_bar(report)}</section></div>\n"
    )


def _choices(report: LoadReport) -> str:
    used = {name: size for name, size in report.method_used.items() if size}
    paths = ", ".join(f"{name} {format_bytes(size)}" if len(used) > 1 else name for name, size in used.items())
    floor = "unknown" if report.floor_bytes is None else format_bytes(report.floor_bytes)
    rows = (
        ("read path", report.method_requested, paths or "nothing read", report.reason),
        ("page cache", report.cache_requested, report.cache_decided, "see above" if used else ""),
        ("staging", "", report.staging, report.staging_reason),
        (
            "concurrency",
            "found while loading",
            f"{counted(report.workers, 'worker')} × {format_bytes(report.chunk_bytes)}",
            "what moved most bytes, by trying; the last setting is shown",
        ),
        ("engine", "", report.engine, ""),
        ("floor", "", floor, "memory that the load was to leave to others; under it, it slows down and gives back"),
    )
    body = "".join(
        f"<tr><th>{label}</th><td>{escape(asked)}</td><td>{escape(decided)}</td><td>{_safe(why, 1000)}</td></tr>"
        for label, asked, decided, why in rows
    )
    return _table("What was chosen, and why", ("", "asked for", "decided", "why"), body)


def _budget(report: LoadReport) -> str:
    terms = report.host_memory.terms
    body = "".join(
        f'<tr><th>{escape(term.name)}</th><td class="number">{format_bytes(term.nbytes)}</td>'
        f"<td>{escape(term.reason)}</td></tr>"
        for term in terms
    )
    total = sum(term.nbytes for term in terms)
    body += (
        f'<tr><th>in all</th><td class="number">{format_bytes(total)}</td>'
        f"<td>of the budget of {format_bytes(report.host_memory.budget_bytes)}</td></tr>"
        f'<tr><th>description</th><td class="number">{format_bytes(report.host_memory.description_bytes)}</td>'
        "<td>names, shapes and places of all tensors, beside the budget</td></tr>"
    )
    return _table("The host-memory budget", ("what", ">bytes", "why"), body)


def _files(report: LoadReport) -> str:
    methods = [name for name in ("direct", "buffered", "mmap") if report.method_used.get(name)]
    body = "".join(_file_rows(report, methods))
    more = len(report.files) - _FILES_MAX
    if more > 0:
        body += f'<tr><td colspan="{len(methods) + 2}" class="quiet">and {counted(more, "more file")}</td></tr>'
    return _table("Files", ("file", *(f">{name}" for name in methods), "why"), body)


def _file_rows(report: LoadReport, methods: list[str]) -> Iterator[str]:
    for file in report.files[:_FILES_MAX]:
        sizes = (format_bytes(file.used[name]) if file.used.get(name) else "–" for name in methods)
        numbers = "".join(f'<td class="number">{size}</td>' for size in sizes)
        yield f"<tr><td>{_safe(file.path)}</td>{numbers}<td>{_safe(file.reason, 1000)}</td></tr>"


def _table(title: str, columns: Iterable[str], body: str) -> str:
    """A section with a table; columns of numbers are marked with ``>``."""
    head = "".join(
        f'<th class="number">{column[1:]}</th>' if column.startswith(">") else f"<th>{column}</th>"
        for column in columns
    )
    return (
        f'<section><h2>{title}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>\n"
    )
