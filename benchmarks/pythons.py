"""Runs the tests with the Python that runs this, and records which of them passed, for ``docs/reliability.md``.

Every Python has an entry of its own in ``results/pythons.json``; arguments go to pytest. What is not installed for that
Python is said by the tests that are skipped for it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

import environment

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = Path(__file__).parent / "results" / "pythons.json"


def ending(case: ElementTree.Element) -> str:
    """How a test case of pytest's report ended: ``failure``, ``error``, ``skipped`` or ``passed``."""
    return next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")


def counted(cases: Iterable[ElementTree.Element]) -> dict[str, Any]:
    """How many cases passed and were skipped, and which failed."""
    ended = [(ending(case), f"{case.get('classname')}::{case.get('name')}") for case in cases]
    counts = Counter(kind for kind, _ in ended)
    failed = [name for kind, name in ended if kind in {"failure", "error"}]
    return {"passed": counts["passed"], "skipped": counts["skipped"], "failed": failed}


def main() -> int:
    """Run and record; pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments, words = parser.parse_known_args()
    taken = environment.record(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *words]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        result = counted(ElementTree.parse(report).getroot().iter("testcase"))  # noqa: S314 - pytest wrote it just now
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    name = f"CPython {taken['python']}" + (", free-threaded" if free_threaded else "")
    known = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    result |= {"free_threaded": free_threaded, "arguments": words, "environment": taken}
    arguments.output.write_text(json.dumps(known | {name: result}, indent=1) + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
