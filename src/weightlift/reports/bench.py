"""What a benchmark found, as tables for people: ceilings, a table per state of the page cache, the recommendation.

Takes the finished record and asks nothing else. What is no result is not shown as one: below three runs the runs
themselves stand where medians would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightlift.bench.options import ROUNDS_OF_A_RESULT
from weightlift.reports.console import column_table, counted, fact_grid, joined, text
from weightlift.reports.load import seconds_text, size_text, speed_text
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from weightlift.bench.results import BenchResult, CaseResult, Spread

CEILINGS: Final = {
    "direct": "storage, direct",
    "uncached": "storage, uncached",
    "buffered": "storage, buffered",
    "cached": "page cache, copied out",
    "link": "link to the GPU",
}
"""What bounds loads, as tables call it."""
_STATES: Final = {
    "cold": "cold: nothing of the files in the page cache, as verified before each load",
    "warm": "warm: the files in the page cache",
}


def bench_tables(result: BenchResult) -> Iterator[RenderableType]:
    """The whole report.

    Args:
        result: finished or interrupted.
    """
    if result.partial:
        yield text(f"partial: interrupted in round {result.rounds_done + 1} of {result.rounds}", "yellow")
    if not result.conclusive:
        yield text(
            f"{counted(result.rounds_done, 'whole round')}: these are single runs, not results, and no fractions or "
            f"ratios are taken from them (that needs {ROUNDS_OF_A_RESULT} rounds)",
            "yellow",
        )
    yield _head(result)
    for state, heading in _STATES.items():
        cases = [case for case in result.cases if case.state == state]
        if cases:
            yield text("")
            yield text(heading, "bold")
            yield _cases(result, cases)
    yield text("")
    yield _foot(result)


def _head(result: BenchResult) -> Table:
    grid = fact_grid()
    where = "read and discarded" if result.device == "null" else f"to {result.device}"
    size = f"{counted(result.tensors, 'tensor')}, {format_bytes(result.nbytes)} in {counted(result.files, 'file')}"
    grid.add_row("model", text(result.path))
    grid.add_row("loaded", text(f"{size}, {where}; {counted(result.rounds_done, 'round')}", "bold"))
    grid.add_row("machine", text(_machine(result)))
    for kind, label in CEILINGS.items():
        speeds = result.ceiling_speeds(kind)
        if speeds:
            grid.add_row(label, text(_ceiling(speeds)))
    notes = {kind: why for found in result.ceilings for kind, why in found.notes.items()}
    for kind, why in notes.items():
        if not result.ceiling_speeds(kind):
            grid.add_row(f"not {CEILINGS.get(kind, kind)}", text(why))
    for name, why in result.not_measured.items():
        grid.add_row(f"not {name}", text(why, "yellow"))
    return grid


def _machine(result: BenchResult) -> str:
    machine, place = result.facts.machine, result.facts.place
    mount = place.mount if place else None
    return joined(
        f"{machine.system} {machine.release}" if machine else "",
        counted(machine.processors, "processor") if machine else "",
        f"{size_text(machine.memory_bytes)} of memory" if machine else "",
        f"{mount.kind} on {mount.source}" if mount else "",
        *(gpu.model for gpu in result.facts.software.gpus or ()),
        *(f"{name} {version}" for name, version in result.versions.items()),
    )


def _ceiling(speeds: list[float]) -> str:
    if len(speeds) < ROUNDS_OF_A_RESULT:
        return joined(*map(speed_text, speeds)) + (" (single runs)" if len(speeds) > 1 else " (a single run)")
    middle = sorted(speeds)[len(speeds) // 2]
    return f"{speed_text(middle)}  ({min(speeds):.2f} – {max(speeds):.2f})"


def _cases(result: BenchResult, cases: list[CaseResult]) -> Table:
    numbers = ("GB/s", "from – to", "seconds", "of ceiling", "to baseline")
    sizes = ("anonymous", "beyond tensors", "file-backed", "left cached")
    table = column_table("path", *numbers, *sizes, "trouble", right=(*numbers, *sizes))
    for case in cases:
        table.add_row(*(text(cell, "bold" if case.contestant.own else "") for cell in _cells(result, case)))
    return table


def _cells(result: BenchResult, case: CaseResult) -> Iterator[str]:
    yield case.contestant.name
    if not case.good:
        yield from ("–",) * 9
        yield "; ".join(case.errors)
        return
    speed, seconds = case.speed, case.spread(lambda run: run.seconds)
    if speed is None or seconds is None:
        yield ", ".join(f"{run.gigabytes_per_second:.2f}" for run in case.good)
        yield "single run" if len(case.good) == 1 else "single runs"
        yield ", ".join(seconds_text(run.seconds) for run in case.good)
    else:
        yield f"{speed.median:.2f}"
        yield f"{speed.smallest:.2f} – {speed.largest:.2f}"
        yield seconds_text(seconds.median)
    yield _share(case.fraction)
    yield f"{case.ratio.median:.2f} × {case.baseline}" if case.ratio else "–"
    yield size_text(case.most(lambda run: run.peaks.anonymous_bytes))
    yield "mapped" if case.contestant.mapped else size_text(case.most(lambda run: run.beyond_tensors_bytes))
    yield size_text(case.most(lambda run: run.peaks.file_bytes))
    left = case.most(lambda run: run.cached_after_bytes)
    yield "unknown" if left is None else f"{left / result.file_bytes:.0%}"
    yield "; ".join(case.errors)


def _share(fraction: Spread | None) -> str:
    return f"{fraction.median:.0%}" if fraction else "–"


def _foot(result: BenchResult) -> Table:
    grid = fact_grid()
    for state in _STATES:
        best = result.fastest(state)
        if best is not None and best.speed is not None:
            named = f"{best.contestant.name}, {speed_text(best.speed.median)} in {counted(len(best.good), 'run')}"
            grid.add_row(f"fastest {state}", text(named))
    grid.add_row("recommended", text(result.recommendation.command, "bold"))
    for reason in result.recommendation.reasons:
        grid.add_row("", text(reason))
    for note in result.notes:
        grid.add_row("note", text(note))
    grid.add_row("page cache", text(_page_cache(result)))
    return grid


def _page_cache(result: BenchResult) -> str:
    cache = result.page_cache
    if cache.before_bytes is None:
        return cache.note
    held = f"held {size_text(cache.before_bytes)} of the files before and holds {size_text(cache.after_bytes)} now"
    return f"{held}; {cache.note}" if cache.note else held
