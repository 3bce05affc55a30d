"""Prints the README's table of results from ``benchmarks/results/cpu.json``, so that no figure is copied by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "cpu.json"
STATES = ("cold", "warm")


def best_by_loader(section: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per loader and state, its fastest case: peers were measured at their default and at their best settings."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case in section["cases"]:
        if "median" not in (case.get("gigabytes_per_second") or {}):
            continue
        loader = case["name"].split(",")[0].split(" (")[0]
        known = found.setdefault(loader, {}).get(case["state"])
        if known is None or speed(case) > speed(known):
            found[loader][case["state"]] = case
    return found


def speed(case: dict[str, Any]) -> float:
    """A case's median throughput in GB/s."""
    return float(case["gigabytes_per_second"]["median"])


def cell(case: dict[str, Any] | None) -> str:
    """Median and spread."""
    if case is None:
        return "–"
    spread = case["gigabytes_per_second"]
    return f"{spread['median']:.1f} ({spread['min']:.1f}–{spread['max']:.1f})"


def extra(cases: dict[str, dict[str, Any]]) -> str:
    """The largest growth of anonymous memory beyond the tensors, in MiB."""
    grown = [case["extra_anonymous_bytes"]["median"] for case in cases.values() if case.get("extra_anonymous_bytes")]
    return f"{max(grown) / 2**20:.0f} MiB" if grown else "–"


def main() -> None:
    """Print the table."""
    section = json.loads(RESULTS.read_text(encoding="utf-8"))["peers"]
    print("| loader into CPU memory | cold, GB/s | warm, GB/s | memory beyond the tensors |")
    print("|---|---|---|---|")
    for loader, cases in best_by_loader(section).items():
        print(f"| {loader} | {' | '.join(cell(cases.get(state)) for state in STATES)} | {extra(cases)} |")


if __name__ == "__main__":
    main()
