"""What frameworks gain from weightlift, out of ``integrations.json``: a part of the page, and blocks of other pages.

Knows the shape of that file and nothing of how it comes about. A run is known by framework, whose loader, state of the
page cache and options; medians are taken over equal runs, and stock is compared with ours by medians.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from page_tables import MIB, WORDS, Part, Target, escaped, number, table, taken, targets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Result = Mapping[str, Any]
    Run = Mapping[str, Any]


class Framework(NamedTuple):
    """What is measured under one name.

    Attributes:
        title: what it is called.
        model: the model it loads, of :mod:`integration_models`.
        page: the page under ``docs/integrations`` that shows it.
        warm: how many times as fast weights are to be loaded out of the page cache.
        cold: the same from storage.
        figure: the seconds that are compared; transformers tells loading weights from making the model around them.
        outcome: what has to be equal.
    """

    title: str
    model: str
    page: str
    warm: float = 1.0
    cold: float = 1.0
    figure: str = "seconds"
    outcome: str = "logits"


FRAMEWORKS: Final = {
    "transformers": Framework("transformers", "llama", "transformers", warm=3.0, figure="weights_seconds"),
    "exllamav2": Framework("ExLlamaV2", "llama", "exllamav2", warm=2.0),
    "exllamav2 exl2": Framework("ExLlamaV2 with an EXL2 model", "exl2", "exllamav2", warm=2.0),
    "exllamav3": Framework("ExLlamaV3", "llama", "exllamav3", warm=2.0),
    "safetensors": Framework("safetensors", "llama", "safetensors", outcome="tensors"),
    "diffusers": Framework("diffusers", "unet", "diffusers", outcome="what the model makes of noise"),
    "vllm": Framework("vLLM", "llama", "vllm", outcome="weights"),
}
MODELS: Final = {
    "llama": "A Llama with random weights in half precision",
    "exl2": "A tenth of a 70B Llama, quantised to 4 bits with random weights",
    "unet": "A diffusion model's UNet with random weights in half precision",
}
LOADERS: Final = {"stock": "its own loader", "weightlift": "weightlift"}
STATES: Final = ("warm", "cold")
ANONYMOUS_BYTES: Final = (128 + 32) * MIB
"""The default budget, and what the process around it may take."""
LINK_GB_PER_SECOND: Final = 63.0
"""What 16 lanes of PCI Express 5.0 carry, before anything is lost to packets: 32 GT/s each, 128 bits in 130."""
HEADER_PAGES_BYTES: Final = 1 * MIB
"""What may stay of a checkpoint that was read past the page cache: the pages that its headers were read from."""


def part(result: Result) -> Part:
    """Everything about every framework in the file."""
    whole = Part()
    for name, framework in FRAMEWORKS.items():
        if measured(result["runs"], name):
            whole.add(f"### {framework.title}")
            whole.add(taken(result["taken"][name] | {"rounds": None}))
            whole.add(_model(result, framework))
            whole.add(loads(result["runs"], name))
            found = judged(result["runs"], name) + bound(result, name)
            whole.add(targets(found), found)
    return whole


def _model(result: Result, framework: Framework) -> str:
    made = result["models"][framework.model]
    files = "one file" if made["files"] == 1 else f"{made['files']} files"
    return f"{MODELS[framework.model]}, {made['bytes'] / 1e9:.1f} GB in {files}."


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
    """How many times as fast weights are loaded as by the framework's own loader; ``None`` if nobody measured both."""
    cases, figure = _cases(runs, framework), FRAMEWORKS[framework].figure
    stock, ours = cases.get((state, "stock", "")), cases.get((state, "weightlift", ""))
    if not stock or not ours:
        return None
    return _median(stock, figure) / _median(ours, figure)


