"""Prints the README's tables of results from ``benchmarks/results``, so that no figure is copied by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
STATES = ("cold", "half-warm", "warm")
GPU_STATES = ("warm", "cold", "half-warm", "busy")
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


def cpu_table() -> None:
    """Every path into the memory of the CPU."""
    section = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))["paths"]
    cases: Cases = {case["name"]: case for case in section["cases"]}
    print(f"| path into CPU memory | {' | '.join(f'{state}, GB/s' for state in STATES)} | left cached after cold |")
    print("|---|---|---|---|---|")
    for label in ROWS:
        row = [cases.get(f"{label} → cpu, {state}") for state in STATES]
        print(f"| `{label}` | {' | '.join(map(cell, row))} | {left_cached(row[0])} |")
    print(f"| fastest raw read | {' | '.join(cell(fastest_raw(cases, state)) for state in STATES)} | – |")


def gpu_table() -> None:
    """Every loader onto a GPU, state by state, the fastest of its settings; then what no loader can beat."""
    recorded = json.loads((RESULTS / "gpu.json").read_text(encoding="utf-8"))
    sections = {state: recorded[state] for state in GPU_STATES if state in recorded}
    cases = {state: {case["name"]: case for case in section["cases"]} for state, section in sections.items()}
    rounds = ", ".join(f"{state} {section['rounds']}" for state, section in sections.items())
    others = " | ".join(list(sections)[1:])
    print(f"| loader | warm, first load | warm, second | {others} | worst fraction of the ceiling |")
    print(f"|---|---|---|{'---|' * len(sections)}")
    for loader, row in recorded["worst"].items():
        found = [cases[state].get(f"{loader}, {state}") for state in sections]
        second = (found[0] or {}).get("second_gigabytes_per_second")
        shown = [cell(found[0]), cell({"gigabytes_per_second": second}), *map(cell, found[1:])]
        print(f"| {loader} | {' | '.join(shown)} | {row['worst']:.2f} |")
    link, raw = cell(cases["warm"]["link, pinned"]), [fastest_raw(cases[state], "cold") for state in list(sections)[1:]]
    print(f"| the link; raw direct reads of the storage | {link} | {link} | {' | '.join(map(cell, raw))} | |")
    print(f"\nRounds: {rounds}")


def main() -> None:
    """Print the tables."""
    cpu_table()
    print()
    gpu_table()


if __name__ == "__main__":
    main()
