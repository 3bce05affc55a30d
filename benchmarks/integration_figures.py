"""What frameworks gain from weightlift, out of ``integrations.json``: a part of the page, and blocks of other pages.

Knows the shape of that file and nothing of how it comes about. A run is known by framework, whose loader, state of the
page cache and options; medians are taken over equal runs, and stock is compared with ours by medians.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

from page_tables import MIB, WORDS, Part, Target, escaped, number, table, taken, targets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Result = Mapping[str, Any]
    Run = Mapping[str, Any]

TITLES: Final = {"transformers": "transformers", "exllamav2": "ExLlamaV2", "exllamav3": "ExLlamaV3"}
LOADERS: Final = {"stock": "its own loader", "weightlift": "weightlift"}
STATES: Final = ("warm", "cold")
FASTER: Final = {
    "transformers": {"warm": 3.0, "cold": 1.0},
    "exllamav2": {"warm": 2.0, "cold": 1.0},
    "exllamav3": {"warm": 2.0, "cold": 1.0},
}
"""How many times as fast weights are to be loaded."""
ANONYMOUS_BYTES: Final = (128 + 32) * MIB
"""The default budget, and what the process around it may take."""
HEADER_PAGES_BYTES: Final = 1 * MIB
"""What may stay of a checkpoint that was read past the page cache: the pages that its headers were read from."""


def part(result: Result) -> Part:
    """Everything about every framework in the file."""
    made = result["checkpoint"]
    whole = Part([f"A Llama with random weights, {made['bytes'] / 1e9:.1f} GB in {made['files']} files."])
    for framework, title in TITLES.items():
        if measured(result["runs"], framework):
            whole.add(f"### {title}")
            whole.add(taken(result["taken"][framework] | {"rounds": None}))
            whole.add(loads(result["runs"], framework))
            found = judged(result["runs"], framework)
            whole.add(targets(found), found)
    return whole


def measured(runs: Sequence[Run], framework: str) -> list[Run]:
    """The runs of a framework that came to an end."""
    return [run for run in runs if run["framework"] == framework and "seconds" in run]


def _cases(runs: Sequence[Run], framework: str) -> dict[tuple[str, str, str], list[Run]]:
    """Equal runs together, by state, loader and options."""
    cases: dict[tuple[str, str, str], list[Run]] = {}
    for run in measured(runs, framework):
        options = ", ".join(f"{name}={value}" for name, value in run["options"].items())
        cases.setdefault((run["state"], run["subject"], options), []).append(run)
    return cases


def loads(runs: Sequence[Run], framework: str) -> str:
    """Every kind of load of a framework as a table."""
    lines = [
        (
            f"{state}, {LOADERS[subject]}{f', {escaped(options)}' if options else ''}",
            len(some),
            number(_median(some, "seconds")),
            number(_median(some, "weights_seconds")) if all("weights_seconds" in run for run in some) else "–",
            number(max(run["anonymous_growth_bytes"] for run in some) / MIB, 1),
            f"{max(run['cached_after_bytes'] for run in some) / 1e9:.2f}",
        )
        for (state, subject, options), some in sorted(_cases(runs, framework).items(), reverse=True)
    ]
    headings = (
        "load",
        "runs",
        "seconds",
        "of these, reading weights",
        "anonymous memory grew by, MiB",
        "cached after, GB",
    )
    return table(headings, lines)


def _median(runs: Sequence[Run], name: str) -> float:
    return statistics.median(float(run[name]) for run in runs)


def faster(runs: Sequence[Run], framework: str, state: str) -> float | None:
    """How many times as fast weights are loaded as by the framework's own loader; ``None`` if nobody measured both.

    transformers alone tells loading weights from making the model around them.
    """
    cases, figure = _cases(runs, framework), "weights_seconds" if framework == "transformers" else "seconds"
    stock, ours = cases.get((state, "stock", "")), cases.get((state, "weightlift", ""))
    if not stock or not ours:
        return None
    return _median(stock, figure) / _median(ours, figure)


def judged(runs: Sequence[Run], framework: str) -> list[Target]:
    """What a framework was to gain, and whether it did."""
    found = []
    for state in STATES:
        value, wanted = faster(runs, framework, state), FASTER[framework][state]
        reached = None if value is None else value >= wanted
        shown = "–" if value is None else number(value)
        found.append(Target(f"{TITLES[framework]}, {state}: times as fast", shown, f"≥ {wanted:g}", reached))
    own = [run for run in measured(runs, framework) if run["subject"] == "weightlift"]
    if framework == "transformers" and own:
        grown = max(run["anonymous_growth_bytes"] for run in own)
        name, most = "transformers: anonymous memory grew by, MiB", ANONYMOUS_BYTES
        found.append(Target(name, number(grown / MIB, 1), f"≤ {most / MIB:g}", grown <= most))
    past = [run for run in own if run["state"] == "cold" and run["options"].get("fasttensors")]
    if past:
        left, most = max(run["cached_after_bytes"] for run in past), HEADER_PAGES_BYTES
        name = f"{TITLES[framework]}, fasttensors: cached after, MiB"
        found.append(Target(name, number(left / MIB, 2), f"≤ {most / MIB:g}", left <= most))
    equal = len({run["logits"] for run in measured(runs, framework)}) == 1
    found.append(Target(f"{TITLES[framework]}: logits equal bit for bit", WORDS[equal], "yes", equal))
    return found


def _block(framework: str) -> Callable[[Result], str]:
    def write(result: Result) -> str:
        runs = result["runs"]
        if not measured(runs, framework):
            return "Not recorded yet."
        made, values = result["checkpoint"], [(state, faster(runs, framework, state)) for state in STATES]
        said = " and ".join(f"{number(value)} times as fast {state}" for state, value in values if value is not None)
        equal = len({run["logits"] for run in measured(runs, framework)}) == 1
        alone = ", weights alone" if framework == "transformers" else ""
        return (
            f"A Llama of {made['bytes'] / 1e9:.1f} GB onto a GPU{alone}: {said}; logits are "
            f"{'equal bit for bit' if equal else '**not equal**'}.\nEverything about it is in the "
            f"[benchmarks](../benchmarks.md#under-transformers-exllamav2-and-exllamav3).\n\n{loads(runs, framework)}"
        )

    return write


def summary(result: Result) -> str:
    """What every framework gains, in one sentence."""
    runs = result["runs"]
    gains = [
        f"{title} "
        + " and ".join(
            f"{number(value, 1)} times as fast {state}"
            for state in STATES
            if (value := faster(runs, framework, state)) is not None
        )
        for framework, title in TITLES.items()
        if measured(runs, framework)
    ]
    equal = all(len({run["logits"] for run in measured(runs, framework)}) <= 1 for framework in TITLES)
    return (
        f"A Llama of {result['checkpoint']['bytes'] / 1e9:.1f} GB onto a GPU, weightlift beside each framework's own "
        f"loader: {'; '.join(gains)}.\nLogits are {'equal bit for bit' if equal else '**not equal**'}. "
        "Recorded in `benchmarks/results/integrations.json` by `benchmarks/integrations.py`."
    )


BLOCKS: Final = {f"integrations {framework}": ("integrations", _block(framework)) for framework in TITLES}
"""What stands on each framework's own page."""
