"""Prints the README's tables of results from ``benchmarks/results``, so that no figure is copied by hand."""

from __future__ import annotations

import json
import re
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


def fastest_raw(cases: Cases, state: str, memory: str) -> dict[str, Any] | None:
    """The fastest raw read in a state into ``fresh`` memory, or into memory that is ``reused``."""
    found = [
        case
        for name, case in cases.items()
        if name.startswith("raw ") and memory in name and case["state"] == state and cell(case) != "–"
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
    print(f"| fastest raw read | {' | '.join(cell(fastest_raw(cases, state, 'fresh')) for state in STATES)} | – |")


def peers_table() -> None:
    """weightlift's speed over every other loader's into the memory of the CPU."""
    ratios = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))["peers"]["ratios"]
    rows: dict[str, dict[str, str]] = {}
    for ratio in ratios:
        found = re.fullmatch(r"weightlift (\w+), (\S+), over (.*)", ratio["name"])
        assert found is not None, ratio["name"]
        path, state, other = found.groups()
        value = ratio["value"]
        shown = f"{value['median']:.1f} ({value['min']:.1f}–{value['max']:.1f})"
        rows.setdefault(f"`{path}` over {other}", {})[state] = shown
    print("| weightlift's speed over another loader's | cold | warm |\n|---|---|---|")
    for name, states in rows.items():
        print(f"| {name} | {states.get('cold', '–')} | {states.get('warm', '–')} |")


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
    link, raw = (
        cell(cases["warm"]["link, pinned"]),
        [fastest_raw(cases[state], "cold", "reused") for state in list(sections)[1:]],
    )
    print(f"| the link; raw direct reads of the storage | {link} | {link} | {' | '.join(map(cell, raw))} | |")
    print(f"\nRounds: {rounds}")


def main() -> None:
    """Print the tables."""
    cpu_table()
    print()
    peers_table()
    print()
    gpu_table()


if __name__ == "__main__":
    main()
