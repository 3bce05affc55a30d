"""How long ``weightlift doctor`` takes: ``python benchmarks/doctor.py`` writes ``benchmarks/results/doctor.json``.

The whole command in a fresh process, without a path and with that of a cold file, whose speed probes read the disk that
it lies on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import environment
from claims import spread

from weightlift.health.cache.evict import evict
from weightlift.health.cache.files import find_files

RESULTS = Path(__file__).resolve().parent / "results" / "doctor.json"
FILE_BYTES = 1 << 30
LIMIT_SECONDS = {"machine": 5.0, "path": 15.0}
DOCTOR_CODES = (0, 3)


def measure(paths: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of every run, and what could not be checked in it."""
    seconds, gaps = [], []
    for _ in range(rounds):
        evict(find_files(paths))
        start = time.perf_counter()
        command = [sys.executable, "-m", "weightlift", "doctor", "--json", *paths]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        if done.returncode not in DOCTOR_CODES:
            raise RuntimeError(f"doctor left with {done.returncode}: {done.stderr.strip()[-300:]}")
        gaps.append(json.loads(done.stdout)["not_checked"])
    return {"seconds": spread(seconds), "runs": seconds, "not_checked": gaps}


def main() -> None:
    """Measure both and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of either kind (default 5)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    chosen = parser.parse_args()
    from weightlift.testing import llama_specs, write_checkpoint

    with tempfile.TemporaryDirectory(prefix="weightlift-doctor-") as folder:
        path = write_checkpoint(Path(folder) / "model.safetensors", llama_specs(FILE_BYTES))
        result: dict[str, Any] = {"schema": 1, "taken": environment.record(Path(folder))}
        for name, paths in (("machine", []), ("path", [str(path)])):
            found = measure(paths, chosen.rounds)
            worst = max(found["runs"])
            result[name] = found | {"at_most_seconds": LIMIT_SECONDS[name], "reached": worst <= LIMIT_SECONDS[name]}
            print(f"{name}: {found['seconds']['median']:.1f} s, at most {worst:.1f} of {LIMIT_SECONDS[name]:.0f} s")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
