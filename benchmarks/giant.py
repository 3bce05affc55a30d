"""The memory figure in one command: ``python benchmarks/giant.py`` writes ``benchmarks/results/giant.json``.

A sparse checkpoint with the shape of Llama 70B (141 GB) goes through the ``null`` device inside a memory control group
of 512 MiB, and one of 1 GB beside it. What counts is anonymous memory, which must not grow with the model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
import environment
import harness
import running
import tables
from harness import MIB, Case, Checkpoint
from sections import load
from states import CacheState

RESULTS = Path(__file__).resolve().parent / "results" / "giant.json"
DISK_BYTES = 256 * MIB
DIFFERENCE_MAX = 16 * MIB


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="direct", help="read path: direct (default), buffered (minutes) or auto")
    parser.add_argument("--limit", type=int, default=512, help="MiB of the control group (default 512)")
    parser.add_argument("--host-memory", default="128MiB", help="budget of the load (default 128MiB)")
    parser.add_argument("--workers", type=int, help="a fixed number of threads, so that both sizes use as many slots")
    parser.add_argument("--rounds", type=int, default=1, help="runs of either checkpoint")
    parser.add_argument("--folder", type=Path, help="make the checkpoints here instead of on a disk of memory")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    return parser.parse_args()


def measure(chosen: argparse.Namespace, checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Load one checkpoint in a control group of its own and say what the kernel saw."""
    from weightlift.testing.cgroup import memory_cgroup

    options = {"method": chosen.method, "host_memory": chosen.host_memory}
    if chosen.workers:
        options["workers"] = chosen.workers
    plain = load(name, checkpoint, CacheState.COLD, device="null", **options)
    runs = []
    for _ in range(chosen.rounds):
        with memory_cgroup(chosen.limit * MIB) as group:
            contestant = dataclasses.replace(plain.contestant, prefix=tuple(group.command([])))
            run = running.once(Case(**_fields(plain) | {"contestant": contestant, "memory_bytes": chosen.limit * MIB}))
            runs.append(run | {"oom_kills": group.oom_kills(), "group_peak_bytes": group.max_usage_bytes()})
    return harness.summary(plain, runs)


def _fields(case: Case) -> dict[str, Any]:
    return {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}


def main() -> None:
    """Measure both sizes, compare their anonymous peaks and write the results."""
    from weightlift.testing import llama_70b_specs, llama_specs
    from weightlift.testing.fast_disk import fast_disk
    from weightlift.units import parse_bytes

    chosen = arguments()
    # Ended by a signal, the disk of memory is still to be undone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightlift-benchmarks-")))
        folder = chosen.folder or stack.enter_context(fast_disk(DISK_BYTES))
        taken = environment.record(folder)
        shapes = {"1 GB": llama_specs(10**9), "141 GB": llama_70b_specs()}
        rows = [
            measure(
                chosen, checkpoints.sparse(folder, scratch, specs, name.replace(" ", "")), f"{chosen.method}, {name}"
            )
            for name, specs in shapes.items()
        ]
    peaks = [row.get("extra_anonymous_bytes", {}).get("max") for row in rows]
    growth = peaks[1] - peaks[0] if None not in peaks else None
    result = {
        "schema": 1,
        "taken": taken,
        "cgroup_limit_bytes": chosen.limit * MIB,
        "cases": rows,
        "anonymous_growth_bytes": growth,
        "anonymous_growth_at_most": DIFFERENCE_MAX,
        "growth_reached": None if growth is None else growth <= DIFFERENCE_MAX,
        "budget_kept": None if None in peaks else max(peaks) <= parse_bytes(chosen.host_memory),
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    tables.cases(f"through the null device in a control group of {chosen.limit} MiB", rows)
    tables.CONSOLE.print(f"anonymous peak, 141 GB minus 1 GB: {growth} bytes; written: {chosen.output}")


if __name__ == "__main__":
    main()
