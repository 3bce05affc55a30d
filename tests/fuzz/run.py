"""Fuzz every reader, and keep what came of it: ``make fuzz``.

Runs each target in a process of its own, with the kept corpus and the tests' hostile files to begin with, and appends
executions, seconds, findings, versions, date and command to ``benchmarks/results/fuzz.json``. Inputs that were found
on the way lie in ``build/fuzz``, findings among them; ``--keep`` chooses the smallest ones that together reach
everything that was reached, and makes them the corpus in the tree.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import fuzz_seeds
import fuzz_targets

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

ROOT: Final = Path(__file__).resolve().parents[2]
BUILD: Final = ROOT / "build" / "fuzz"
RESULTS: Final = ROOT / "benchmarks" / "results" / "fuzz.json"
PACKAGES: Final = ("weightlift", "atheris", "safetensors", "msgspec", "numpy")
FINDINGS_MAX: Final = 10
INPUT_BYTES_MAX: Final = 4096
KEPT_BYTES_MAX: Final = 30_000
KEPT_INPUT_BYTES_MAX: Final = 1500
LIMITS: Final = (
    f"-max_len={INPUT_BYTES_MAX}",
    "-timeout=60",
    "-report_slow_units=60",
    "-rss_limit_mb=2048",
    "-print_final_stats=1",
)

_EXECUTED: Final = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_REACHED: Final = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")


def fuzz(target: str, executions: int, seconds: int, seed: int) -> dict[str, Any]:
    """Fuzz one target; a finding is kept and the rest of the executions are run after it."""
    work, begin = BUILD / target, BUILD / "seeds" / target
    findings = BUILD / "findings"
    for folder in (work, begin, findings):
        folder.mkdir(parents=True, exist_ok=True)
    write_all(begin, fuzz_seeds.seeds(target))
    known, done, started, reached = set(findings.iterdir()), 0, time.monotonic(), ("0", "0", "0")
    new: list[str] = []
    while done < executions and len(new) < FINDINGS_MAX and (left := seconds - int(time.monotonic() - started)) > 0:
        folders = [work, *([fuzz_seeds.CORPUS / target] if (fuzz_seeds.CORPUS / target).is_dir() else []), begin]
        words = [f"-runs={executions - done}", f"-max_total_time={left}", f"-seed={seed + len(new)}", *LIMITS]
        words += [f"-artifact_prefix={findings}/{target}-", *map(str, folders)]
        said = one(target, words)
        executed = _EXECUTED.search(said)
        reached = (_REACHED.findall(said) or [reached])[-1]
        found = sorted(set(findings.iterdir()) - known)
        known.update(found)
        new += [path.name for path in found]
        if executed is None and not found:
            raise SystemExit(f"{target} did not run:\n{said[-4000:]}")
        for path in found:
            print(f"FOUND {path}\n{said[-3000:]}", flush=True)
        done += int(executed[1]) if executed else 0
    coverage, features, corpus = map(int, reached)
    return {
        "executions": done,
        "seconds": round(time.monotonic() - started, 1),
        "coverage": coverage,
        "features": features,
        "corpus": corpus,
        "findings": new,
    }


def one(target: str, words: list[str]) -> str:
    """Run one process and return what it said."""
    scratch = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()  # noqa: S108 - small and many
    with tempfile.TemporaryDirectory(prefix="weightlift-fuzz-", dir=scratch) as folder:
        command = [sys.executable, str(Path(__file__).with_name("fuzz_one.py")), target, *words]
        environment = os.environ | {"TMPDIR": folder}
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        return (done.stdout + done.stderr).decode("utf-8", "replace")


def write_all(folder: Path, contents: Iterable[bytes]) -> None:
    """Write inputs under names that say what is in them."""
    for content in contents:
        (folder / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)


def arcs(target: fuzz_targets.Target, content: bytes, folder: Path) -> frozenset[tuple[str, int, int]]:
    """The steps from line to line of weightlift's code that an input takes."""
    taken: set[tuple[str, int, int]] = set()
    package = str(ROOT / "src" / "weightlift")

    def enter(frame: FrameType, _event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(package):
            return None
        last = 0

        def step(frame: FrameType, event: str, _: object) -> Any:
            nonlocal last
            if event == "line":
                taken.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        target.examine(content, folder)
    finally:
        sys.settrace(None)
    return frozenset(taken)


def keep(name: str) -> None:
    """Make the smallest inputs that reach everything the corpus in the tree."""
    target, reached = fuzz_targets.TARGETS[name], set[tuple[str, int, int]]()
    known = {*fuzz_seeds.kept(name), *fuzz_seeds.seeds(name)}
    known.update(path.read_bytes() for path in (BUILD / name).glob("*") if path.is_file())
    findings = [path.read_bytes() for path in (BUILD / "findings").glob(f"{name}-*")]
    chosen: list[bytes] = [content for content in findings if len(content) <= INPUT_BYTES_MAX]
    total = sum(map(len, chosen))
    with tempfile.TemporaryDirectory(prefix="weightlift-fuzz-") as folder:
        target.examine(b"", Path(folder))
        for content in sorted(known, key=lambda content: (len(content), content)):
            if len(content) > KEPT_INPUT_BYTES_MAX or total + len(content) > KEPT_BYTES_MAX:
                continue
            taken = arcs(target, content, Path(folder))
            if not taken <= reached:
                reached |= taken
                chosen.append(content)
                total += len(content)
    place = fuzz_seeds.CORPUS / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    write_all(place, chosen)
    print(f"{name}: {len(chosen)} inputs of {total:,} bytes reach {len(reached):,} steps", flush=True)


def record(run: dict[str, Any]) -> None:
    """Append a run to the record."""
    record: dict[str, Any] = {"schema": 1, "executions": 0, "runs": []}
    if RESULTS.exists():
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
    record["runs"].append(run)
    record["executions"] = sum(run["executions"] for run in record["runs"])
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Fuzz, or keep a corpus; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"which of them (default: all): {', '.join(fuzz_targets.TARGETS)}")
    parser.add_argument("--executions", type=int, default=120_000, help="how many inputs each (default: 120000)")
    parser.add_argument("--seconds", type=int, default=900, help="how long each at most (default: 900)")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--keep", action="store_true", help="choose the corpus in the tree anew, and run nothing")
    parser.add_argument("--no-record", action="store_true", help="do not append to the record")
    arguments = parser.parse_args()
    chosen = arguments.targets or list(fuzz_targets.TARGETS)
    if arguments.keep:
        for name in chosen:
            keep(name)
        return 0
    print(f"seed {arguments.seed}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for name in chosen:
        results[name] = fuzz(name, arguments.executions, arguments.seconds, arguments.seed)
        print(f"{name}: {results[name]}", flush=True)
    run = {
        "date": begun,
        "command": ["make", "fuzz"] if len(sys.argv) == 1 else ["python", "tests/fuzz/run.py", *sys.argv[1:]],
        "seed": arguments.seed,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "executions": sum(result["executions"] for result in results.values()),
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "findings": sum(len(result["findings"]) for result in results.values()),
        "targets": results,
    }
    if not arguments.no_record:
        record(run)
    print(f"{run['executions']:,} executions in {run['seconds']:,.0f} s, {run['findings']} findings")
    return 1 if run["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
