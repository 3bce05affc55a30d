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
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import checkpoints
import environment
import harness
import running
from claims import spread
from harness import MIB, Case, Contestant

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from claims import Run
    from harness import Checkpoint

RESULTS: Final = Path(__file__).resolve().parent / "results" / "verify.json"
GROUPS: Final = Path("/sys/fs/cgroup/blkio")
SPARE_BYTES: Final = 64 * MIB
OVERHEAD_AT_MOST: Final = 0.10
FIGURES: Final = ("seconds", "gigabytes_per_second", "processor_seconds")
COMPARED: Final = {"weightlift verify": "read and discarded", "load, verified": "load"}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of the checkpoint (default 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way (default 5)")
    parser.add_argument("--rates", default="0.5,1", help="GB/s of the disk, several after commas (default 0.5,1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    return parser.parse_args()


@contextlib.contextmanager
def held_back(folder: Path, rate: float) -> Iterator[tuple[str, ...]]:
    """Words to put before a command line, whose reads of the disk under ``folder`` then take at most ``rate`` GB/s."""
    if not (GROUPS / "blkio.throttle.read_bps_device").exists():
        raise SystemExit(f"no disk can be held back here: {GROUPS} has no throttle (needs control groups, version 1)")
    device = os.stat(folder).st_dev
    group = Path(tempfile.mkdtemp(prefix="weightlift-verify-", dir=GROUPS))
    try:
        limit = f"{os.major(device)}:{os.minor(device)} {int(rate * 1e9)}"
        (group / "blkio.throttle.read_bps_device").write_text(limit)
        yield ("/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"))
    finally:
        group.rmdir()


def ways(checkpoint: Checkpoint, manifest: Path, prefix: tuple[str, ...]) -> list[Case]:
    """Reading the file with and without looking at digests, from a cold page cache."""
    loads: dict[str, tuple[str, dict[str, Any]]] = {
        "read and discarded": ("weightlift", {"device": "null"}),
        "weightlift verify": ("weightlift_verify", {"manifest": str(manifest)}),
        "load": ("weightlift", {"framework": "numpy"}),
        "load, verified": ("weightlift", {"framework": "numpy", "verify": str(manifest)}),
    }
    return [
        Case(
            name=name,
            contestant=Contestant(adapter=adapter, options=options, delivers="framework" in options, prefix=prefix),
            checkpoint=checkpoint,
        )
        for name, (adapter, options) in loads.items()
    ]


def at_rate(rate: float, checkpoint: Checkpoint, manifest: Path, rounds: int) -> dict[str, Any]:
    """Every way on a disk of one speed, round by round."""
    with held_back(manifest.parent, rate) as prefix:
        cases = ways(checkpoint, manifest, prefix)
        runs = running.rounds(cases, rounds)
    return {
        "gigabytes_per_second": rate,
        "cases": [harness.summary(case, runs[case.name], FIGURES) for case in cases],
        "overheads": [overhead(name, below, runs) for name, below in COMPARED.items()],
    }


def overhead(name: str, below: str, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """What one way takes over another, as a fraction of the other, round by round; the median decides."""
    value = spread([mine["seconds"] / less["seconds"] - 1 for mine, less in zip(runs[name], runs[below], strict=True)])
    assert value is not None
    reached = value["median"] <= OVERHEAD_AT_MOST
    return {"name": name, "over": below, "value": value, "at_most": OVERHEAD_AT_MOST, "reached": reached}


def main() -> None:
    """Measure at every rate and write the results."""
    import weightlift
    from weightlift.testing.fast_disk import fast_disk

    chosen = arguments()
    size = chosen.size * MIB
    with fast_disk(size + SPARE_BYTES) as folder:
        checkpoint = checkpoints.llama(folder, folder, size - SPARE_BYTES)
        manifest = folder / "manifest.json"
        manifest.write_bytes(weightlift.make_manifest(checkpoint.path).to_bytes())
        result = {
            "schema": 1,
            "taken": environment.record(folder),
            "rounds": chosen.rounds,
            "bytes": checkpoint.tensor_bytes,
            "rates": [at_rate(float(rate), checkpoint, manifest, chosen.rounds) for rate in chosen.rates.split(",")],
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
