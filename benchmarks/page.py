"""The page of published figures, ``docs/benchmarks.md``, and the results on other pages, from ``benchmarks/results``.

``python benchmarks/page.py`` writes them; ``--check`` writes nothing and fails where one is not what the results say.
No figure is typed by hand, what was missed stands first, and what was not measured is said too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import bench_figures
import coverage_table
import integration_figures
import page_parts
import readme_table
import reliability_figures
from page_parts import Known
from page_tables import Part, cells, escaped, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Results = Mapping[str, Mapping[str, Any]]
    Block = tuple[str, Callable[[Mapping[str, Any]], str]]

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGE: Final = ROOT / "docs" / "benchmarks.md"
BLOCKS: Final[dict[Path, Mapping[str, Block]]] = {
    ROOT / "README.md": {**readme_table.BLOCKS, "integrations": ("integrations", integration_figures.summary)},
    ROOT / "docs" / "reliability.md": {**reliability_figures.BLOCKS, **coverage_table.BLOCKS},
    **{ROOT / "docs" / "integrations" / f"{page}.md": blocks for page, blocks in integration_figures.BLOCKS.items()},
}
"""Pages with figures between other text, and their blocks: the results file, and what writes its figures."""
MARK: Final = "<!-- {edge} of what benchmarks/page.py writes: {name} -->"

INTRODUCTION: Final = """\
# Benchmarks

<!-- written by benchmarks/page.py -->

Every figure on this page is read from a file under `benchmarks/results`, written by the script that is named with it.
[How the figures are taken](benchmarks-method.md) explains the method. In short: a fresh process per run; the state of
the page cache is verified before each; cases alternate in rounds; medians are given with the smallest and the largest
value; a ratio is taken within a round; the worst run decides a limit. *cold* means that nothing of the file is in the
page cache, *warm* that all of it is, *half-warm* every second 16 MiB. The device `null` reads and discards. Mapped
tensors count once every page of them was touched."""

NEVER: Final = """\
No figure on this page comes from:

- AMD cards, Intel and Apple devices, machines whose cards share the processor's memory
- macOS and Windows
- network file systems, and several machines at once
- machines with several memory nodes
- disks and machines other than those named with each figure"""

KNOWN: Final[dict[str, Known]] = {
    "cpu": Known(
        "Into CPU memory",
        "benchmarks/cpu.py",
        "every read path into CPU memory",
        page_parts.by_sections,
        {
            "raw": "raw reads of the disk",
            "tuning": "other loaders' settings",
            "paths": "every read path",
            "large": "a file of twice the size",
            "peers": "other loaders",
            "busy": "beside a Python thread that computes",
            "budgets": "what a small budget costs",
            "residue": "what stays in the page cache",
            "small": "220,000 small tensors",
        },
        (("cpu.svg", "Loads into CPU memory along every path, and beside other loaders"),),
    ),
    "gpu": Known(
        "Onto a GPU",
        "benchmarks/gpu.py",
        "loads onto a GPU",
        page_parts.gpu,
        {
            "warm": "from the page cache",
            "cold": "from a loop device over memory",
            "half-warm": "every second 16 MiB cached",
            "busy": "beside a Python thread that computes",
            "budgets": "small budgets",
            "shapes": "quantised models and very many tensors",
            "disk": "the machine's own disk",
            "concurrency": "workers and chunk sizes",
            "cards": "several cards at once, with `--devices cuda:0,cuda:1`",
        },
        (
            ("gpu.svg", "How near to the ceiling every loader comes, by state"),
            ("cards.svg", "One card and several, out of the page cache"),
        ),
    ),
    "bench": Known(
        "What the command bench says of a card",
        "benchmarks/bench_command.py",
        "`weightlift bench` with a card",
        bench_figures.part,
    ),
    "self-test": Known(
        "The self-test on a card",
        "",
        "`weightlift doctor --self-test`, every path, staging and engine onto a real card",
        reliability_figures.part_of_self_test,
    ),
    "scaling": Known(
        "How loads grow",
        "benchmarks/scaling.py",
        "time and memory over bytes, tensors, workers and budgets",
        page_parts.by_sections,
        {
            "bytes": "1 to 64 GB",
            "tensors": "1 to 220,000 tensors",
            "workers": "1 to 32 reading threads",
            "budgets": "8 MiB to 1 GiB of host memory",
        },
        (("scaling.svg", "Time and memory over bytes, tensors, workers and budgets"),),
    ),
    "giant": Known(
        "141 GB inside 512 MiB", "benchmarks/giant.py", "anonymous memory of a sparse 70B model", page_parts.giant
    ),
    "bug": Known(
        "More than there is memory for",
        "benchmarks/bug.py",
        "a checkpoint twice as large as the memory allowed",
        page_parts.bug,
        pictures=(
            ("bug.svg", "Memory of a control group while a checkpoint twice its size is loaded in several ways"),
        ),
    ),
    "gguf": Known(
        "GGUF",
        "benchmarks/gguf_files.py",
        "GGUF files",
        page_parts.gguf,
        {
            "opening": "a large vocabulary",
            "cold": "every path beside safetensors, out of storage",
            "warm": "the same out of the page cache",
        },
    ),
    "llama_cpp": Known(
        "Beside llama.cpp", "benchmarks/llama_cpp.py", "llama.cpp's load modes on the same file", page_parts.llama_cpp
    ),
    "calls": Known(
        "Single calls of the safetensors face", "benchmarks/calls.py", "calls through the face", page_parts.calls
    ),
    "calls-gpu": Known(
        "Single calls of the safetensors face, onto a card",
        "benchmarks/calls.py --device cuda:0 --output benchmarks/results/calls-gpu.json",
        "calls through the face that bring tensors onto a card",
        page_parts.calls,
    ),
    "integrations": Known(
        "Under the frameworks that load models",
        "benchmarks/integrations.py --output benchmarks/results/integrations.json",
        "load times of a framework with weightlift underneath",
        integration_figures.part,
    ),
    "verify": Known(
        "What verifying adds", "benchmarks/verify.py", "digests beside reading and loading", page_parts.verify
    ),
    "guard": Known("Guard", "benchmarks/guard.py", "another program beside a catastrophe", page_parts.guard),
    "warm": Known("Filling the page cache", "benchmarks/warm.py", "ways to fill the page cache", page_parts.warm),
    "monitoring": Known("What watching costs", "benchmarks/monitoring.py", "watching a load", page_parts.monitoring),
    "doctor": Known("How long doctor takes", "benchmarks/doctor.py", "the command doctor", page_parts.doctor),
    "fuzz": Known("Fuzzing", "", "random and mutated input for every reader of files", page_parts.fuzz),
    "coverage": Known("Coverage of the tests", "", "statements and branches that the tests reach", coverage_table.part),
    "mutation": Known("Mutations", "", "changes of the code that the tests notice", page_parts.mutation),
    "faults": Known(
        "Faults", "benchmarks/faults.py", "tests that make faults and hostile files", reliability_figures.part_of_faults
    ),
    "pythons": Known(
        "Other Pythons", "benchmarks/pythons.py", "the tests under other Pythons", reliability_figures.part_of_pythons
    ),
    "portability": Known(
        "Without parts of Linux",
        "benchmarks/portability.py",
        "the unit tests while something is missing",
        reliability_figures.part_of_portability,
    ),
    "endurance": Known(
        "Many loads in one process", "benchmarks/endurance.py", "what loads leave", page_parts.endurance
    ),
}
"""Every results file that there should be, in the page's order; without a command it is not a benchmark's."""


def read(folder: Path) -> dict[str, Any]:
    """Every results file by its name, those first that have a place on the page."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {
        name: found[name] for name in (*(name for name in KNOWN if name in found), *sorted(set(found) - set(KNOWN)))
    }


