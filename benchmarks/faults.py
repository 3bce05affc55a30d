"""Runs the tests that make faults and hostile files, and counts what they tried, for ``docs/reliability.md``.

What ran and passed is counted by test function out of pytest's own report, and hostile inputs as the tests themselves
record them. Writes ``results/faults.json`` if no test failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

import environment
from pythons import ending

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = Path(__file__).parent / "results" / "faults.json"
TESTS: Final = ("tests/trouble", "tests/host/test_taken_away.py", "tests/engines/test_faults.py", "tests/fuzz")


def counted(cases: Iterable[ElementTree.Element]) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Test functions with how many of their cases ended how, and hostile inputs by reader.

    A function is named by its file and itself, ``tests/fuzz/test_hostile_inputs.py::test_hostile_inputs_are_many``.
    """
    endings: defaultdict[str, Counter[str]] = defaultdict(Counter)
    hostile: dict[str, int] = {}
    for case in cases:
        file = case.get("classname", "").replace(".", "/") + ".py"
        name = f"{file}::{case.get('name', '').split('[')[0]}"
        endings[name][ending(case)] += 1
        for entry in case.iter("property"):
            if (key := entry.get("name", "")).startswith("hostile inputs: "):
                hostile[key.partition(": ")[2]] = int(entry.get("value", "0"))
    return {name: dict(counts) for name, counts in sorted(endings.items())}, hostile


def main() -> int:
    """Run the tests, and record if all of them passed; otherwise pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-rs", f"--junitxml={report}", *TESTS]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            return status
        cases = ElementTree.parse(report).getroot().iter("testcase")  # noqa: S314 - pytest wrote it a moment ago
        tests, hostile = counted(cases)
    result: dict[str, Any] = {
        "environment": environment.record(ROOT),
        "tests": tests,
        "hostile_inputs": hostile,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
