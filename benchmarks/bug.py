"""The bug in one picture: ``python benchmarks/bug.py`` writes ``benchmarks/results/bug.json`` and draws it.

A checkpoint twice as large as a control group's limit is loaded inside the group by the safetensors library and by
weightlift's read paths, while the group's anonymous memory and page cache are sampled. Needs root. ``--draw`` only
draws the picture again from the results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import environment
from bug_picture import draw
from states import CacheState, prepare

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bug.json"
PICTURE = HERE.parent / "docs" / "pictures" / "bug.svg"
WORKER = HERE / "bug_worker.py"
MIB = 1 << 20
SAMPLE_SECONDS = 0.005
POINTS_MAX = 160
TENSOR_MIB = 16


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=512, help="MiB of the control group (default 512)")
    parser.add_argument("--times", type=int, default=2, help="size of the checkpoint in limits (default 2)")
    parser.add_argument("--folder", type=Path, help="make the checkpoint here instead of in the temporary folder")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the SVG file")
    parser.add_argument("--draw", action="store_true", help="only draw the results that are there")
    return parser.parse_args()


def measure(way: str, files: Sequence[str], limit_bytes: int) -> dict[str, Any]:
    """Load once in a group of its own."""
    from weightlift.testing.cgroup import memory_cgroup

    prepare(files, CacheState.COLD)
    command = [sys.executable, str(WORKER), way, *files]
    samples: list[tuple[float, int, int]] = []
    with memory_cgroup(limit_bytes) as group:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{way}: the worker ended before it began")
            # What was imported stays charged elsewhere: only the load counts.
            group.add(process.pid)
            begun = time.monotonic()
            process.stdin.write("go\n")
            process.stdin.flush()
            while process.poll() is None:
                now = time.monotonic() - begun
                samples.append((round(now, 4), group.anonymous_bytes(), group.page_cache_bytes()))
                time.sleep(SAMPLE_SECONDS)
            ended = time.monotonic() - begun
            done = process.stdout.read() == "done\n"
        kills = group.oom_kills()
    if not done and not kills:
        raise RuntimeError(f"{way}: the worker failed with {process.returncode}")
    return {
        "way": way,
        "done": done,
        "seconds": ended,
        "oom_kills": kills,
        "peak_anonymous_bytes": max(anonymous for _, anonymous, _ in samples),
        "samples": thinned(samples),
    }


def thinned(samples: Sequence[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """At most so many samples as a picture can show; each is the highest of those it stands for."""
    every = -(-len(samples) // POINTS_MAX)
    groups = (samples[index : index + every] for index in range(0, len(samples), every))
    return [(group[-1][0], max(each[1] for each in group), max(each[2] for each in group)) for group in groups]


def take(chosen: argparse.Namespace) -> None:
    """Make the checkpoint, measure every way and write the results."""
    from bug_worker import WAYS

    from weightlift.testing import TensorSpec, write_checkpoint

    with tempfile.TemporaryDirectory(prefix="weightlift-bug-", dir=chosen.folder) as folder:
        specs = [
            TensorSpec(f"layers.{number}", "U8", (TENSOR_MIB * MIB,))
            for number in range(chosen.limit * chosen.times // TENSOR_MIB)
        ]
        files = [str(write_checkpoint(Path(folder) / "model.safetensors", specs))]
        taken = environment.record(Path(folder))
        runs = [measure(way, files, chosen.limit * MIB) for way in WAYS]
    for run in runs:
        print(
            f"{run['way']:22} {'done' if run['done'] else 'KILLED'} after {run['seconds']:.2f} s, "
            f"anonymous at most {run['peak_anonymous_bytes'] / MIB:.0f} MiB"
        )
    result = {
        "schema": 1,
        "taken": taken,
        "limit_bytes": chosen.limit * MIB,
        "checkpoint_bytes": sum(spec.nbytes for spec in specs),
        "runs": runs,
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result) + "\n")


def main() -> None:
    """Measure, unless told not to, and draw."""
    chosen = arguments()
    if not chosen.draw:
        take(chosen)
    chosen.picture.parent.mkdir(parents=True, exist_ok=True)
    chosen.picture.write_text(draw(json.loads(chosen.output.read_text())))
    print(f"drawn: {chosen.picture}")


if __name__ == "__main__":
    main()
