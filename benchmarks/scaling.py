"""How loads grow, in one command: ``python benchmarks/scaling.py`` writes ``benchmarks/results/scaling.json``.

Time and peak anonymous memory over bytes (1 to 64 GB), tensors (1 to 220,000 in the same bytes), workers (1 to 32) and
budgets (8 MiB to 1 GiB). Every section makes a disk of its own, and the results of the others stay in the file.
``benchmarks/scaling_plot.py`` draws them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoints
import claims
import environment
import harness
import running
import tables
from harness import MIB
from scaling_sections import QUICK, SECTIONS, Context, Scale, Sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from harness import Case, Checkpoint

RESULTS = Path(__file__).resolve().parent / "results" / "scaling.json"
LEFT_FREE_BYTES = 2 * 1024 * MIB
SHARD_HEADER_BYTES = MIB
TENSOR_HEADER_BYTES = 256
REPORTED = ("engine", "workers", "chunk_bytes", "phases", "method", "cache", "host_memory", "bottleneck")
"""What is kept of weightlift's own reports, which also list every file."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, with commas: {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=5, help="runs of every case (default 5)")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few MB; its figures mean nothing")
    parser.add_argument("--folder", type=Path, help="make the checkpoints here instead of on a disk of memory")
    parser.add_argument("--framework", choices=("torch", "numpy"), default="torch", help="tensors on the CPU are of it")
    parser.add_argument(
        "--output", type=Path, help="the JSON file with the results (default: the one of the record, or none if quick)"
    )
    chosen = parser.parse_args()
    chosen.only = [name for name in chosen.only.split(",") if name]
    unknown = sorted(set(chosen.only) - set(SECTIONS))
    if unknown:
        parser.error(f"no section called {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if chosen.quick:
        chosen.rounds = min(chosen.rounds, 1)
    elif chosen.output is None:
        chosen.output = RESULTS
    return chosen


def fitting(sizes: Sizes, folder: Path | None) -> Sizes:
    """The sizes without those checkpoints that neither the disk nor the memory for their tensors has room for."""
    from weightlift.host.memory import headroom

    free = headroom()
    # A disk of memory takes as much again as the tensors.
    room = ((free.available_bytes if free else 0) - LEFT_FREE_BYTES) / (1 if folder else 2)
    if folder:
        room = min(room, shutil.disk_usage(folder).free - LEFT_FREE_BYTES)
    least, *more = sizes.written
    return dataclasses.replace(sizes, written=(least, *(count for count in more if count * sizes.shard_bytes <= room)))


@contextlib.contextmanager
def disk(folder: Path | None, room: int) -> Iterator[Path]:
    """An empty folder for a section's checkpoints, which goes with them afterwards."""
    if folder:
        with tempfile.TemporaryDirectory(prefix="weightlift-scaling-", dir=folder) as name:
            yield Path(name)
        return
    from weightlift.testing.fast_disk import fast_disk

    with fast_disk(room) as made:
        yield made


def disk_bytes(sizes: Sizes, kinds: Sequence[str]) -> int:
    """Room that these kinds of checkpoints take."""
    parts = {
        "sparse": max(sizes.sparse) * SHARD_HEADER_BYTES,
        "written": max(sizes.written) * (sizes.shard_bytes + SHARD_HEADER_BYTES),
        "divided": len(sizes.tensors) * sizes.divided_bytes + sum(sizes.tensors) * TENSOR_HEADER_BYTES,
        "main": sizes.main_bytes + SHARD_HEADER_BYTES,
    }
    return sum(parts[kind] for kind in kinds) + 64 * MIB


def make_checkpoints(
    sizes: Sizes, kinds: Sequence[str], folder: Path, scratch: Path
) -> dict[str, dict[int, Checkpoint]]:
    """The checkpoints of these kinds, by the quantity that grows in them."""
    makers: Mapping[str, Callable[[], dict[int, Checkpoint]]] = {
        "sparse": lambda: checkpoints.sharded(folder, scratch, sizes.sparse, sizes.shard_bytes, sparse=True),
        "written": lambda: checkpoints.sharded(folder, scratch, sizes.written, sizes.shard_bytes, sparse=False),
        "divided": lambda: {
            count: checkpoints.divided(folder, scratch, sizes.divided_bytes, count) for count in sizes.tensors
        },
        "main": lambda: {1: checkpoints.llama(folder, scratch, sizes.main_bytes)},
    }
    return {kind: makers[kind]() for kind in kinds}


def note(number: int, case: Case, run: claims.Run) -> None:
    """One line per run, so that a long benchmark shows that it lives."""
    said = run.get("error")
    if said is None:
        seconds = run["touched_seconds"] or run["seconds"]
        said = f"{seconds:.3f} s, {run['extra_anonymous_bytes'] / MIB:.1f} MiB beside the tensors"
    tables.run(number, case.name, said)


def summed(scale: Scale, runs: Mapping[str, list[claims.Run]]) -> dict[str, Any]:
    """A section's results."""
    for made in runs.values():
        for run in made:
            if "report" in run:
                run["report"] = {key: run["report"].get(key) for key in REPORTED}
    figure = "extra_anonymous_bytes"
    differences = {
        name: [
            {figure: after[figure] - before[figure]}
            for before, after in zip(runs[least], runs[most], strict=True)
            if figure in before and figure in after
        ]
        for name, (least, most) in scale.grown.items()
    }
    return {
        "axis": scale.axis,
        "cases": [
            {
                "series": point.series,
                "x": point.x,
                "sparse": point.sparse,
                "tensor_bytes": point.case.checkpoint.tensor_bytes,
                "tensors": point.case.checkpoint.tensors,
            }
            | harness.summary(point.case, runs[point.case.name])
            for point in scale.points
        ],
        "ratios": [claims.evaluate(ratio, runs) for ratio in scale.ratios],
        "limits": [claims.judge(limit, {**runs, **differences}) for limit in scale.limits],
    }


def run_section(name: str, chosen: argparse.Namespace, sizes: Sizes, scratch: Path) -> dict[str, Any]:
    """Make a section's disk and checkpoints, measure it, print its tables and return its results."""
    make, kinds = SECTIONS[name]
    title = (make.__doc__ or name).splitlines()[0].rstrip(".")
    stock = environment.version("safetensors") if environment.version("torch") else None
    with disk(chosen.folder, disk_bytes(sizes, kinds)) as folder:
        taken = environment.record(folder) | {
            "rounds": chosen.rounds,
            "quick": chosen.quick,
            "memory_warmed": "before every run: as much as the run's destination and page cache take",
            "safetensors_beside": stock,
        }
        made = make_checkpoints(sizes, kinds, folder, scratch)
        context = Context(sizes=sizes, checkpoints=made, framework=chosen.framework, stock=stock)
        scale = make(context)
        cases = [point.case for point in scale.points]
        if chosen.quick:
            # No figure counts, so memory need not be made ready for one.
            cases = [dataclasses.replace(case, memory_bytes=0) for case in cases]
        runs = running.rounds(cases, chosen.rounds, note)
    result = {"taken": taken, "title": title} | summed(scale, runs)
    tables.cases(title, result["cases"])
    tables.claims(result["ratios"], result["limits"])
    return result


def main() -> int:
    """Run the chosen sections, writing after each what there is so far; 1 if a run failed."""
    chosen = arguments()
    output: Path | None = chosen.output
    results: dict[str, Any] = json.loads(output.read_text()) if output and output.exists() else {"schema": 1}
    sizes = fitting(QUICK if chosen.quick else Sizes(), chosen.folder)
    # Ended by a signal, the disk of memory is still to be undone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = 0
    for name in sorted(chosen.only, key=list(SECTIONS).index):
        with tempfile.TemporaryDirectory(prefix="weightlift-benchmarks-") as scratch:
            results[name] = run_section(name, chosen, sizes, Path(scratch))
        failed += sum(len(case["errors"]) for case in results[name]["cases"])
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")
            tables.CONSOLE.print(f"written: {output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