def page(results: Results, pictures: Path) -> str:
    """The whole page."""
    parts = {
        name: KNOWN[name].render(result) if name in KNOWN else page_parts.other(result)
        for name, result in results.items()
    }
    text = [INTRODUCTION, "## Targets, and which were missed", *reached(parts)]
    for name, part in parts.items():
        known = KNOWN.get(name)
        text.append(f"## {known.title if known else escaped(name)}")
        text.append(f"`benchmarks/results/{name}.json`" + (f": {known.question}." if known else "."))
        for file, shown in known.pictures if known else ():
            if (pictures / file).exists():
                text.append(f"![{shown}](pictures/{file})")
        text += part.text
    text += ["## Not measured", *not_measured(results)]
    return "\n\n".join(text) + "\n"


def title(name: str) -> str:
    """A results file as the page calls it."""
    return KNOWN[name].title if name in KNOWN else escaped(name)


def reached(parts: Mapping[str, Part]) -> Iterator[str]:
    """How many targets each file has and reached, and every one that was missed."""
    rows, missed = [], []
    for name, part in parts.items():
        judged = [target.reached for target in part.targets if target.wanted]
        if judged:
            rows.append((title(name), judged.count(True), judged.count(False), judged.count(None)))
            missed += [
                (title(name), *cells(target)[:3])
                for target in part.targets
                if target.wanted and target.reached is False
            ]
    everything = [sum(column) for column in zip(*(row[1:] for row in rows), strict=True)] or [0, 0, 0]
    yield f"Of {sum(everything)} targets {everything[0]} were reached and {everything[1]} missed."
    yield table(("figures", "reached", "missed", "no figure"), rows)
    yield "Missed:" if missed else "None was missed."
    if missed:
        yield table(("figures", "claim", "measured", "target"), missed)


def not_measured(results: Results) -> Iterator[str]:
    """Results files and sections that are not there, with the command that would write them."""
    lines = []
    for name, known in KNOWN.items():
        if name not in results:
            lines.append(f"- {known.question}" + (f": `python {known.command}`" if known.command else ""))
            continue
        for section, question in known.sections.items():
            if section not in results[name]:
                lines.append(f"- {known.title}, {question}: `python {known.command} --only {section}`")
    if lines:
        yield "These have no results in the tree:"
        yield "\n".join(lines)
    yield NEVER


def filled(page: Path, blocks: Mapping[str, Block], results: Results) -> str:
    """A page with the marked blocks in it as the results are now.

    Raises:
        ValueError: a mark is missing.
    """
    text = page.read_text(encoding="utf-8")
    for name, (source, write) in blocks.items():
        first, last = (MARK.format(edge=edge, name=name) for edge in ("start", "end"))
        before, found, rest = text.partition(first)
        _, ended, after = rest.partition(last)
        if not found or not ended:
            raise ValueError(f"{page.name} has no `{first}` and `{last}`")
        shown = write(results[source]) if source in results else f"Not recorded yet: there is no `{source}.json`."
        text = f"{before}{first}\n{shown}\n{last}{after}"
    return text


def main() -> int:
    """Write all pages, or say which is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder with the results")
    parser.add_argument("--output", type=Path, help="write the page alone, to this file")
    chosen = parser.parse_args()
    results = read(chosen.results)
    wanted = {chosen.output or PAGE: page(results, PAGE.parent / "pictures")}
    if chosen.output is None:
        wanted |= {place: filled(place, blocks, results) for place, blocks in BLOCKS.items()}
    outdated = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in outdated:
        if chosen.check:
            print(f"{path.name} is not what the results say: run benchmarks/page.py")
        else:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if outdated and chosen.check else 0


if __name__ == "__main__":
    sys.exit(main())
