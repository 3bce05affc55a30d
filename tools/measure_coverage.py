"""Runs the tests under coverage, with branches and subprocesses, and records what they reach.

Every folder of tests is a process of its own, so that one that fails need not be found again from the start:
``make coverage ARGUMENTS=--resume`` takes up what passed and did not change since. Writes
``benchmarks/results/coverage.json`` if every test passes; fails where the whole or one of the modules that have to be
reached completely falls short. Other arguments go to pytest: ``make coverage ARGUMENTS=tests/formats`` looks at a part
and then records nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from xml.etree import ElementTree

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def parts_of_the_tests(folder: Path) -> list[Path]:
    """What is run one after the other: folders of tests, and test files beside them."""
    found = {path.parent for path in folder.glob("*/**/test_*.py")} | set(folder.glob("test_*.py"))
    return sorted(folder / path.relative_to(folder).parts[0] for path in found)


def fingerprint(root: Path, part: Path) -> str:
    """What a part of the tests can be seen to depend on, as a digest: the code, what tests share, and itself."""
    inputs = ["src", "tools", "pyproject.toml", "tests/conftest.py", part.relative_to(root).as_posix()]
    inputs += ["benchmarks/*.py"] + ["docs", "README.md"] * (part.name == "docs")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *inputs],
        cwd=root,
        check=True,
        capture_output=True,
    ).stdout
    digest = hashlib.sha256(platform.python_version().encode())
    for name in sorted(set(listed.decode().split("\0")[:-1])):
        file = root / name
        digest.update(f"\0{name}\0".encode() + (file.read_bytes() if file.is_file() else b""))
    return digest.hexdigest()


def _coverage(*words: str, data: Path = WORK / "data") -> int:
    command = [sys.executable, "-m", "coverage", *words]
    # Subprocesses, which have other working directories, are told the same place.
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"COVERAGE_FILE": str(data)}, check=False).returncode


def _tests(path: Path) -> dict[str, int]:
    """How many tests ended how, by pytest's own account."""
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))  # noqa: S314 - pytest wrote it a moment ago
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "skipped", "failures", "errors")}
    return counts | {"passed": counts["tests"] - counts["skipped"] - counts["failures"] - counts["errors"]}


def _run(work: Path, arguments: Sequence[str]) -> dict[str, int] | None:
    """Run tests in a folder of their own; how they ended, or ``None`` where one failed."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    # Whatever is looked at line by line takes longer, and so may take longer before it counts as hanging.
    options = ("-o", "faulthandler_timeout=600", f"--junitxml={work / 'tests.xml'}")
    failed = _coverage("run", "-m", "pytest", *options, *arguments, data=work / "data")
    _coverage("combine", "--quiet", data=work / "data")
    return None if failed else _tests(work / "tests.xml")


def _run_parts(*, resume: bool) -> tuple[list[Path], dict[str, int] | None]:
    """Run every part of the tests, or those that were not run since anything changed.

    Returns:
        Where the data of each lies, and how all tests ended; ``None`` where one failed.
    """
    places, total, failed = [], Counter[str](), []
    for part in parts_of_the_tests(ROOT / "tests"):
        work = WORK / "parts" / part.stem
        places.append(work / "data")
        passed, expected = work / "passed.json", fingerprint(ROOT, part)
        known = json.loads(passed.read_text(encoding="utf-8")) if resume and passed.exists() else {}
        if known.get("fingerprint") != expected:
            print(f"== {part.name}", flush=True)
            tests = _run(work, [str(part)])
            if tests is None:
                failed.append(part.name)
                continue
            known = {"fingerprint": expected, "tests": tests}
            passed.write_text(json.dumps(known), encoding="utf-8")
        total.update(known["tests"])
    if failed:
        print(f"tests failed in {', '.join(failed)}")
    return places, None if failed else dict(total)


def _measured(places: Sequence[Path]) -> dict[str, Reached]:
    """What the tests of some folders reach together, printed and by file."""
    _coverage("erase")
    _coverage("combine", "--quiet", "--keep", *(str(place) for place in places if place.exists()))
    _coverage("json", "--quiet", "-o", str(WORK / "coverage.json"))
    _coverage("report", "--skip-covered", "--show-missing")
    return reached_by_file(json.loads((WORK / "coverage.json").read_text(encoding="utf-8")))


def main(arguments: list[str]) -> int:
    """Measure, print, and record."""
    resume = arguments == ["--resume"]
    if arguments and not resume:
        place = WORK / "chosen"
        tests = _run(place, arguments)
        _measured([place / "data"])
        print("not recorded: only a part was looked at" + (", and tests failed" if tests is None else ""))
        return int(tests is None)
    places, tests = _run_parts(resume=resume)
    files = _measured(places)
    short = shortfalls(files)
    for sentence in short:
        print(sentence)
    if tests is None:
        print("not recorded: tests failed; --resume runs the parts again in which they did")
        return 1
    record = {
        "command": "make coverage",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in ("coverage", "pytest", "hypothesis", "torch")},
        "wanted": {"overall_branches_percent": OVERALL_PERCENT, "complete": sorted(COMPLETE)},
        "tests": tests,
        "overall": sum(files.values(), Reached()).shown(),
        "packages": {name: reached.shown() for name, reached in by_package(files).items()},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
