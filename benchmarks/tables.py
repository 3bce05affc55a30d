"""Tables for the terminal out of results; knows nothing of how they were measured."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONSOLE = Console(width=None if sys.stdout.isatty() else 150)
MARKS = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}


def spread(value: Mapping[str, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    """``median (min … max)``, or nothing."""
    if not value:
        return ""
    middle, low, high = (value[key] / scale for key in ("median", "min", "max"))
    return f"{middle:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def run(number: int, name: str, said: str) -> None:
    """One line for a run, so that a long benchmark shows that it lives, and what its time goes into."""
    CONSOLE.print(f"{time.strftime('%X')}  round {number + 1}  {name}: {said}", highlight=False, markup=False)


def cases(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per case."""
    table = Table(title=title, title_justify="left")
    for column in ("case", "GB/s", "seconds", "extra anonymous MiB", "resident before → after", "errors"):
        table.add_column(column, justify="left" if column in ("case", "errors") else "right", overflow="fold")
    for row in rows:
        before, after = (row.get(key, {}).get("median") for key in ("resident_before", "resident_after"))
        seconds = row.get("touched_seconds") or row.get("seconds")
        table.add_row(
            row["name"],
            spread(row.get("gigabytes_per_second")),
            spread(seconds, digits=3),
            spread(row.get("extra_anonymous_bytes"), 1 << 20, 1),
            f"{before:.1%} → {after:.1%}" if before is not None else "",
            "; ".join(row["errors"])[:200],
        )
    CONSOLE.print(table)


def claims(ratios: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]]) -> None:
    """One line per claim, with whether it was reached."""
    if not ratios and not limits:
        return
    table = Table(title="claims", title_justify="left")
    for column in ("claim", "value", "target", "reached"):
        table.add_column(column, justify="left" if column == "claim" else "right", overflow="fold")
    for row in ratios:
        goal = f"≥ {row['at_least']:.2f}" if row["at_least"] else ""
        table.add_row(row["name"], spread(row["value"], digits=3), goal, MARKS[row["reached"]])
    for row in limits:
        scale, unit = (1 << 20, " MiB") if row["figure"] == "extra_anonymous_bytes" else (1, "")
        bound, sign = (row["at_most"], "≤") if row["at_most"] is not None else (row["at_least"], "≥")
        value = spread(row["value"], scale, digits=3)
        table.add_row(
            f"{row['case']}: {row['figure']}", value, f"{sign} {bound / scale:g}{unit}", MARKS[row["reached"]]
        )
    CONSOLE.print(table)


def sweep(rows: Sequence[Mapping[str, Any]], count: int = 3) -> None:
    """The fastest few points of each kind of raw read."""
    table = Table(title="raw sweep: the fastest points", title_justify="left")
    for column in ("state", "method", "memory", "threads × MiB: GB/s"):
        table.add_column(column)
    kinds = dict.fromkeys((row["state"], row["method"], row["memory"]) for row in rows)
    for kind in kinds:
        mine = [row for row in rows if (row["state"], row["method"], row["memory"]) == kind]
        mine.sort(key=lambda row: -row["gigabytes_per_second"])
        best = (
            f"{row['threads']} × {row['chunk_bytes'] / (1 << 20):g}: {row['gigabytes_per_second']:.2f}"
            for row in mine[:count]
        )
        table.add_row(*map(str, kind), "   ".join(best))
    CONSOLE.print(table)


def fractions(worst: Mapping[str, Mapping[str, Any]]) -> None:
    """One line per loader: its fraction of the ceiling in every state, and the worst of them."""
    states = list(dict.fromkeys(state for row in worst.values() for state in row["states"]))
    table = Table(title="fraction of the ceiling", title_justify="left")
    for column in ("loader", *states, "worst"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for loader, row in worst.items():
        cells = (f"{row['states'][state]:.2f}" if state in row["states"] else "" for state in states)
        table.add_row(loader, *cells, f"{row['worst']:.2f}")
    CONSOLE.print(table)
