"""What the page of published figures says about every results file: one function per file.

Knows the shapes of the results files and nothing of the scripts that write them; it measures and computes nothing but
differences within one file.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from page_tables import (
    MIB,
    WORDS,
    Part,
    Target,
    anything,
    cases,
    escaped,
    limit_targets,
    number,
    ratio_targets,
    settings,
    spread,
    table,
    taken,
    targets,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Result = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """A results file that there should be.

    Attributes:
        title: the heading of its part.
        command: what writes it.
        question: what it answers.
        render: its part of the page.
        sections: its sections with what they answer, where it is measured section by section.
        pictures: files under ``docs/pictures``, each with what it shows.
    """

    title: str
    command: str
    question: str
    render: Callable[[Result], Part]
    sections: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pictures: tuple[tuple[str, str], ...] = ()


def by_sections(result: Result) -> Part:
    """Files that hold sections of cases and claims."""
    part, before = Part(), ""
    for section in result.values():
        if not isinstance(section, dict) or "taken" not in section:
            continue
        title = section["title"].rstrip(".")
        part.add(f"### {escaped(title[:1].upper() + title[1:])}")
        now = taken(section["taken"] | ({"rounds": section["rounds"]} if "rounds" in section else {}))
        part.add(now if now != before else "")
        before = now
        part.add(settings(section["states"]) if "states" in section else _rows(section))
        found = [*ratio_targets(section.get("ratios", ())), *limit_targets(section.get("limits", ()))]
        part.add(targets(found), found)
    return part


def _rows(section: dict[str, Any]) -> str:
    return _sweep(section["rows"]) if "rows" in section else cases(section["cases"])


def _sweep(rows: list[dict[str, Any]]) -> str:
    """The fastest point of every kind of raw read."""
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: float(row["gigabytes_per_second"])):
        best[row["state"], row["method"], row["memory"]] = row
    lines = [
        (*kind, row["threads"], f"{row['chunk_bytes'] / MIB:g}", f"{row['gigabytes_per_second']:.2f}")
        for kind, row in sorted(best.items())
    ]
    note = "The fastest of one run each: candidates, which are measured again beside what is compared with them."
    return f"{note}\n\n{table(('state', 'method', 'into memory', 'threads', 'MiB at a time', 'GB/s'), lines)}"


def gpu(result: Result) -> Part:
    """Sections, and every loader's fraction of the ceiling."""
    part = Part()
    states = list(dict.fromkeys(state for row in result["worst"].values() for state in row["states"]))
    lines = [
        (
            escaped(loader),
            *(number(row["states"][s]) if s in row["states"] else "–" for s in states),
            number(row["worst"]),
        )
        for loader, row in result["worst"].items()
    ]
    part.add("Fraction of the ceiling measured in the same round: the link when warm, raw reads of the storage else.")
    part.add(table(("loader", *states, "worst"), lines))
    rest = by_sections(result)
    part.text += rest.text
    part.targets += rest.targets
    return part


def giant(result: Result) -> Part:
    """Anonymous memory of a 141 GB load and of a small one."""
    part = Part([taken(result["taken"]), cases(result["cases"])])
    growth = result["anonymous_growth_bytes"]
    found = [
        Target(
            "anonymous memory of 141 GB over that of 1 GB, MiB",
            "–" if growth is None else number(growth / MIB, 1),
            f"≤ {result['anonymous_growth_at_most'] / MIB:g}",
            result["growth_reached"],
        ),
        Target("the budget is kept", WORDS[result["budget_kept"]], "yes", result["budget_kept"]),
    ]
    part.add(targets(found), found)
    return part


def gguf(result: Result) -> Part:
    """Opening, and reading beside safetensors."""
    part = Part()
    if opening := result.get("opening"):
        part.add(f"### Opening a file with {opening['tokens']:,} tokens and as many merges")
        part.add(taken(opening["taken"]))
        part.add(cases(opening["cases"]))
        ours = next(case for case in opening["cases"] if case["adapter"] == "weightlift_open")
        most, least = opening["seconds_at_most"], opening["faster_at_least"]
        found = [
            Target("seconds to open", spread(ours.get("seconds"), digits=3), f"≤ {most:g}", opening["seconds_reached"]),
            Target(
                "times as fast as the package gguf",
                spread(opening["faster"], digits=0),
                f"≥ {least:g}",
                opening["faster_reached"],
            ),
        ]
        part.add(targets(found), found)
    for state in ("cold", "warm"):
        if reading := result.get(state):
            part.add(f"### Reading beside safetensors, {state}")
            part.add(taken(reading["taken"] | {"rounds": reading["rounds"]}))
            part.add(cases(reading["cases"]))
            found = list(ratio_targets(reading["ratios"]))
            part.add(targets(found), found)
    return part


