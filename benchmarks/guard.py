"""What a catastrophe does to another program, with and without the guard: ``python benchmarks/guard.py``.

A memory control group plays a small machine. In it runs a program that wakes up every few milliseconds, touches memory
and reads a file, and beside it one that maps a file larger than the machine and takes a copy of every page. Recorded
are how late the first one wakes up (median, 99th percentile, worst), whether it survives, what the kernel killed, and
whether the guard named the mapping. Writes ``benchmarks/results/guard.json``. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import environment
import tables

if TYPE_CHECKING:
    from weightlift.testing.cgroup import MemoryCgroup

RESULTS = Path(__file__).resolve().parent / "results" / "guard.json"
MIB: Final = 1 << 20
WAKE_UP_AT_MOST_SECONDS: Final = 0.1
SETTLE_SECONDS: Final = 1.0

# Sleeps, touches a page of its own and reads one of a file, as any program on a desktop does; tells its delays.
OTHER = """
import json, os, select, sys, time
memory, file, delays = bytearray(16 << 20), os.open(sys.argv[1], os.O_RDONLY), []
print("ready", flush=True)
count = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    before = time.perf_counter()
    time.sleep(0.005)
    memory[count * 4096 % len(memory)] = 1
    os.pread(file, 4096, count * 4096 % (8 << 20))
    delays.append(time.perf_counter() - before - 0.005)
    count += 1
print(json.dumps(delays))
"""

CATASTROPHE = """
import mmap, sys
size = int(sys.argv[2])
with open(sys.argv[1], "r+b") as file:
    file.truncate(size)
    mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
if sys.argv[3] == "write":
    for page in range(0, size, mmap.PAGESIZE):
        mapping[page] = 1
else:
    mapping.madvise(23)  # MADV_POPULATE_WRITE, as a driver that takes pages for writing
"""

CASES: Final[dict[str, list[str] | None]] = {
    "nothing beside it": None,
    "without the guard": [],
    "guard, control group": ["--scope", "auto"],
    "guard, process tree": ["--scope", "tree"],
    "guard, left frozen": ["--scope", "auto", "--when-full", "freeze"],
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--machine", type=int, default=1024, help="MiB of the group that plays a machine (default 1024)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case (default 3)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    return parser.parse_args()


def measure(options: list[str] | None, how: str, machine_bytes: int, folder: Path) -> dict[str, Any]:
    """One run of one case."""
    from weightlift.testing.cgroup import memory_cgroup

    read = folder / "read"
    read.write_bytes(bytes(8 * MIB))
    log = folder / "log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-c", CATASTROPHE, str(folder / "weights.safetensors"), str(2 * machine_bytes), how]
    (folder / "weights.safetensors").touch()
    if options:
        command = [sys.executable, "-m", "weightlift", "guard", "--log", str(log), *options, "--", *command]
    with memory_cgroup(machine_bytes) as group:
        other = subprocess.Popen(
            group.command([sys.executable, "-c", OTHER, str(read)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdout is not None
        other.stdout.readline()
        begin = time.monotonic()
        code = None if options is None else _run(group, command, log, frozen="freeze" in (options or ()))
        seconds = time.monotonic() - begin
        time.sleep(SETTLE_SECONDS)
        survived = other.poll() is None
        out, _ = other.communicate("\n") if survived else ("", "")
        kills = group.oom_kills()
    delays = sorted(json.loads(out)) if out else []
    return {
        "exit_code": code,
        "seconds": seconds,
        "other_survived": survived,
        "kernel_kills_on_the_machine": kills,
        "wake_ups": len(delays),
        "wake_up_median_seconds": statistics.median(delays) if delays else None,
        "wake_up_99th_seconds": delays[int(len(delays) * 0.99)] if delays else None,
        "wake_up_worst_seconds": delays[-1] if delays else None,
        "culprit": _culprit(log),
    }


def _run(group: MemoryCgroup, command: list[str], log: Path, *, frozen: bool) -> int:
    process = subprocess.Popen(group.command(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if frozen:
        while process.poll() is None and "freeze" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.05)
        time.sleep(SETTLE_SECONDS)
        process.send_signal(signal.SIGINT)
    return process.wait()


def _culprit(log: Path) -> str | None:
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    named = [event["growths"][0] for event in events if event["event"] == "action" and event.get("growths")]
    return os.path.basename(named[0]["name"]) if named else None


def summary(name: str, how: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of a case and the worst of each figure."""
    worst = {
        key: max((run[key] for run in runs if run[key] is not None), default=None)
        for key in ("wake_up_median_seconds", "wake_up_99th_seconds", "wake_up_worst_seconds")
    }
    return {
        "case": name,
        "copies": how,
        "other_survived": all(run["other_survived"] for run in runs),
        "kernel_kills_on_the_machine": sum(run["kernel_kills_on_the_machine"] for run in runs),
        "culprits": sorted({str(run["culprit"]) for run in runs}),
        "worst_of_runs": worst,
        "runs": runs,
    }


def main() -> None:
    """Measure all cases in turn, round by round, and write the results."""
    chosen = arguments()
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="weightlift-benchmarks-") as scratch:
        folder = Path(scratch)
        taken = environment.record(folder)
        for _ in range(chosen.rounds):
            for how in ("write", "populate"):
                for name, options in CASES.items():
                    run = measure(options, how, chosen.machine * MIB, folder)
                    runs.setdefault((name, how), []).append(run)
    cases = [summary(name, how, found) for (name, how), found in runs.items()]
    guarded = [case for case in cases if case["case"].startswith("guard")]
    late = max(case["worst_of_runs"]["wake_up_99th_seconds"] or float("inf") for case in guarded)
    result = {
        "schema": 1,
        "taken": taken,
        "machine_bytes": chosen.machine * MIB,
        "rounds": chosen.rounds,
        "cases": cases,
        "wake_up_99th_at_most_seconds": WAKE_UP_AT_MOST_SECONDS,
        "reached": late <= WAKE_UP_AT_MOST_SECONDS
        and all(case["other_survived"] and not case["kernel_kills_on_the_machine"] for case in guarded)
        and all(case["culprits"] == ["weights.safetensors"] for case in guarded),
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    for case in cases:
        late_by = case["worst_of_runs"]["wake_up_99th_seconds"]
        shown = "–" if late_by is None else f"{late_by * 1000:.1f} ms"
        tables.CONSOLE.print(
            f"{case['case']:<22} {case['copies']:<9} 99th percentile {shown:>9}  survived: {case['other_survived']}  "
            f"killed by the kernel: {case['kernel_kills_on_the_machine']}  named: {', '.join(case['culprits'])}"
        )
    tables.CONSOLE.print(f"reached: {result['reached']}; written: {chosen.output}")


if __name__ == "__main__":
    main()
