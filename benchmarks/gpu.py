"""The GPU figures in one command: ``python benchmarks/gpu.py`` writes ``benchmarks/results/gpu.json``.

For a machine with a GPU and root, which needs no network. Sets up the disk and the checkpoints, runs the sections that
were asked for and keeps the others' earlier results. ``benchmarks/gpu_plot.py`` draws them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import claims
import environment
import gpu_checkpoints
import gpu_harness
import gpu_sections
import harness
import raw
import running
import tables
from gpu_fractions import fractions, worst
from gpu_peers import Peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from harness import Checkpoint

GIB = 1 << 30
RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
NAMES = tuple(gpu_sections.SECTIONS)
SEVERAL = "cards"
"""The section about several devices; all others are about the first."""
SPARE_BYTES = 16 * GIB
PACKAGES = ("torch", "safetensors", "fastsafetensors", "instanttensor", "runai-model-streamer")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"sections, with commas (default: all that can run): {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=5, help="runs of every case (default 5)")
    parser.add_argument("--size", type=float, default=8.0, help="GiB of the main checkpoint; cold ones are half of it")
    parser.add_argument("--seconds", type=float, default=3600.0, help="divide this time among the sections")
    parser.add_argument(
        "--devices",
        default="cuda:0",
        help="where to, with commas; the first but for `cards`; cpu tries the script itself",
    )
    parser.add_argument("--rc-folder", type=Path, help="where safetensors 0.9.0rc1 was installed by itself")
    parser.add_argument("--disk", type=Path, help="a folder on the disk for the section `disk`")
    parser.add_argument("--loaders", default="*", help="only peers whose names match one of these globs")
    parser.add_argument("--no-peers", action="store_true", help="weightlift and the ceilings alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    chosen = parser.parse_args()
    chosen.devices = chosen.devices.split(",")
    able = [name for name in NAMES if name != SEVERAL or len(chosen.devices) > 1]
    chosen.only = able if chosen.only is None else [name for name in chosen.only.split(",") if name]
    unknown = sorted(set(chosen.only) - set(NAMES))
    if unknown:
        parser.error(f"no section called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if not set(chosen.only) <= set(able):
        parser.error(f"the section {SEVERAL} needs several --devices")
    return chosen


def make_checkpoints(
    chosen: argparse.Namespace, folder: Path, scratch: Path, needed: set[str]
) -> dict[str, Checkpoint]:
    """The checkpoints that the chosen sections need, by name."""
    size = int(chosen.size * GIB)
    small = max(1000, int(gpu_checkpoints.SMALL_TENSORS * min(1.0, chosen.size / 8)))
    makers: Mapping[str, Callable[[], Checkpoint]] = {
        "main": lambda: gpu_checkpoints.write(folder, scratch, gpu_checkpoints.llama(size), "main"),
        "cold": lambda: gpu_checkpoints.write(folder, scratch, gpu_checkpoints.llama(size // 2), "cold"),
        "exl2": lambda: gpu_checkpoints.write(folder, scratch, gpu_checkpoints.exl2(size), "exl2"),
        "small": lambda: gpu_checkpoints.write(folder, scratch, gpu_checkpoints.small(small), "small"),
        "many": lambda: gpu_checkpoints.write(folder, scratch, gpu_checkpoints.many(size), "many"),
        "disk": lambda: gpu_checkpoints.write(
            chosen.disk or scratch, scratch, gpu_checkpoints.llama(size // 2), "disk"
        ),
    }
    return {name: makers[name]() for name in sorted(needed)}


def disk_bytes(chosen: argparse.Namespace, needed: set[str]) -> int:
    """Room that the checkpoints on the disk of memory take."""
    parts = {"main": 1.0, "cold": 0.5, "exl2": 1.1, "small": 0.3, "many": 0.8}
    return int(chosen.size * GIB * sum(parts.get(name, 0) for name in needed)) + GIB


@contextlib.contextmanager
def fast_disk(size: int) -> Iterator[Path]:
    """A disk of memory, on a machine whose memory was made to grow to what all will need."""
    from weightlift.testing.fast_disk import fast_disk as make

    environment.grow_memory(2 * size + SPARE_BYTES)
    with make(size) as folder:
        yield folder


def note(number: int, case: harness.Case, run: claims.Run) -> None:
    """One line per run."""
    second = run.get("second_gigabytes_per_second")
    said = run.get("error") or f"{claims.speed(run):.2f} GB/s" + (f", then {second:.2f}" if second else "")
    tables.run(number, case.name, said)


def run_section(name: str, context: gpu_sections.Context, count: int, deadline: float) -> dict[str, Any]:
    """Measure one section, print its tables and return its results."""
    make, _ = gpu_sections.SECTIONS[name]
    section = make(context)
    title = (make.__doc__ or name).splitlines()[0].rstrip(".")
    runs = running.rounds(section.cases, count, note, deadline=deadline, using=gpu_harness.measure, make_room=False)
    for case in section.cases:
        if case.loads > 1:
            runs[case.name + gpu_sections.SECOND] = [
                {"gigabytes_per_second": run.get("second_gigabytes_per_second")} for run in runs[case.name]
            ]
    result: dict[str, Any] = {
        "title": title,
        "rounds": min(map(len, runs.values()), default=0),
        "cases": [
            harness.summary(case, runs[case.name], gpu_harness.FIGURES) | {"checkpoint": case.checkpoint.tensor_bytes}
            for case in section.cases
        ],
        "ratios": [claims.evaluate(ratio, runs) for ratio in section.ratios],
        "limits": [claims.judge(limit, runs) for limit in section.limits],
        "fractions": fractions(section, runs),
    }
    tables.cases(title, result["cases"])
    tables.claims(result["ratios"], result["limits"])
    return result


def taken(chosen: argparse.Namespace, folder: Path, made: Mapping[str, Checkpoint], peers: Peers) -> dict[str, Any]:
    """Where and how the figures of one run were taken."""
    import torch

    gpus = [torch.cuda.get_device_name(name) for name in chosen.devices if name.startswith("cuda")]
    return environment.record(folder) | {
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "peer_packages": {name: environment.version(name) for name in PACKAGES}
        | {"rc": chosen.rc_folder.name if chosen.rc_folder else ""},
        "peers_missing": peers.missing(),
        "checkpoints": {
            name: {"tensors": one.tensors, "tensor_bytes": one.tensor_bytes, "files": len(one.files)}
            for name, one in made.items()
        },
        "memory_warmed": "before every run: as much as the run's page cache and staging take",
    }


def main() -> None:
    """Run the chosen sections, writing after each what there is so far."""
    chosen = arguments()
    deadline = time.monotonic() + chosen.seconds
    needed: set[str] = set().union(*(gpu_sections.SECTIONS[name][1] for name in chosen.only))
    results: dict[str, Any] = json.loads(chosen.output.read_text()) if chosen.output.exists() else {"schema": 1}
    peers, globs = Peers(chosen.rc_folder), chosen.loaders.split(",")
    # Ended by a signal, the disk of memory is still to be undone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightlift-gpu-", dir=chosen.disk)))
        folder = stack.enter_context(fast_disk(disk_bytes(chosen, needed)))
        made = make_checkpoints(chosen, folder, scratch, needed)
        context = gpu_sections.Context(
            made,
            []
            if chosen.no_peers
            else [one for one in peers.present() if any(fnmatch(one[0].name, glob) for glob in globs)],
            raw.build(scratch),
            tuple(chosen.devices),
        )
        alone = dataclasses.replace(context, devices=context.devices[:1])
        where = taken(chosen, folder, made, peers)
        ordered = sorted(chosen.only, key=NAMES.index)
        for position, name in enumerate(ordered):
            now = time.monotonic()
            until = now + (deadline - now) / (len(ordered) - position)
            using = context if name == SEVERAL else alone
            place = where | {"gpus": where["gpus"][: len(using.devices)]}
            results[name] = {"taken": place} | run_section(name, using, chosen.rounds, until)
            results["worst"] = worst({key: results[key] for key in NAMES if key in results})
            chosen.output.parent.mkdir(parents=True, exist_ok=True)
            chosen.output.write_text(json.dumps(results, indent=1) + "\n")
        tables.fractions(results["worst"])
    tables.CONSOLE.print(f"written: {chosen.output}")


if __name__ == "__main__":
    main()
