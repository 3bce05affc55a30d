"""What the page cache holds of files, what warming and evicting did, as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightlift.health.cache.residency import CELLS, total_cached
from weightlift.reports.console import column_table, counted, text
from weightlift.reports.load import seconds_text, size_text, speed_text
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from weightlift.health.cache.evict import Eviction
    from weightlift.health.cache.residency import FileResidency
    from weightlift.health.cache.warm import WarmResult

_SHADES: Final = "·░▒▓█"


def bar(cells: Sequence[float]) -> str:
    """Where a file is cached: one character per part, from ``·`` for nothing to ``█`` for all of it."""
    if not cells:
        return "?" * CELLS
    # Only what is empty looks empty, and only what is full looks full.
    return "".join(
        _SHADES[0] if cell <= 0 else _SHADES[-1] if cell >= 1 else _SHADES[1 + min(2, int(cell * 3))] for cell in cells
    )


def residency_table(entries: Sequence[FileResidency], *, limit: int | None = None) -> Table:
    """The largest files with a bar each, in their order, and a line that adds up all.

    Args:
        entries: the files.
        limit: most files shown; ``None`` for all.
    """
    table = column_table("cached", "of", "share", "where", "file", right=("cached", "of", "share"))
    for entry in _largest(entries, limit):
        table.add_row(
            text(size_text(entry.cached_bytes)),
            text(format_bytes(entry.file.size_bytes)),
            text(_share(entry.cached_bytes, entry.file.size_bytes)),
            text(bar(entry.cells)),
            text(entry.file.path),
        )
    whole, cached = sum(entry.file.size_bytes for entry in entries), total_cached(entries)
    left = len(entries) - len(_largest(entries, limit))
    more = f", {counted(left, 'smaller file')} not shown (--limit 0 shows all)" if left else ""
    table.add_row(
        text(size_text(cached), "bold"),
        text(format_bytes(whole), "bold"),
        text(_share(cached, whole), "bold"),
        text(""),
        text(f"{counted(len(entries), 'file')}{more}", "bold"),
    )
    return table


def warm_sentence(result: WarmResult, seconds: float) -> str:
    """What warming did, and what kept it from doing more."""
    speed = f" at {speed_text(result.read_bytes / seconds / 1e9)}" if seconds > 0 and result.read_bytes else ""
    done = f"read {format_bytes(result.read_bytes)} in {seconds_text(seconds)}{speed}"
    if result.bound == "budget":
        return f"{done}; the budget is used up"
    if result.bound == "memory":
        return f"{done}; memory has no room for more without pushing out what was warmed"
    return f"{done}; all of it was asked for and fits"


def eviction_table(results: Sequence[Eviction], *, limit: int | None = None) -> Table:
    """What was dropped; files of which something stayed come with the reason, and are always shown."""
    table = column_table("before", "now", "file", "why it stayed", right=("before", "now"))
    by_size = sorted(results, key=lambda one: one.before_bytes or 0, reverse=True)[:limit]
    shown = [one for one in results if one in by_size or not one.gone]
    for one in shown:
        table.add_row(
            text(size_text(one.before_bytes)), text(size_text(one.after_bytes)), text(one.file.path), text(one.reason)
        )
    known = [one for one in results if one.before_bytes is not None and one.after_bytes is not None]
    left = len(results) - len(shown)
    more = f", {counted(left, 'smaller file')} not shown (--limit 0 shows all)" if left else ""
    table.add_row(
        text(format_bytes(sum(one.before_bytes or 0 for one in known)), "bold"),
        text(format_bytes(sum(one.after_bytes or 0 for one in known)), "bold"),
        text(f"{counted(len(results), 'file')}{more}", "bold"),
        text(""),
    )
    return table


def _largest(entries: Sequence[FileResidency], limit: int | None) -> list[FileResidency]:
    if limit is None or len(entries) <= limit:
        return list(entries)
    chosen = {id(entry) for entry in sorted(entries, key=lambda entry: entry.file.size_bytes, reverse=True)[:limit]}
    return [entry for entry in entries if id(entry) in chosen]


def _share(cached: int | None, whole: int) -> str:
    return "?" if cached is None else f"{cached / whole:.0%}" if whole else "–"
