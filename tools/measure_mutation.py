"""Breaks the code in many small ways and records which of them the tests notice, with mutmut.

Each suite is a part of the package and the tests meant for it, run on a copy of the tree under ``build/mutation``.
Writes ``benchmarks/results/mutation.json``, one entry per suite; suites that were not run keep theirs. Names of suites
as arguments (``make mutation ARGUMENTS="plan buffers"``) look at some only. Needs a system that forks.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
RECORD: Final = ROOT / "benchmarks" / "results" / "mutation.json"
WORK: Final = ROOT / "build" / "mutation"

SUITES: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "plan": (("plan.py",), ("tests/core/test_plan.py", "tests/core/test_plan_examples.py")),
    "buffers": (("buffers.py",), ("tests/core/test_buffers.py", "tests/stateful/test_host_memory.py")),
    "safetensors": (
        ("formats/safetensors.py", "formats/header_*.py", "formats/number_range.py", "formats/columns.py"),
        (
            "tests/formats/test_hostile_files.py",
            "tests/formats/test_differential.py",
            "tests/formats/test_values.py",
            "tests/formats/test_description.py",
        ),
    ),
    "folders": (
        ("formats/__init__.py", "formats/files.py", "formats/folder.py", "formats/index_file.py"),
        ("tests/formats/test_folders.py", "tests/formats/test_hostile_files.py", "tests/formats/test_description.py"),
    ),
    "gguf": (("formats/gguf*.py",), ("tests/formats/test_gguf.py", "tests/formats/test_gguf_hostile.py")),
    "pytorch": (
        ("formats/pytorch*.py", "formats/pickle_reader.py", "formats/zip_directory.py"),
        ("tests/formats/test_pytorch.py", "tests/formats/test_pytorch_hostile.py"),
    ),
}
"""By name: which modules are broken, and which tests have to notice."""

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
    modules, tests = SUITES[name]
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=leave)
    settings = {
        "source_paths": ["src"],
        "only_mutate": [f"src/weightlift/{module}" for module in modules],
        "pytest_add_cli_args_test_selection": list(tests),
        "pytest_add_cli_args": ["-p", "no:cacheprovider"],
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(text + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(folder: Path, processes: int) -> None:
    """Have every mutant tested."""
    # The package is installed as the tree beside this script; the copy has to come before it. Python never looks again
    # into a folder on its path that was not there when it started.
    mutated = folder / "mutants" / "src"
    mutated.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(mutated)}
    words = [sys.executable, "-m", "mutmut", "run", "--max-children", str(processes)]
    subprocess.run(["nice", "-n", "19", *words], cwd=folder, env=environment, check=False)


def collect(folder: Path) -> dict[str, Any]:
    """How many mutants ended how, and the names of those that nobody noticed."""
    counts: Counter[str] = Counter()
    unnoticed: list[str] = []
    for path in sorted((folder / "mutants").rglob("*.meta")):
        for mutant, code in json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"].items():
            found = outcome(code)
            counts[found] += 1
            if found in {"survived", "no_tests"}:
                unnoticed.append(mutant)
    kinds = ("killed", "survived", "timeout", "no_tests", "not_run")
    return {"mutants": counts.total(), **{kind: counts[kind] for kind in kinds}, "unnoticed": unnoticed}


def main() -> None:
    """Run suites and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[[], *SUITES], help="which ones; all by default")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name in arguments.suites or SUITES:
        begin = time.monotonic()
        folder = prepare(name)
        run(folder, arguments.processes)
        found = collect(folder)
        modules, tests = SUITES[name]
        record[name] = {
            "command": f'make mutation ARGUMENTS="{name}"',
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "python": platform.python_version(),
            "mutmut": importlib.metadata.version("mutmut"),
            "modules": list(modules),
            "tests": list(tests),
            "minutes": round((time.monotonic() - begin) / 60, 1),
            **found,
        }
        print(name, {kind: found[kind] for kind in found if kind != "unnoticed"})
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
