"""The figures of ``docs/reliability.md`` out of results files; ``page.py`` writes them, so that none is typed by hand.

Knows the shapes of the results files of endurance, fuzzing, hostile headers and mutation, and nothing of how they come
about.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Final

from page_tables import escaped, table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Result = Mapping[str, Any]

ENDED_BY_A_CHANGE: Final = ("FileChangedError", "TruncatedFileError")
BROKEN_OFF: Final = ("stopped", "stream left")
READERS: Final = ("weightlift", "safetensors")
BROKEN: Final = ", broken at the end"


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


BLOCKS: Final[Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]]] = {
    "endurance": ("endurance", endurance),
    "fuzz": ("fuzz", fuzz),
    "headers": ("hostile_headers", headers),
    "mutation": ("mutation", mutation),
}
"""Every block of the page, with the results file that it shows."""
