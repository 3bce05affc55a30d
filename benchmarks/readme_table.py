"""Prints the README's table of results from ``benchmarks/results/cpu.json``, so that no figure is copied by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "cpu.json"
STATES = ("cold", "half-warm", "warm")
ROWS = ("auto", "auto, drop", "direct", "buffered", "buffered, drop", "mmap")

Cases = dict[str, dict[str, Any]]


def cell(case: dict[str, Any] | None) -> str:
    """A case's median throughput and its spread, in GB/s."""
    spread = case.get("gigabytes_per_second") if case else None
    return f"{spread['median']:.1f} ({spread['min']:.1f}–{spread['max']:.1f})" if spread else "–"


def fastest_raw(cases: Cases, state: str) -> dict[str, Any] | None:
    """The fastest raw read into fresh memory in a state."""
    found = [
        case for name, case in cases.items() if name.startswith("raw ") and case["state"] == state and cell(case) != "–"
    ]
    return max(found, key=lambda case: float(case["gigabytes_per_second"]["median"]), default=None)


def left_cached(case: dict[str, Any] | None) -> str:
    """The share of the file that the page cache holds after a cold load."""
    left = case.get("resident_after") if case else None
    return f"{left['median']:.0%}" if left else "–"


def main() -> None:
    """Print the table."""
    section = json.loads(RESULTS.read_text(encoding="utf-8"))["paths"]
    cases: Cases = {case["name"]: case for case in section["cases"]}
    print(f"| path into CPU memory | {' | '.join(f'{state}, GB/s' for state in STATES)} | left cached after cold |")
    print("|---|---|---|---|---|")
    for label in ROWS:
        row = [cases.get(f"{label} → cpu, {state}") for state in STATES]
        print(f"| `{label}` | {' | '.join(map(cell, row))} | {left_cached(row[0])} |")
    print(f"| fastest raw read | {' | '.join(cell(fastest_raw(cases, state)) for state in STATES)} | – |")


if __name__ == "__main__":
    main()
