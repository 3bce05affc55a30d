"""What looking at digests adds: ``python benchmarks/verify.py`` writes ``benchmarks/results/verify.json``.

Reads one cold file on a disk that gives so many gigabytes a second and no more: a disk made of memory, held back by the
block controller of control groups (version 1). ``weightlift verify`` is compared with reading the same bytes and
discarding them, ``load(verify=…)`` with ``load``. Each runs in a fresh process; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import environment
import states
from claims import spread

from weightlift.bench.backed_memory import back_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS: Final = Path(__file__).resolve().parent / "results" / "verify.json"
GROUPS: Final = Path("/sys/fs/cgroup/blkio")
MIB: Final = 1 << 20
SPARE_BYTES: Final = 64 * MIB
OVERHEAD_AT_MOST: Final = 0.10
WAYS: Final = {
    "read and discarded": 'wl.load(path, device="null")',
    "weightlift verify": "assert wl.verify(path, manifest).ok",
    "load": 'wl.load(path, framework="numpy")',
    "load, verified": 'wl.load(path, framework="numpy", verify=manifest)',
}
COMPARED: Final = {"weightlift verify": "read and discarded", "load, verified": "load"}
WORKER: Final = """
import json, resource, sys, time
import numpy, xxhash
import weightlift as wl
path, manifest, action = sys.argv[1:]
call = compile(action, "way", "exec")
print("ready", flush=True)
sys.stdin.readline()
before, begin = time.process_time(), time.perf_counter()
exec(call)
seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "processor_seconds": time.process_time() - before}))
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of the checkpoint (default 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way (default 5)")
    parser.add_argument("--rates", default="0.5,1", help="GB/s of the disk, several after commas (default 0.5,1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    return parser.parse_args()


@contextlib.contextmanager
def held_back(folder: Path, rate: float) -> Iterator[list[str]]:
    """Words to put before a command line, whose reads of the disk under ``folder`` then take at most ``rate`` GB/s."""
    if not (GROUPS / "blkio.throttle.read_bps_device").exists():
        raise SystemExit(f"no disk can be held back here: {GROUPS} has no throttle (needs control groups, version 1)")
    device = os.stat(folder).st_dev
    group = Path(tempfile.mkdtemp(prefix="weightlift-verify-", dir=GROUPS))
    try:
        limit = f"{os.major(device)}:{os.minor(device)} {int(rate * 1e9)}"
        (group / "blkio.throttle.read_bps_device").write_text(limit)
        yield ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
    finally:
        group.rmdir()


def measure(words: list[str], path: Path, manifest: Path, way: str) -> dict[str, float]:
    """One run from a cold file in a process of its own; imports and opening the interpreter are not counted."""
    size = path.stat().st_size
    command = [*words, sys.executable, "-c", WORKER, str(path), str(manifest), WAYS[way]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{way}: the worker did not start")
        states.prepare([str(path)], states.CacheState.COLD)
        back_memory(3 * size)
        said, _ = process.communicate("go\n")
    if process.returncode:
        raise RuntimeError(f"{way}: the worker left with {process.returncode}")
    run: dict[str, float] = json.loads(said)
    return run | {"gigabytes_per_second": size / run["seconds"] / 1e9}


def at_rate(rate: float, path: Path, manifest: Path, rounds: int) -> dict[str, Any]:
    """Every way on a disk of one speed, round by round."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with held_back(path.parent, rate) as words:
        for number in range(rounds):
            names = [*WAYS]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                runs[name].append(measure(words, path, manifest, name))
    figures = ("seconds", "gigabytes_per_second", "processor_seconds")
    return {
        "gigabytes_per_second": rate,
        "cases": [
            {"name": name, "runs": made} | {figure: spread([run[figure] for run in made]) for figure in figures}
            for name, made in runs.items()
        ],
        "overheads": [overhead(name, below, runs) for name, below in COMPARED.items()],
    }


def overhead(name: str, below: str, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What one way takes over another, as a fraction of the other, round by round; the median decides."""
    value = spread([mine["seconds"] / less["seconds"] - 1 for mine, less in zip(runs[name], runs[below], strict=True)])
    assert value is not None
    reached = value["median"] <= OVERHEAD_AT_MOST
    return {"name": name, "over": below, "value": value, "at_most": OVERHEAD_AT_MOST, "reached": reached}


def main() -> None:
    """Measure at every rate and write the results."""
    import weightlift
    from weightlift.testing import llama_specs, write_checkpoint
    from weightlift.testing.fast_disk import fast_disk

    chosen = arguments()
    size = chosen.size * MIB
    with fast_disk(size + SPARE_BYTES) as folder:
        path = write_checkpoint(folder / "model.safetensors", llama_specs(size - SPARE_BYTES))
        manifest = folder / "manifest.json"
        manifest.write_bytes(weightlift.make_manifest(path).to_bytes())
        result = {
            "schema": 1,
            "taken": environment.record(folder),
            "rounds": chosen.rounds,
            "bytes": path.stat().st_size,
            "rates": [at_rate(float(rate), path, manifest, chosen.rounds) for rate in chosen.rates.split(",")],
        }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rates"]:
        for found in row["overheads"]:
            value = found["value"]
            print(
                f"{row['gigabytes_per_second']:g} GB/s, {found['name']} over {found['over']}: {value['median']:+.1%} "
                f"({value['min']:+.1%} to {value['max']:+.1%})"
            )


if __name__ == "__main__":
    main()
