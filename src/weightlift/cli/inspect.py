"""``weightlift inspect``: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from weightlift.api import open as open_checkpoint
from weightlift.cli.arguments import add_checkpoint
from weightlift.cli.outcome import ExitCode, write_json
from weightlift.options import LoadOptions
from weightlift.reports.inspection import SortKey, inspect_checkpoint
from weightlift.reports.model_summary import summarise_model
from weightlift.selection import select_rows

SUMMARY: str = "show the tensors, data types, files and metadata of a checkpoint; reads headers only"

TENSORS_SHOWN: Final = 40
SCREEN_SHOWN: Final = 8
"""The same where a quantised model is described: everything fits on one screen."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_checkpoint(parser)
    parser.add_argument(
        "--sort",
        choices=[key.value for key in SortKey],
        default=SortKey.FILE.value,
        help="order of the tensors: name, size (largest first) or place in the files (default: file)",
    )
    parser.add_argument(
        "--tensors", action=argparse.BooleanOptionalAction, default=True, help="list the tensors (default: yes)"
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=_count,
        help=f"most tensors, files and metadata entries shown; 0 for all "
        f"(default: {TENSORS_SHOWN}, for quantised models {SCREEN_SHOWN}; all with --json)",
    )


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Read the headers and print what they say."""
    header = arguments.header or LoadOptions().header
    checkpoint = open_checkpoint(arguments.path, header=header)
    rows = select_rows(checkpoint.description, arguments.names)
    described = summarise_model(checkpoint.description).is_quantised
    usual = 0 if arguments.json else SCREEN_SHOWN if described else TENSORS_SHOWN
    limit = usual if arguments.limit is None else arguments.limit
    inspection = inspect_checkpoint(
        checkpoint,
        rows,
        path=arguments.path,
        sort=SortKey(arguments.sort),
        list_tensors=arguments.tensors,
        limit=limit or None,
    )
    if arguments.json:
        write_json(inspection.to_json())
        return ExitCode.DONE
    from weightlift.reports.console import show
    from weightlift.reports.inspection_tables import inspect_tables, tensor_lines

    show(sys.stdout, *inspect_tables(inspection, limit=limit or None))
    for line in tensor_lines(inspection):
        print(line)
    return ExitCode.DONE
