"""Runs the tests under coverage, with branches and subprocesses, and records what they reach.

Writes ``benchmarks/results/coverage.json`` if every test passes; fails where the whole or one of the modules that have
to be reached completely falls short. Arguments go to pytest: ``make coverage ARGUMENTS=tests/formats`` looks at a part
and then records nothing.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final, NamedTuple
from xml.etree import ElementTree

ROOT: Final = Path(__file__).resolve().parents[1]
RECORD: Final = ROOT / "benchmarks" / "results" / "coverage.json"
WORK: Final = ROOT / "build" / "coverage"
PACKAGE: Final = "src/weightlift/"

OVERALL_PERCENT: Final = 90.0
COMPLETE: Final = ("formats", "plan.py", "options.py", "units.py", "errors.py", "buffers.py")
"""Of these every statement and branch has to be reached."""


class Reached(NamedTuple):
    """Statements and branches, and how many of them the tests reach."""

    statements: int = 0
    statements_reached: int = 0
    branches: int = 0
    branches_reached: int = 0

    def __add__(self, other: tuple[Any, ...]) -> Reached:
        """Both together."""
        return Reached(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def shown(self) -> dict[str, float | int]:
        """For the record, with percentages."""
        return {
            **self._asdict(),
            "statements_percent": _percent(self.statements_reached, self.statements),
            "branches_percent": _percent(self.branches_reached, self.branches),
        }


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 100.0


def reached_by_file(report: dict[str, Any]) -> dict[str, Reached]:
    """What coverage's JSON report says of each file, by its name within the package."""
    found = {}
    for name, entry in report["files"].items():
        summary = entry["summary"]
        found[Path(name).as_posix().removeprefix(PACKAGE)] = Reached(
            summary["num_statements"],
            summary["covered_lines"],
            summary["num_branches"],
            summary["covered_branches"],
        )
    return found


def by_package(files: dict[str, Reached]) -> dict[str, Reached]:
    """The same by sub-package; modules of the package itself stand for themselves."""
    packages: dict[str, Reached] = defaultdict(Reached)
    for name, reached in files.items():
        packages[name.split("/")[0]] += reached
    return dict(sorted(packages.items()))


def shortfalls(files: dict[str, Reached]) -> list[str]:
    """In a sentence each, what falls short."""
    total = sum(files.values(), Reached())
    found = []
    percent = _percent(total.branches_reached, total.branches)
    if percent < OVERALL_PERCENT:
        found.append(f"{percent} % of all branches are reached, and {OVERALL_PERCENT} % are wanted")
    for name, reached in files.items():
        if name.split("/")[0] in COMPLETE and reached[0::2] != reached[1::2]:
            found.append(
                f"{name}: {reached.statements - reached.statements_reached} statements and "
                f"{reached.branches - reached.branches_reached} branches are not reached, and all are wanted"
            )
    return found


def _run(*words: str) -> int:
    return subprocess.run([sys.executable, "-m", "coverage", *words], cwd=ROOT, check=False).returncode


def _tests(path: Path) -> dict[str, int]:
    """How many tests ended how, by pytest's own account."""
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))  # noqa: S314 - pytest wrote it a moment ago
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "skipped", "failures", "errors")}
    return counts | {"passed": counts["tests"] - counts["skipped"] - counts["failures"] - counts["errors"]}


def main(arguments: list[str]) -> int:
    """Measure, print, and record."""
    WORK.mkdir(parents=True, exist_ok=True)
    _run("erase")
    # Whatever is looked at line by line takes longer, and so may take longer before it counts as hanging.
    options = ("-o", "faulthandler_timeout=600", f"--junitxml={WORK / 'tests.xml'}")
    failed = _run("run", "-m", "pytest", *options, *arguments)
    _run("combine", "--quiet")
    _run("json", "--quiet", "-o", str(WORK / "coverage.json"))
    _run("report", "--skip-covered", "--show-missing")
    files = reached_by_file(json.loads((WORK / "coverage.json").read_text(encoding="utf-8")))
    short = shortfalls(files)
    for sentence in short:
        print(sentence)
    if failed or arguments:
        print("not recorded: " + ("tests failed" if failed else "only a part was looked at"))
        return failed
    record = {
        "command": "make coverage",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in ("coverage", "pytest", "hypothesis", "torch")},
        "tests": _tests(WORK / "tests.xml"),
        "overall": sum(files.values(), Reached()).shown(),
        "packages": {name: reached.shown() for name, reached in by_package(files).items()},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
