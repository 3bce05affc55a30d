"""The CPU figures in one command: ``python benchmarks/cpu.py`` writes ``benchmarks/results/cpu.json``.

Sets up the disk and the checkpoints, runs the sections that were asked for and keeps the others' earlier results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoints
import claims
import environment
import harness
import peers
import raw
import running
import sections
import states
import tables

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 1 << 30
RESULTS = Path(__file__).resolve().parent / "results" / "cpu.json"
SMALL_TENSORS = 220_000
SWEEP_BYTES = GIB
NAMES = ("raw", "tuning", *sections.SECTIONS)
NEEDED = {name: wanted for name, (_, wanted) in sections.SECTIONS.items()}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(NAMES), help=f"sections, with commas: {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=5, help="runs of every case (default 5)")
    parser.add_argument("--size", type=float, default=2.0, help="GiB of the main checkpoint; `large` has twice that")
    parser.add_argument("--seconds", type=float, default=86400.0, help="divide this time among the sections")
    parser.add_argument("--match", default="*", help="only cases whose names match these globs, with | between them")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 0.25 GiB, 2 rounds, a short sweep")
    parser.add_argument("--checkpoint", type=Path, help="measure this file or folder where it lies; no disk is made")
    parser.add_argument("--folder", type=Path, help="make the checkpoints here instead of on a disk of memory")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    chosen = parser.parse_args()
    chosen.only = [name for name in chosen.only.split(",") if name]
    unknown = sorted(set(chosen.only) - set(NAMES))
    if unknown:
        parser.error(f"no section called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if chosen.quick:
        chosen.size, chosen.rounds = min(chosen.size, 0.25), min(chosen.rounds, 2)
    return chosen


@contextlib.contextmanager
def disk(chosen: argparse.Namespace, needed: set[str]) -> Iterator[Path]:
    """The folder for checkpoints: the given one, or a fast disk that is undone at the end."""
    given = chosen.folder or chosen.checkpoint
    if given:
        yield given if given.is_dir() else given.parent
        return
    from weightlift.testing.fast_disk import fast_disk

    size = int(chosen.size * GIB)
    room = size + 2 * size * ("large" in needed) + 2 * GIB * ("small" in needed) + GIB // 4
    with fast_disk(room) as folder:
        yield folder


def make_checkpoints(chosen: argparse.Namespace, folder: Path, scratch: Path, needed: set[str]) -> dict[str, Any]:
    """The checkpoints that the chosen sections need, by name."""
    size = int(chosen.size * GIB)
    if chosen.checkpoint:
        one = checkpoints.existing(chosen.checkpoint, scratch)
        return dict.fromkeys(needed, one)
    tensors = SMALL_TENSORS // 20 if chosen.quick else SMALL_TENSORS
    makers = {
        "main": lambda: checkpoints.llama(folder, scratch, size),
        "large": lambda: checkpoints.llama(folder, scratch, 2 * size),
        "small": lambda: checkpoints.many_small(folder, scratch, tensors),
    }
    return {name: makers[name]() for name in sorted(needed)}


def note(number: int, case: harness.Case, run: claims.Run) -> None:
    """One line per run."""
    said = run.get("error") or f"{claims.speed(run):.2f} GB/s"
    tables.run(number, case.name, said)


def run_section(name: str, context: sections.Context, chosen: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Measure one section, print its tables and return its results."""
    make, _ = sections.SECTIONS[name]
    section = sections.only(make(context), chosen.match)
    title = (make.__doc__ or name).splitlines()[0].rstrip(".")
    runs = running.rounds(section.cases, chosen.rounds, note, deadline=deadline)
    result: dict[str, Any] = {
        "title": title,
        "rounds": min(map(len, runs.values()), default=0),
        "cases": [harness.summary(case, runs[case.name]) for case in section.cases],
        "ratios": [claims.evaluate(ratio, runs) for ratio in section.ratios],
        "limits": [claims.judge(limit, runs) for limit in section.limits],
    }
    tables.cases(title, result["cases"])
    tables.claims(result["ratios"], result["limits"])
    return result


def run_sweep(context: sections.Context, quick: bool) -> dict[str, Any]:
    """The raw sweep over the main checkpoint."""
    checkpoint = context.checkpoints["main"]
    rows = raw.sweep(
        context.program,
        checkpoint,
        nbytes=min(SWEEP_BYTES, checkpoint.tensor_bytes),
        quick=quick,
        note=lambda point, run: note(0, raw.case(context.program, point, checkpoint), run),
    )
    tables.sweep(rows)
    return {"title": "raw sweep", "rows": rows}


def tune_peers(context: sections.Context) -> dict[str, Any]:
    """The best setting of every peer in each state."""
    found = {
        str(state): {
            peer.name: peers.tune(peer, context.checkpoints["main"], state, note)
            for peer in peers.PEERS
            if peer.candidates
        }
        for state in (states.CacheState.COLD, states.CacheState.WARM)
    }
    return {"title": "the peers' settings", "states": found}


def main() -> None:
    """Run the chosen sections, writing after each what there is so far."""
    chosen = arguments()
    if {"tuning", "peers", "small"}.intersection(chosen.only):
        reason = peers.missing()
        if reason:
            raise SystemExit(reason)
    needed = {name for section in chosen.only for name in NEEDED.get(section, ("main",))}
    results: dict[str, Any] = json.loads(chosen.output.read_text()) if chosen.output.exists() else {"schema": 1}
    # Ended by a signal, the disk of memory is still to be undone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightlift-benchmarks-")))
        folder = stack.enter_context(disk(chosen, needed))
        made = make_checkpoints(chosen, folder, scratch, needed)
        taken = environment.record(folder) | {
            "rounds": chosen.rounds,
            "checkpoints": {
                name: {"tensors": one.tensors, "tensor_bytes": one.tensor_bytes, "files": len(one.files)}
                for name, one in made.items()
            },
            "peer_packages": environment.python_packages(str(peers.PYTHON)),
            "memory_warmed": "before every run: as much as the run's destination and page cache take",
        }
        context = sections.Context(made, raw.build(scratch))
        end = time.monotonic() + chosen.seconds
        for left, name in zip(range(len(chosen.only), 0, -1), sorted(chosen.only, key=NAMES.index), strict=True):
            now = time.monotonic()
            rows, tuning = results.get("raw", {}).get("rows", []), results.get("tuning", {}).get("states", {})
            context = sections.Context(made, context.program, rows, tuning)
            if name == "raw":
                result = run_sweep(context, chosen.quick)
            elif name == "tuning":
                result = tune_peers(context)
            else:
                result = run_section(name, context, chosen, now + (end - now) / left)
            results[name] = {"taken": taken} | result
            chosen.output.parent.mkdir(parents=True, exist_ok=True)
            chosen.output.write_text(json.dumps(results, indent=1) + "\n")
    tables.CONSOLE.print(f"written: {chosen.output}")


if __name__ == "__main__":
    main()
