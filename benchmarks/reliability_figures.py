"""The figures of ``docs/reliability.md`` out of results files; ``page.py`` writes them, so that none is typed by hand.

Knows the shapes of the results files of endurance, faults, fuzzing, hostile headers, mutation, Pythons,
portability and the self-test, and nothing of how they come about.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Final

from page_tables import WORDS, Part, Target, escaped, table, targets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Result = Mapping[str, Any]

ENDED_BY_A_CHANGE: Final = ("FileChangedError", "TruncatedFileError")
BROKEN_OFF: Final = ("stopped", "stream left")
READERS: Final = ("weightlift", "safetensors")
BROKEN: Final = ", broken at the end"
HOSTILE_MIN: Final = 500


def endurance(result: Result) -> str:
    """How many loads one process went through, and what it held meanwhile."""
    endings, samples = result["endings"], result["samples"]
    changed, stopped = (sum(endings.get(name, 0) for name in names) for names in (ENDED_BY_A_CHANGE, BROKEN_OFF))
    first, last = (sample["anonymous_bytes"] / 1e6 for sample in (samples[0], samples[-1]))
    descriptors, threads = (_range([sample[name] for sample in samples]) for name in ("descriptors", "threads"))
    left = len(result["files_left"])
    return (
        f"In the last run, {result['loads']:,} loads with random options (seed {result['seed']}), {changed:,} met a "
        f"changed file, {stopped:,} were broken off, and\nthe bytes of the other {endings.get('whole', 0):,} were "
        "right. "
        f"In {len(samples)} samples on the way, descriptors were {descriptors} and threads {threads}\n"
        f"({samples[-1]['threads']} at the end); anonymous memory went from {first:.1f} MB after the first load to "
        f"{last:.1f} MB after the last. Of {result['kills']}\nprocesses killed while loading, "
        f"{'none left a file' if not left else f'{left} files were left'} (CPython {result['python']})."
    )


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def fuzz(result: Result) -> str:
    """Executions and findings of every reader, over all runs."""
    executions, findings = Counter[str](), Counter[str]()
    seconds: defaultdict[str, float] = defaultdict(float)
    for run in result["runs"]:
        for name, target in run["targets"].items():
            executions[name] += target["executions"]
            findings[name] += len(target["findings"])
            seconds[name] += target["seconds"]
    lines = [
        (f"`{escaped(name)}`", f"{count:,}", f"{seconds[name] / 60:.0f}", findings[name])
        for name, count in executions.most_common()
    ]
    lines.append(
        ("together", f"{executions.total():,}", f"{sum(seconds.values()) / 60:.0f}", sum(findings.values())),
    )
    return table(("reader", "executions", "minutes", "findings"), lines)


def mutation(result: Result) -> str:
    """What came of the mutants of every part, and why those survive that were looked at."""
    lines = []
    for name, suite in result.items():
        tried = f"{suite['tried']:,} of {suite['mutants']:,}" + (", at random" if suite["sample"] else "")
        noticed = suite["killed"] + suite["timeout"]
        lines.append((f"`{escaped(name)}`", tried, f"{noticed:,}", len(suite["explained"]), len(suite["unexplained"])))
    return table(("part", "mutants tried", "noticed by the tests", "cannot be noticed", "not explained"), lines)


def headers(result: Result) -> str:
    """Processor seconds of the longest headers."""

    def seconds(form: str, reader: str) -> str:
        run = result["headers"].get(form, {}).get(reader)
        return "–" if run is None else f"{run['processor_seconds']:.1f}"

    lines = []
    for form in result["headers"]:
        if not form.endswith(BROKEN):
            refused = result["headers"][form]["weightlift"]["refused"]
            read = [seconds(form, reader) + (" (refused)" if refused else "") for reader in READERS]
            lines.append((escaped(form), *read, *(seconds(form + BROKEN, reader) for reader in READERS)))
    machine = result["environment"]
    words = (
        f"Of {result['header_bytes'] / 1e6:.0f} MB, in processor seconds, read or refused for a mistake at their end "
        f"(`benchmarks/results/hostile_headers.json`,\n{machine['usable_processors']} processors, load average "
        f"{machine['load_average_at_start'][0]:.1f} when it began):\n\n"
    )
    heads = ("weightlift, read", "reference, read", "weightlift, refused", "reference, refused")
    return words + table(("header", *heads), lines)


FAULTS: Final = (
    ("The n-th read fails with EIO", "`strace`", ("trouble/test_system_calls.py::test_the_nth_read_fails",)),
    (
        "A read finds no memory (ENOMEM)",
        "`strace`",
        ("trouble/test_system_calls.py::test_a_read_that_finds_no_memory",),
    ),
    (
        "Reads are interrupted (EINTR)",
        "`strace`",
        ("trouble/test_system_calls.py::test_interrupted_reads_are_asked_again",),
    ),
    (
        "A read answers 0 bytes inside the file",
        "`strace`",
        ("trouble/test_system_calls.py::test_a_file_that_seems_to_end_early",),
    ),
    (
        "Direct reads are refused midway (EINVAL, EOPNOTSUPP)",
        "`strace`",
        ("trouble/test_system_calls.py::test_direct_reads_that_are_refused_midway_go_through_the_cache",),
    ),
    (
        "No memory for the tensors (`madvise`)",
        "`strace`",
        ("trouble/test_system_calls.py::test_no_memory_for_the_tensors",),
    ),
    (
        "The file cannot be opened (EIO, EMFILE, EACCES)",
        "`strace`",
        ("trouble/test_system_calls.py::test_a_file_that_cannot_be_opened",),
    ),
    (
        "The file cannot be mapped (ENOMEM, ENODEV)",
        "`strace`",
        ("trouble/test_system_calls.py::test_a_file_that_cannot_be_mapped",),
    ),
    (
        "The file is cut, appended to or replaced during the load",
        "a progress callback",
        ("trouble/test_changing_files.py::test_a_change_midway_and_the_load_after_it",),
    ),
    (
        "The disk is full while a file is written",
        "a full file system",
        ("trouble/test_full_disks.py",),
    ),
    (
        "A load is broken off, at any step",
        "exceptions in callbacks and at calls",
        ("trouble/test_cancellation.py",),
    ),
    (
        "Loads at once, threads that share, forked children",
        "threads and processes",
        ("trouble/test_two_at_once.py", "trouble/test_side_by_side.py"),
    ),
    (
        "Short and interrupted reads, of any length, in any order",
        "a reader that injects faults",
        (
            "engines/test_faults.py::test_short_and_interrupted_reads_are_finished",
            "engines/test_faults.py::test_the_order_in_which_chunks_finish_does_not_matter",
        ),
    ),
    (
        "Reads that fail, end early, are refused or never return",
        "the same",
        (
            "engines/test_faults.py::test_a_failed_read_names_file_tensor_and_numbers",
            "engines/test_faults.py::test_an_early_end_of_file_is_told_where_it_is",
            "engines/test_faults.py::test_direct_reads_refused_on_the_way_are_read_through_the_cache_and_counted",
            "engines/test_faults.py::test_memory_given_out_before_a_failure_is_not_handed_on",
            "engines/test_faults.py::test_a_read_that_never_returns_is_named_and_keeps_its_buffers",
        ),
    ),
    (
        (
            "A part of Linux is missing: `preadv`, `posix_fadvise`, `O_DIRECT`, `cachestat`, `statx`, `/proc`, control "
            "groups, the native engine, all of them, or for comparison none"
        ),
        "child processes that lose it, four methods each",
        ("host/test_taken_away.py::test_every_method_loads_the_same_bytes_without",),
    ),
)
"""What goes wrong, by what it is made to, and the tests that do so, by file or function under ``tests``."""


def faults(result: Result) -> str:
    """How many cases of each fault were tried, all of which passed; what was skipped is said."""
    lines = []
    for fault, maker, tests in FAULTS:
        counts = Counter[str]()
        for name in tests:
            found = [ended for test, ended in result["tests"].items() if _belongs(test, f"tests/{name}")]
            if not found:
                raise ValueError(f"the record of faults knows no test {name}")
            for ended in found:
                counts.update(ended)
        skipped = f" ({counts['skipped']} skipped)" if counts["skipped"] else ""
        lines.append((fault, f"{counts['passed']}{skipped}", maker))
    date, python = result["environment"]["date"][:10], result["environment"]["python"]
    return (
        table(("fault", "cases survived", "made by"), lines)
        + f"\n\nCounted by `benchmarks/faults.py` on {date} with CPython {python}."
    )


def part_of_faults(result: Result) -> Part:
    """For the page of all figures: how many tests made faults, and how many hostile inputs were refused."""
    made = Part()
    passed, skipped = (sum(ended.get(how, 0) for ended in result["tests"].values()) for how in ("passed", "skipped"))
    refused = sum(result["hostile_inputs"].values())
    made.add(
        f"{passed:,} tests that make faults or read hostile files passed, {skipped} were skipped. "
        "[Reliability](reliability.md) has them by kind."
    )
    wanted = [
        Target("hostile inputs refused in every run of the tests", f"{refused:,}", "≥ 500", refused >= HOSTILE_MIN)
    ]
    made.add(targets(wanted), wanted)
    return made


def _endings(head: str, runs: Mapping[str, Any]) -> str:
    lines = [
        (
            escaped(name),
            run["environment"]["date"][:10],
            f"{run['passed']:,}",
            f"{run['skipped']:,}",
            len(run["failed"]),
        )
        for name, run in sorted(runs.items())
    ]
    return table((head, "date", "passed", "skipped", "failed"), lines)


def pythons(result: Result) -> str:
    """Which Pythons ran the tests, and how that ended."""
    return _endings("Python", result)


def portability(result: Result) -> str:
    """How the unit tests ended without each part of Linux."""
    return _endings("taken away", result)


def _alone(render: Callable[[Result], str]) -> Callable[[Result], Part]:
    """For the page of all figures: the same table."""

    def part(result: Result) -> Part:
        made = Part()
        made.add(render(result))
        return made

    return part


part_of_pythons, part_of_portability = _alone(pythons), _alone(portability)


def _belongs(test: str, name: str) -> bool:
    return test == name or test.partition("::")[0] == name


def hostile(result: Result) -> str:
    """How many inputs were refused, by reader."""
    counts = Counter[str](result["hostile_inputs"])
    lines = [(f"`{escaped(name)}`", f"{count:,}") for name, count in counts.most_common()]
    return table(("reader", "hostile inputs refused"), [*lines, ("together", f"{counts.total():,}")])


def part_of_self_test(result: Result) -> Part:
    """What the self-test tried on a card, and how each step went."""
    steps, facts = result["steps"], result["steps"]["facts"]
    kind, version = ("HIP", facts["hip"]) if facts["hip"] else ("CUDA", facts["cuda"])
    part = Part()
    part.add(
        f"Taken {result['date'][:10]} by `weightlift doctor --self-test --device {result['device']}`. {facts['name']}, "
        f"{facts['devices']} in the machine; {kind} {version}, torch {facts['torch']}; Python {result['python']}."
    )
    lines = [(escaped(name), f"{step['seconds']:.1f}", WORDS[step["ok"]]) for name, step in steps.items()]
    part.add(table(("step", "seconds", "passed"), lines))
    passed = sum(step["ok"] for step in steps.values())
    found = [Target("steps passed", str(passed), f"= {len(steps)}", passed == len(steps))]
    part.add(targets(found), found)
    return part


BLOCKS: Final[Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]]] = {
    "endurance": ("endurance", endurance),
    "fuzz": ("fuzz", fuzz),
    "faults": ("faults", faults),
    "hostile": ("faults", hostile),
    "headers": ("hostile_headers", headers),
    "mutation": ("mutation", mutation),
    "pythons": ("pythons", pythons),
    "portability": ("portability", portability),
}
"""Every block of the page, with the results file that it shows."""
