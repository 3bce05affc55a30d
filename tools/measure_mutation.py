"""Breaks the code in many small ways and records which of them the tests notice, with mutmut.

Each suite is a part of the package and the tests meant for it, run on a copy of the tree under ``build/mutation``.
Writes ``benchmarks/results/mutation.json``, one entry per suite; suites that were not run keep theirs. Names of suites
as arguments (``make mutation ARGUMENTS="plan buffers"``) look at some only. Of large suites a random sample is tried;
``--sample 0`` tries everything. What survives is explained by ``tools/mutants_explained.toml`` or recorded as
unexplained. Needs a system that forks.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from mutation_suites import SUITES, changes, explanations

ROOT: Final = Path(__file__).resolve().parents[1]
RECORD: Final = ROOT / "benchmarks" / "results" / "mutation.json"
WORK: Final = ROOT / "build" / "mutation"

NO_MUTANT: Final = "no.such.mutant"
TIMEOUT_FACTOR: Final = 6.0
"""A mutant's tests may take so many times as long as they take without it, and as many seconds more."""

EXAMPLES: Final = 100
"""How many headers the comparison with the reference parser tries per test: more would find no less."""

KINDS: Final = ("killed", "timeout", "survived", "no_tests")
"""How the tests of a mutant can end. The first two notice it."""

# How mutmut tells how the tests of a mutant ended, by their exit code; others are crashes, which count as noticed.
_SURVIVED: Final = 0
_NO_TESTS: Final = (5, 33)
_TIMEOUT: Final = (-24, 24, 36, 152, 255)


def outcome(code: int | None) -> str:
    """What an exit code of a mutant's tests means."""
    if code is None:
        return "not_run"
    if code == _SURVIVED:
        return "survived"
    return "no_tests" if code in _NO_TESTS else "timeout" if code in _TIMEOUT else "killed"


def prepare(name: str) -> Path:
    """A copy of the tree in which only a suite's modules are mutated."""
    suite = SUITES[name]
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=leave)
    settings = {
        "source_paths": ["src"],
        "only_mutate": [f"src/weightlift/{module}" for module in suite.modules],
        "pytest_add_cli_args_test_selection": list(suite.tests),
        "pytest_add_cli_args": [
            *("-p", "no:cacheprovider", "--hypothesis-seed=0"),
            *(f"--deselect={test}" for test in suite.left_out),
        ],
        "timeout_multiplier": TIMEOUT_FACTOR,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(text + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(folder: Path, processes: int, mutants: list[str]) -> None:
    """Have mutants tested; all without names."""
    # The package is installed as the tree beside this script; the copy has to come before it. Python never looks again
    # into a folder on its path that was not there when it started.
    mutated = folder / "mutants" / "src"
    mutated.mkdir(parents=True, exist_ok=True)
    # A mutant's tests run in a fork of a process that has run them all, without its threads: a second thread of OpenMP
    # would be waited for in vain, and what hangs so counts as noticed.
    environment = os.environ | {
        "PYTHONPATH": str(mutated),
        "OMP_NUM_THREADS": "1",
        "WEIGHTLIFT_TEST_EXAMPLES": str(EXAMPLES),
    }
    words = [sys.executable, "-m", "mutmut", "run", "--max-children", str(processes), *mutants]
    # Mutants that are not there end it by an exception, once everything is ready for those that are.
    errors = subprocess.DEVNULL if mutants == [NO_MUTANT] else None
    subprocess.run(["nice", "-n", "19", *words], cwd=folder, env=environment, stderr=errors, check=False)


def codes(folder: Path) -> dict[Path, dict[str, int | None]]:
    """By mutated module, how the tests of each mutant ended."""
    found = sorted((folder / "mutants").rglob("*.meta"))
    return {path: json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"] for path in found}


def choose(folder: Path, processes: int, count: int, seed: int) -> list[str]:
    """Have all mutants made and the tests timed, and choose some mutants; none where there are no more than that."""
    run(folder, processes, [NO_MUTANT])
    everything = sorted(mutant for by_mutant in codes(folder).values() for mutant in by_mutant)
    return sorted(random.Random(seed).sample(everything, count)) if len(everything) > count else []  # noqa: S311


def collect(folder: Path) -> dict[str, Any]:
    """How many mutants ended how, and what those change that nobody noticed."""
    counts: Counter[str] = Counter()
    known = explanations()
    explained: list[dict[str, str]] = []
    unexplained: list[dict[str, str]] = []
    for path, by_mutant in codes(folder).items():
        found = {mutant: outcome(code) for mutant, code in by_mutant.items()}
        counts.update(found.values())
        unnoticed = [mutant for mutant, how in found.items() if how in {"survived", "no_tests"}]
        for mutant, change in changes(path.with_suffix("").read_text(encoding="utf-8"), unnoticed).items():
            entry = {"mutant": mutant, "before": change.before, "after": change.after}
            if change in known:
                explained.append(entry | {"reason": known[change]})
            else:
                unexplained.append(entry)
    return {
        "mutants": counts.total(),
        "tried": counts.total() - counts["not_run"],
        **{kind: counts[kind] for kind in KINDS},
        "explained": explained,
        "unexplained": unexplained,
    }


def measure(name: str, processes: int, sample: int, seed: int) -> dict[str, Any]:
    """Run a suite and tell what came of it."""
    begin, folder = time.monotonic(), prepare(name)
    options = [f"--sample {sample}"] * (sample != SUITES[name].sample) + [f"--seed {seed}"] * (seed != 0)
    chosen = choose(folder, processes, sample, seed) if sample else []
    run(folder, processes, chosen)
    return {
        "command": f'make mutation ARGUMENTS="{" ".join([name, *options])}"',
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "mutmut": importlib.metadata.version("mutmut"),
        "modules": list(SUITES[name].modules),
        "tests": list(SUITES[name].tests),
        "left_out": list(SUITES[name].left_out),
        "sample": {"mutants": len(chosen), "seed": seed} if chosen else None,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        **collect(folder),
    }


def main() -> None:
    """Run suites and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[[], *SUITES], help="which ones; all by default")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sample", type=int, help="mutants of each suite, 0 for all; by default as the suite says")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    arguments = parser.parse_args()
    for name in arguments.suites or SUITES:
        sample = SUITES[name].sample if arguments.sample is None else arguments.sample
        found = measure(name, arguments.processes, sample, arguments.seed)
        counts = {key: found[key] for key in ("mutants", "tried", *KINDS)}
        print(name, counts, {key: len(found[key]) for key in ("explained", "unexplained")})
        for entry in found["unexplained"]:
            print(f"{entry['mutant']}\n  - {entry['before']}\n  + {entry['after']}")
        # Read again each time: another suite may have been run beside this one.
        record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        record[name] = found
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
