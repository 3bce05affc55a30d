"""``weightlift verify``: compare every byte of a checkpoint with its manifest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from weightlift.api import open as open_checkpoint
from weightlift.api import verify
from weightlift.cli.arguments import add_path
from weightlift.cli.outcome import ExitCode, write_json
from weightlift.cli.reading import add_progress, add_reading, given, progress_of
from weightlift.errors import printable
from weightlift.manifest import manifest_path, read_manifest

if TYPE_CHECKING:
    import argparse

SUMMARY: str = "hash every file and tensor of a checkpoint, and compare with a manifest"

_NAME_CHARACTERS = 400


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_path(parser)
    parser.usage = "%(prog)s [options] PATH [MANIFEST]"
    parser.add_argument(
        "manifest",
        metavar="MANIFEST",
        nargs="?",
        help="what `weightlift manifest` wrote (default: where it writes to by default)",
    )
    add_reading(parser)
    add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Hash everything and say what differs."""
    keywords = given(arguments)
    header = {"header": keywords["header"]} if "header" in keywords else {}
    checkpoint = open_checkpoint(arguments.path, **header)
    path = arguments.manifest or manifest_path(Path(arguments.path), checkpoint.description)
    # Read first: hashing may take minutes, and there is no need to begin if there is nothing to compare with.
    manifest = read_manifest(path)
    with progress_of(arguments) as progress:
        found = verify(checkpoint, manifest, progress=progress, **keywords)
    if arguments.json:
        write_json(found.to_json())
    else:
        for difference in found.differences:
            name = printable(difference.name, _NAME_CHARACTERS)
            print(f"{difference.kind} '{name}' {difference.problem}")
        verdict = "as the manifest says" if found.ok else f"{len(found.differences):,} differences"
        speed = f"{found.report.gigabytes_per_second:.2f} GB/s"
        print(f"{found.files:,} files, {found.tensors:,} tensors: {verdict} ({speed})", file=sys.stderr)
    return ExitCode.DONE if found.ok else ExitCode.FAILED
