"""A load's report as tables for people; takes the finished record and asks nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightlift.errors import printable
from weightlift.reports.console import column_table, counted, fact_grid, joined, text
from weightlift.units import format_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from weightlift.types import LoadReport

_FEW_FILES: Final = 8
_DIGEST_NAME_CHARACTERS: Final = 1000


def load_tables(report: LoadReport, path: str | os.PathLike[str], *, verbose: bool = False) -> Iterator[RenderableType]:
    """What a load did: a summary, then the files if they are few or everything is wanted.

    Args:
        report: the report of the load.
        path: what was loaded, as the user named it.
        verbose: show every file, and the budget term by term.
    """
    yield _summary(report, path)
    if verbose and report.host_memory.terms:
        yield text("")
        yield _terms(report)
    if report.files and (verbose or 1 < len(report.files) <= _FEW_FILES):
        yield text("")
        yield _files(report)


def digest_lines(report: LoadReport) -> Iterator[str]:
    """One line per tensor: its digest and its name."""
    for name, digest in report.digests.items():
        yield f"{digest}  {printable(name, _DIGEST_NAME_CHARACTERS)}"


def seconds_text(seconds: float) -> str:
    """A duration in the unit that reads best."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms" if seconds < 0.0995 else f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 59.995 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def speed_text(gigabytes_per_second: float) -> str:
    """A throughput in 10^9 bytes a second, with three digits that matter."""
    digits = 1 if gigabytes_per_second >= 9.995 else 2
    return f"{gigabytes_per_second:.{digits}f} GB/s" if gigabytes_per_second >= 0.01 else "below 0.01 GB/s"


def size_text(size: int | None) -> str:
    """A number of bytes, or ``unknown``."""
    return "unknown" if size is None else format_bytes(size)


def _summary(report: LoadReport, path: str | os.PathLike[str]) -> Table:
    grid = fact_grid()
    action = "read and discarded" if report.device == "null" else f"on {report.device}"
    files = f" in {counted(len(report.files), 'file')}" if len(report.files) > 1 else ""
    grid.add_row(
        "loaded", text(f"{counted(report.tensors, 'tensor')}, {format_bytes(report.nbytes)}{files}, {action}", "bold")
    )
    grid.add_row("from", text(path))
    grid.add_row("time", text(f"{seconds_text(report.seconds)}, {_speed(report)}{_phases(report)}"))
    grid.add_row("read path", text(f"{report.method_requested} → {_used(report)}"))
    grid.add_row("why", text(report.reason))
    grid.add_row("page cache", text(_page_cache(report)))
    grid.add_row("memory", text(_memory(report)))
    if report.fit:
        grid.add_row("fit", text(report.fit))
    if report.engine != "none":
        grid.add_row("engine", text(_engine(report)))
        grid.add_row("bottleneck", text(report.bottleneck + _ceiling(report)))
    trouble = _trouble(report)
    if trouble:
        grid.add_row("trouble", text(trouble, "yellow"))
    return grid


def _speed(report: LoadReport) -> str:
    if report.engine == "none":
        return "nothing read yet: mapped tensors are read when touched"
    return speed_text(report.gigabytes_per_second)


def _phases(report: LoadReport) -> str:
    shown = joined(*(f"{name} {seconds_text(seconds)}" for name, seconds in report.phases.items() if seconds >= 0.001))
    return f"  ({shown})" if shown else ""


def _used(report: LoadReport) -> str:
    used = {name: size for name, size in report.method_used.items() if size}
    if len(used) == 1:
        return next(iter(used))
    return joined(*(f"{name} {format_bytes(size)}" for name, size in used.items())) or "nothing"


def _page_cache(report: LoadReport) -> str:
    before, after = report.page_cache_before_bytes, report.page_cache_after_bytes
    policy = f"{report.cache_requested} → {report.cache_decided}"
    if before is None and after is None:
        return f"{policy}; what it held before and after is unknown"
    return f"{policy}; held {size_text(before)} of the files before, {size_text(after)} after"


def _memory(report: LoadReport) -> str:
    memory = report.host_memory
    return (
        joined(
            f"budget {format_bytes(memory.budget_bytes)}",
            f"staging {format_bytes(memory.staging_bytes)}",
            f"description {format_bytes(memory.description_bytes)}",
        )
        + "; beyond the tensors, at peak: "
        + joined(
            f"anonymous {size_text(memory.peak_anonymous_bytes)}",
            f"file-backed {size_text(memory.peak_file_bytes)}",
            f"pinned {format_bytes(memory.peak_pinned_bytes)}" if memory.peak_pinned_bytes else "",
        )
    )


def _engine(report: LoadReport) -> str:
    return f"{report.engine}, {counted(report.workers, 'worker')} × {format_bytes(report.chunk_bytes)} chunks"


def _ceiling(report: LoadReport) -> str:
    known = {name.replace("_", " "): value for name, value in report.ceilings.items() if value}
    reached = (
        f"{name} {speed_text(value)}, {report.gigabytes_per_second / value:.0%} reached"
        for name, value in known.items()
    )
    shown = joined(*reached)
    return f"  (ceilings: {shown})" if shown else ""


def _trouble(report: LoadReport) -> str:
    stalled = report.pressure_stall_seconds or 0.0
    first, more = next(iter(report.interventions), None), len(report.interventions) - 1
    return joined(
        f"the machine swapped {format_bytes(report.swap_out_bytes)} out" if report.swap_out_bytes else "",
        f"the machine swapped {format_bytes(report.swap_in_bytes)} in" if report.swap_in_bytes else "",
        f"programs waited {seconds_text(stalled)} for memory" if stalled >= 0.01 else "",
        f"at {first.seconds:.1f} s memory got short ({first.action})" if first else "",
        f"{counted(more, 'more step')} like that" if more > 0 else "",
    )


def _files(report: LoadReport) -> Table:
    table = column_table("file", "direct", "buffered", "mmap", "why", right=("direct", "buffered", "mmap"))
    for file in report.files:
        sizes = (text(format_bytes(file.used.get(name, 0)) if file.used.get(name) else "–") for name in _METHODS)
        table.add_row(text(file.path), *sizes, text(file.reason))
    return table


_METHODS: Final = ("direct", "buffered", "mmap")


def _terms(report: LoadReport) -> Table:
    table = column_table("host memory", "bytes", "why", right=("bytes",))
    for term in report.host_memory.terms:
        table.add_row(text(term.name), text(format_bytes(term.nbytes)), text(term.reason))
    total = sum(term.nbytes for term in report.host_memory.terms)
    budget = f"of the budget of {format_bytes(report.host_memory.budget_bytes)}"
    table.add_row(text("in all"), text(format_bytes(total)), text(budget))
    return table
