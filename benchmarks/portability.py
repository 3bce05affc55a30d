"""Runs the unit tests while parts of Linux are taken away from weightlift, one by one and all together.

Writes ``results/portability.json``, one entry per part; parts that were not run keep theirs. Names of parts as
arguments run some only. Tests that are about a part are skipped without it, and say so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

import environment  # noqa: E402 - what can be taken away stands beside the tests
from pythons import counted  # noqa: E402
from taken_away import PARTS  # noqa: E402

RESULTS: Final = Path(__file__).parent / "results" / "portability.json"
TESTS: Final = ("tests/core", "tests/formats", "tests/engines", "tests/compat")
EVERYTHING: Final = "everything"


def main() -> int:
    """Run and record; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, EVERYTHING), help="what to take away; all in turn if none")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    failed = False
    for part in arguments.parts or (*PARTS, EVERYTHING):
        taken = environment.record(ROOT)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            without = ",".join(PARTS) if part == EVERYTHING else part
            command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *TESTS]
            lacking = os.environ | {"WEIGHTLIFT_TEST_WITHOUT": without}
            failed |= subprocess.run(command, cwd=ROOT, env=lacking, check=False).returncode != 0
            result = counted(ElementTree.parse(report).getroot().iter("testcase"))  # noqa: S314 - pytest wrote it
        known = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
        known[part] = result | {"environment": taken}
        arguments.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