def llama_cpp(result: Result) -> Part:
    """Load modes and read paths on one file."""
    part = Part([taken(result["taken"]), cases(result["cases"])])
    tiny = result["tiny_model"]
    found = [Target("a small model is the same byte for byte", WORDS[tiny["identical"]], "yes", tiny["identical"])]
    part.add(targets(found), found)
    warmed = result.get("cache_warm", {})
    if "cases" in warmed:
        part.add("llama.cpp's mapped load from a cold file, and after `weightlift cache warm`:")
        part.add(cases(warmed["cases"]))
        seconds = spread(warmed["warming_seconds"])
        part.add(f"The load is {spread(warmed['load_faster'])} times as fast; warming takes {seconds} s before it.")
    return part


def calls(result: Result) -> Part:
    """Microseconds of single calls through both faces."""
    lines, found = [], []
    for call in result["calls"]:
        name = escaped(call["call"])
        lines.append((name, *(spread(call[side], digits=1) for side in ("weightlift", "safetensors", "ratio"))))
        if "at_most_microseconds" in call:
            value, wanted = spread(call["weightlift"], digits=1), f"≤ {call['at_most_microseconds']:g}"
            found.append(Target(f"{name}, microseconds", value, wanted, call["reached"]))
        elif "at_most_ratio" in call:
            wanted = f"≤ {call['at_most_ratio']:g}"
            found.append(
                Target(f"{name}, over the safetensors library", spread(call["ratio"]), wanted, call["reached"])
            )
    part = Part([taken(result["taken"])])
    part.add(table(("call", "weightlift, µs", "safetensors, µs", "times as long"), lines))
    part.add(targets(found), found)
    return part


def guard(result: Result) -> Part:
    """How late another program wakes up."""
    lines = [
        (
            escaped(case["case"]),
            case["copies"],
            *(
                f"{case['worst_of_runs'][key] * 1000:.1f}" if case["worst_of_runs"][key] is not None else "–"
                for key in ("wake_up_99th_seconds", "wake_up_worst_seconds")
            ),
            "yes" if case["other_survived"] else "no",
            case["kernel_kills_on_the_machine"],
            escaped(", ".join(name for name in case["culprits"] if name != "None")) or "–",
        )
        for case in result["cases"]
    ]
    headings = (
        "case",
        "copies by",
        "99th percentile, ms",
        "worst, ms",
        "other survived",
        "killed by the kernel",
        "named",
    )
    part = Part([taken(result["taken"] | {"rounds": result["rounds"]})])
    part.add(f"In a control group of {result['machine_bytes'] / MIB:g} MiB, the worst of the runs:")
    part.add(table(headings, lines))
    late = [
        case["worst_of_runs"]["wake_up_99th_seconds"] for case in result["cases"] if case["case"].startswith("guard")
    ]
    found = [
        Target(
            "guarded: wake-ups of the other program, ms; it survives, the kernel kills nothing, the file is named",
            "–" if None in late else f"{max(late) * 1000:.1f}",
            f"≤ {result['wake_up_99th_at_most_seconds'] * 1000:g}",
            result["reached"],
        )
    ]
    part.add(targets(found), found)
    return part


def monitoring(result: Result) -> Part:
    """What watching a load costs."""
    lines = [
        (escaped(name), f"{row['median']:.3f}", f"{result['ratio_to_unwatched'][name] - 1:+.1%}")
        for name, row in result["seconds"].items()
    ]
    part = Part([taken(result["taken"] | {"rounds": result["rounds"]})])
    part.add(table(("load", "seconds", "against unwatched"), lines))
    found = [
        Target(
            f"part of one processor spent on looking ({result['seconds_per_look'] * 1e6:.0f} µs a look)",
            f"{result['share_of_one_processor']:.2%}",
            f"≤ {result['share_at_most']:.0%}",
            result["reached"],
        )
    ]
    part.add(targets(found), found)
    return part


def doctor(result: Result) -> Part:
    """Seconds of the whole command."""
    words = {"machine": "`weightlift doctor`", "path": "`weightlift doctor FILE`, the file cold"}
    found = [
        Target(
            f"{name}, seconds; the worst run counts",
            spread(result[key]["seconds"]),
            f"≤ {result[key]['at_most_seconds']:g}",
            result[key]["reached"],
        )
        for key, name in words.items()
    ]
    part = Part([taken(result["taken"])])
    part.add(targets(found), found)
    return part


