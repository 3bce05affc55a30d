"""``weightlift doctor``: examines a machine and a place; with ``--self-test`` it tries the pipeline on a real card."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weightlift.cli.outcome import ExitCode, UsageError, write_json
from weightlift.writing import NewFile

if TYPE_CHECKING:
    import argparse

SUMMARY: str = "examine the machine: what makes loads slow or dangerous here, and what mends it"

_REPORT: Final = "weightlift-self-test.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.usage = "%(prog)s [options] [PATH]"
    parser.add_argument(
        "path", metavar="PATH", nargs="?", help="where models lie, or one of them: its storage is examined and measured"
    )
    parser.add_argument(
        "--no-speed", action="store_true", help="leave the speed probes out, which read for about two seconds"
    )
    test = parser.add_argument_group("self-test")
    test.add_argument(
        "--self-test",
        action="store_true",
        help="instead, load known tensors onto a device by every path, compare each byte and write a report",
    )
    test.add_argument("--device", metavar="DEVICE", help="the device to test (default: cuda:0)")
    test.add_argument(
        "--folder",
        metavar="FOLDER",
        type=Path,
        help="where to put a checkpoint of 100 MB meanwhile (default: a temporary folder)",
    )
    test.add_argument("--output", metavar="FILE", type=Path, help=f"the file with the report (default: {_REPORT})")


def run(arguments: argparse.Namespace) -> int:
    """Examine, or run the self-test."""
    given = [name for name in ("device", "folder", "output") if getattr(arguments, name) is not None]
    if arguments.self_test:
        return _self_test(arguments)
    if given:
        raise UsageError(
            f"--{given[0]} belongs to --self-test", "usage: weightlift doctor --self-test [--device DEVICE]"
        )
    return _examine(arguments)


def _examine(arguments: argparse.Namespace) -> int:
    from weightlift.health.examination import examine
    from weightlift.health.gathering import gather
    from weightlift.health.recommend import recommend

    begin = time.monotonic()
    facts = gather(arguments.path, measure=not arguments.no_speed)
    examination, recommendation = examine(facts), recommend(facts)
    seconds = time.monotonic() - begin
    if arguments.json:
        write_json(
            {
                "schema": 1,
                "degraded": examination.degraded,
                "seconds": seconds,
                "facts": facts.to_json(),
                "findings": [asdict(finding) for finding in examination.findings],
                "not_checked": [asdict(gap) for gap in examination.gaps],
                "recommendation": asdict(recommendation),
            }
        )
    else:
        from weightlift.reports.console import show
        from weightlift.reports.doctor import doctor_tables

        show(sys.stdout, *doctor_tables(facts, examination, recommendation, seconds))
    return ExitCode.DEGRADED if examination.degraded else ExitCode.DONE


def _self_test(arguments: argparse.Namespace) -> int:
    """Run the self-test, print a line per step and write the file."""
    from weightlift.health.self_test import run_self_test

    output = arguments.output or Path(_REPORT)
    with NewFile(output) as report:
        result = run_self_test(arguments.device or "cuda:0", arguments.folder, _note)
        with report.writing() as file:
            file.write(json.dumps(result, indent=1) + "\n")
    failed = [name for name, step in result["steps"].items() if not step["ok"]]
    verdict = f"{len(failed)} of {len(result['steps'])} steps failed" if failed else "every step passed"
    print(f"{verdict}; the report is in {output}", file=sys.stderr)
    if arguments.json:
        write_json(result)
    return ExitCode.FAILED if failed else ExitCode.DONE


def _note(step: str, result: dict[str, Any]) -> None:
    verdict = "ok" if result["ok"] else f"FAILED: {result['error']}"
    print(f"{step:<32} {result['seconds']:6.1f} s  {verdict}", file=sys.stderr)