def judged(runs: Sequence[Run], framework: str) -> list[Target]:
    """What a framework was to gain, and whether it did."""
    known, found = FRAMEWORKS[framework], []
    for state in STATES:
        value, wanted = faster(runs, framework, state), getattr(known, state)
        reached = None if value is None else value >= wanted
        shown = "–" if value is None else number(value)
        found.append(Target(f"{known.title}, {state}: times as fast", shown, f"≥ {wanted:g}", reached))
    own = [run for run in measured(runs, framework) if run["subject"] == "weightlift"]
    if framework == "transformers" and own:
        grown = max(run["anonymous_growth_bytes"] for run in own)
        name, most = "transformers: anonymous memory grew by, MiB", ANONYMOUS_BYTES
        found.append(Target(name, number(grown / MIB, 1), f"≤ {most / MIB:g}", grown <= most))
    past = [run for run in own if run["state"] == "cold" and run["options"].get("fasttensors")]
    if past:
        left, most = max(run["cached_after_bytes"] for run in past), HEADER_PAGES_BYTES
        name = f"{known.title}, fasttensors: cached after, MiB"
        found.append(Target(name, number(left / MIB, 2), f"≤ {most / MIB:g}", left <= most))
    equal = _equal(runs, framework)
    found.append(Target(f"{known.title}: {known.outcome} equal bit for bit", WORDS[equal], "yes", equal))
    return found


def bound(result: Result, framework: str) -> list[Target]:
    """How many times as fast a warm load could be with any reader, by what ours does beside reading."""
    known, cases = FRAMEWORKS[framework], _cases(result["runs"], framework)
    stock, ours = cases.get(("warm", "stock", ""), ()), cases.get(("warm", "weightlift", ""), ())
    timed = stock and ours and all("weights_seconds" in run for run in ours)
    if known.figure == "weights_seconds" or not timed:
        return []
    reading = result["models"][known.model]["bytes"] / LINK_GB_PER_SECOND / 1e9
    beside = _median(ours, "seconds") - _median(ours, "weights_seconds")
    name = f"{known.title}, warm: times as fast, were weights read at {LINK_GB_PER_SECOND:g} GB/s"
    return [Target(name, number(_median(stock, "seconds") / (beside + reading)), "", None)]


def _equal(runs: Sequence[Run], framework: str) -> bool:
    return len({run["outcome"] for run in measured(runs, framework)}) == 1


def _gains(runs: Sequence[Run], framework: str, digits: int) -> str:
    values = [(state, faster(runs, framework, state)) for state in STATES]
    return " and ".join(
        f"{number(value, digits)} times as fast {state}" for state, value in values if value is not None
    )


def _block(framework: str) -> Callable[[Result], str]:
    def write(result: Result) -> str:
        runs, known = result["runs"], FRAMEWORKS[framework]
        if not measured(runs, framework):
            return "Not recorded yet."
        alone = ", weights alone" if known.figure == "weights_seconds" else ""
        return (
            f"{_model(result, known)} Onto a GPU{alone}: {_gains(runs, framework, 2)}; {known.outcome} "
            f"{'equal bit for bit' if _equal(runs, framework) else '**not equal**'}.\nEverything about it is in the "
            f"[benchmarks](../benchmarks.md#under-the-frameworks-that-load-models).\n\n{loads(runs, framework)}"
        )

    return write


def summary(result: Result) -> str:
    """What every framework gains, in one sentence."""
    runs = result["runs"]
    known = [name for name in FRAMEWORKS if measured(runs, name)]
    gains = [f"{FRAMEWORKS[name].title} {_gains(runs, name, 1)}" for name in known]
    equal = all(_equal(runs, name) for name in known)
    return (
        f"Whole models onto a GPU, weightlift beside each framework's own loader: {'; '.join(gains)}.\nWhat they make "
        f"of the same input is {'equal bit for bit' if equal else '**not equal**'}. "
        "Recorded in `benchmarks/results/integrations.json` by `benchmarks/integrations.py`."
    )


BLOCKS: Final = {
    known.page: {
        f"integrations {name}": ("integrations", _block(name))
        for name, one in FRAMEWORKS.items()
        if one.page == known.page
    }
    for known in FRAMEWORKS.values()
}
"""What stands on the pages under ``docs/integrations``."""