def bug(result: Result) -> Part:
    """Every way of loading more than there is memory for."""
    part = Part([taken(result["taken"])])
    size, limit = result["checkpoint_bytes"] / MIB, result["limit_bytes"] / MIB
    part.add(f"{size:g} MiB loaded in a control group of {limit:g} MiB, once each:")
    lines = [
        (
            escaped(run["way"]),
            "loaded" if run["done"] else "**killed**",
            f"{run['seconds']:.1f}",
            f"{run['peak_anonymous_bytes'] / MIB:.0f}",
        )
        for run in result["runs"]
    ]
    part.add(table(("way", "ends", "after seconds", "anonymous memory, MiB"), lines))
    return part


def warm(result: Result) -> Part:
    """Ways of filling the page cache."""
    part = Part([taken(result["taken"] | {"rounds": result["rounds"]})])
    part.add(f"{result['bytes'] / MIB:g} MiB; medians, and the least that was cached afterwards:")
    lines = [
        (escaped(case["way"]), f"{case['gigabytes_per_second']:.2f}", f"{case['cached_fraction']:.1%}")
        for case in result["cases"]
    ]
    part.add(table(("way", "GB/s", "cached"), lines))
    return part


def verify(result: Result) -> Part:
    """What looking at digests adds to reading."""
    part = Part([taken(result["taken"] | {"rounds": result["rounds"]})])
    for row in result["rates"]:
        rate = f"{row['gigabytes_per_second']:g} GB/s"
        part.add(f"{result['bytes'] / 1e9:.2f} GB in one cold file on a disk held back to {rate}:")
        lines = [
            (
                escaped(case["name"]),
                spread(case["gigabytes_per_second"]),
                spread(case["seconds"], digits=3),
                spread(case["processor_seconds"], digits=3),
            )
            for case in row["cases"]
        ]
        part.add(table(("way", "GB/s", "seconds", "processor seconds"), lines))
        found = [
            Target(
                f"{escaped(over['name'])} over {escaped(over['over'])}, {rate}, % more time",
                spread(over["value"], 0.01, 1),
                f"≤ {over['at_most'] * 100:g}",
                over["reached"],
            )
            for over in row["overheads"]
        ]
        part.add(targets(found), found)
    return part


def mutation(result: Result) -> Part:
    """What came of the mutants of every part of the package."""
    headings = ("part", "date", "mutants", "tried", "noticed", "explained", "unexplained")
    lines = [
        (
            escaped(name),
            suite["date"],
            f"{suite['mutants']:,}",
            f"{suite['tried']:,}" + (" (at random)" if suite["sample"] else ""),
            f"{suite['killed'] + suite['timeout']:,}",
            len(suite["explained"]),
            len(suite["unexplained"]),
        )
        for name, suite in result.items()
    ]
    return Part([table(headings, lines)])


def endurance(result: Result) -> Part:
    """What many loads leave in one process."""
    endings = ", ".join(f"{count} {escaped(name)}" for name, count in sorted(result["endings"].items()))
    first, last = result["samples"][0], result["samples"][-1]
    part = Part()
    part.add(
        f"{result['loads']} loads (seed {result['seed']}) with Python {result['python']}, numpy {result['numpy']}: "
        f"{endings}. {result['kills']} more processes were killed while loading."
    )
    lines = [
        ("anonymous memory, MiB", *(f"{sample['anonymous_bytes'] / MIB:.1f}" for sample in (first, last))),
        *((name, first[name], last[name]) for name in ("descriptors", "threads")),
        ("files left by killed processes", "–", len(result["files_left"])),
    ]
    part.add(table(("held by the process", f"after load {first['load']}", f"after load {last['load']}"), lines))
    return part


def fuzz(result: Result) -> Part:
    """Executions and findings of every fuzzer."""
    lines = [
        (
            escaped(name),
            run["date"][:10],
            f"`{' '.join(run['command'])}`",
            f"{target['executions']:,}",
            f"{target['seconds']:.0f}",
            target["coverage"],
            len(target["findings"]),
        )
        for run in result["runs"]
        for name, target in run["targets"].items()
    ]
    headings = ("what is fuzzed", "date", "command", "executions", "seconds", "coverage counters", "findings")
    return Part([table(headings, lines)])


def other(result: Result) -> Part:
    """A file without a part of its own."""
    if any(isinstance(section, dict) and "cases" in section and "title" in section for section in result.values()):
        return by_sections(result)
    head = [taken(result["taken"])] if "taken" in result else []
    return Part([*head, *anything(result)])
