"""``weightlift doctor``: so far its self-test, which runs the pipeline's checks on a real card."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weightlift.cli.outcome import ExitCode, UsageError, write_json

if TYPE_CHECKING:
    import argparse

SUMMARY: str = "check that a GPU is filled correctly by every path, and write a report to send back"

_REPORT: Final = "weightlift-self-test.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--self-test", action="store_true", help="load known tensors onto a device by every path and compare each byte"
    )
    parser.add_argument("--device", default="cuda:0", help="the device to test (default: cuda:0)")
    parser.add_argument(
        "--folder", type=Path, help="where to put a checkpoint of 100 MB meanwhile (default: a temporary folder)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(_REPORT), help=f"the file with the report (default: {_REPORT})"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the self-test, print a line per step and write the file."""
    if not arguments.self_test:
        raise UsageError("nothing was asked for", "usage: weightlift doctor --self-test [--device DEVICE]")
    from weightlift.health.self_test import run_self_test

    result = run_self_test(arguments.device, arguments.folder, _note)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, step in result["steps"].items() if not step["ok"]]
    verdict = f"{len(failed)} of {len(result['steps'])} steps failed" if failed else "every step passed"
    print(f"{verdict}; the report is in {arguments.output}", file=sys.stderr)
    if arguments.json:
        write_json(result)
    return ExitCode.FAILED if failed else ExitCode.DONE


def _note(step: str, result: dict[str, Any]) -> None:
    verdict = "ok" if result["ok"] else f"FAILED: {result['error']}"
    print(f"{step:<32} {result['seconds']:6.1f} s  {verdict}", file=sys.stderr)
