"""The README's tables of results out of results files; ``page.py`` writes them, so that no figure is copied by hand."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import claims
from claims import Ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

STATES: Final = ("cold", "half-warm", "warm")
GPU_STATES: Final = ("warm", "cold", "half-warm", "busy")
ROWS: Final = ("auto", "auto, drop", "direct", "buffered", "buffered, drop", "mmap")
OURS: Final = "weightlift"
WAYS: Final = {"auto": "`auto`", "mmap": "`mmap`", "owned": "the best path"}
"""What a comparison of loaders calls weightlift's side, and what the README does."""

Cases = dict[str, dict[str, Any]]


def cell(case: dict[str, Any] | None) -> str:
    """A case's median throughput and its spread, in GB/s."""
    spread = case.get("gigabytes_per_second") if case else None
    return f"{spread['median']:.1f} ({spread['min']:.1f}–{spread['max']:.1f})" if spread else "–"


def raw_reads(cases: Cases, state: str, memory: str) -> tuple[str, ...]:
    """Names of the raw reads in a state that gave a figure, into ``fresh`` memory or into memory that is ``reused``."""
    return tuple(
        name
        for name, case in cases.items()
        if name.startswith("raw ") and memory in name and case["state"] == state and cell(case) != "–"
    )


def fastest_raw(cases: Cases, state: str, memory: str) -> dict[str, Any] | None:
    """The fastest of them."""
    found = (cases[name] for name in raw_reads(cases, state, memory))
    return max(found, key=lambda case: float(case["gigabytes_per_second"]["median"]), default=None)


def left_cached(case: dict[str, Any] | None) -> str:
    """The share of the file that the page cache holds after a cold load."""
    left = case.get("resident_after") if case else None
    return f"{left['median']:.0%}" if left else "–"


def times(cases: Cases, over: str, under: tuple[str, ...]) -> str:
    """Throughput over that of the best of some others, divided round by round, as everywhere."""
    present = tuple(name for name in under if name in cases)
    if over not in cases or not present:
        return "–"
    runs = {name: cases[name]["runs"] for name in (over, *present)}
    value = claims.evaluate(Ratio(name="", over=(over,), under=present), runs)["value"]
    return f"{value['median']:.2f}" if value else "–"


def cpu(recorded: Mapping[str, Any]) -> str:
    """Every path into the memory of the CPU."""
    section = recorded["paths"]
    taken, cases = section["taken"], {case["name"]: case for case in section["cases"]}
    size = taken["checkpoints"]["main"]
    disk = "a disk made of memory" if taken["storage"]["loop_over"] == "tmpfs" else taken["storage"]["file_system"]
    words = (
        f"{size['tensor_bytes'] / (1 << 30):.0f} GiB in {size['tensors']} tensors into fresh CPU memory, "
        f"{taken['usable_processors']} processors, {disk}; medians of {section['rounds']} runs with the\n"
        "spread, taken by `benchmarks/cpu.py` and recorded in `benchmarks/results/cpu.json`:\n"
    )
    speeds = " | ".join(f"{state}, GB/s" for state in STATES)
    head = f"| path into CPU memory | {speeds} | cold, over the fastest raw read | left cached after cold |"
    lines = [words, head, "|---|---|---|---|---|---|"]
    for label in ROWS:
        row = [cases.get(f"{label} → cpu, {state}") for state in STATES]
        ratio = times(cases, f"{label} → cpu, cold", raw_reads(cases, "cold", "fresh"))
        lines.append(f"| `{label}` | {' | '.join(map(cell, row))} | {ratio} | {left_cached(row[0])} |")
    lines.append(
        f"| fastest raw read | {' | '.join(cell(fastest_raw(cases, state, 'fresh')) for state in STATES)} | | – |"
    )
    return "\n".join(lines)


def peers(recorded: Mapping[str, Any]) -> str:
    """weightlift's speed over every other loader's into the memory of the CPU."""
    rows: dict[str, dict[str, str]] = {}
    for ratio in recorded["peers"]["ratios"]:
        found = re.fullmatch(r"weightlift (\w+), (\S+), over (.*)", ratio["name"])
        assert found is not None, ratio["name"]
        path, state, other = found.groups()
        value = ratio["value"]
        shown = f"{value['median']:.2f} ({value['min']:.2f}–{value['max']:.2f})" if value else "–"
        rows.setdefault(f"{WAYS[path]} over {other}", {})[state] = shown
    lines = ["| weightlift's speed over another loader's | cold | warm |", "|---|---|---|"]
    lines += [f"| {name} | {states.get('cold', '–')} | {states.get('warm', '–')} |" for name, states in rows.items()]
    return "\n".join(lines)


def gpu(recorded: Mapping[str, Any]) -> str:
    """Every loader onto a GPU, state by state, the fastest of its settings; then what no loader can beat."""
    sections = {state: recorded[state] for state in GPU_STATES if state in recorded}
    cases: dict[str, Cases] = {
        state: {case["name"]: case for case in section["cases"]} for state, section in sections.items()
    }
    first, *others = sections
    columns = (f"{first}, first load", f"{first}, second", *others, "worst fraction of the ceiling")
    head = f"| loader | {' | '.join(columns)} | weightlift over it: {', '.join(sections)} |"
    lines = [_gpu_words(sections), head, f"|{'---|' * (len(columns) + 2)}"]
    for loader, row in recorded["worst"].items():
        found = {state: cases[state].get(f"{loader}, {state}") for state in sections}
        second = (found[first] or {}).get("second_gigabytes_per_second")
        shown = [cell(found[first]), cell({"gigabytes_per_second": second}), *(cell(found[state]) for state in others)]
        ratios = [times(cases[state], f"{OURS}, {state}", (f"{loader}, {state}",)) for state in sections]
        faster = "" if loader == OURS else ", ".join(ratios)
        lines.append(f"| {loader} | {' | '.join(shown)} | {row['worst']:.2f} | {faster} |")
    link = cell(cases[first].get("link, pinned"))
    limits = [cell(cases[s].get("link, pinned") or fastest_raw(cases[s], "cold", "reused")) for s in others]
    lines.append(f"| the link, or raw direct reads of the storage | {' | '.join([link, link, *limits])} | | |")
    pinned = cases[first].get(f"{OURS}, {first}", {}).get("pinned_bytes")
    if pinned:
        lines.append(f"\nweightlift pins {pinned['median'] / 1e6:.0f} MB for that.")
    return "\n".join(lines)


def _gpu_words(sections: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(sections.values()))
    sizes = {
        state: max(case["checkpoint"] for case in section["cases"] if case["name"].startswith(OURS)) / 1e9
        for state, section in sections.items()
    }
    cards = {state: section["taken"]["gpus"][0] for state, section in sections.items()}
    usual = first["taken"]["gpus"][0]
    amounts = ", ".join(
        f"{state} {size:.1f} GB in {sections[state]['rounds']} rounds"
        f"{'' if cards[state] == usual else f' onto an {cards[state]}'}"
        for state, size in sizes.items()
    )
    return (
        f"Onto one {usual}, GB/s, medians with the spread; cold and half-warm loads come from a loop device over "
        f"memory.\nEvery load runs in a fresh process, pinning included: {amounts}.\nTaken by `benchmarks/gpu.py` and "
        "recorded in `benchmarks/results/gpu.json`:\n"
    )


BLOCKS: Final[Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]]] = {
    "cpu": ("cpu", cpu),
    "peers": ("cpu", peers),
    "gpu": ("gpu", gpu),
}
"""Every block of the README, with the results file that it shows."""
