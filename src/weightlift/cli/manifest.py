"""``weightlift manifest``: take down what the files and tensors of a checkpoint hash to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from weightlift.api import make_manifest
from weightlift.api import open as open_checkpoint
from weightlift.cli.arguments import add_path
from weightlift.cli.outcome import ExitCode, write_json
from weightlift.cli.reading import add_progress, add_reading, given, progress_of
from weightlift.errors import printable
from weightlift.manifest import MANIFEST_NAME, manifest_path, write_manifest

if TYPE_CHECKING:
    import argparse

SUMMARY: str = "hash every file and tensor of a checkpoint, and write a manifest to verify them with"

_STANDARD_OUTPUT = "-"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_path(parser)
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        help=f"where to write it; - for standard output (default: {MANIFEST_NAME} beside the weights, or "
        "FILE.manifest.json for a single file)",
    )
    add_reading(parser)
    add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Hash everything and write the manifest."""
    keywords = given(arguments)
    header = {"header": keywords["header"]} if "header" in keywords else {}
    checkpoint = open_checkpoint(arguments.path, **header)
    with progress_of(arguments) as progress:
        manifest = make_manifest(checkpoint, progress=progress, **keywords)
    if arguments.output == _STANDARD_OUTPUT:
        sys.stdout.write(manifest.to_bytes().decode("utf-8"))
        return ExitCode.DONE
    path = manifest_path(Path(arguments.path), checkpoint.description)
    path = Path(arguments.output) if arguments.output else path
    write_manifest(manifest, path)
    if arguments.json:
        made = {"manifest": str(path), "files": len(manifest.files), "tensors": len(manifest.tensors)}
        write_json({"schema": 1, **made, "bytes": sum(entry.bytes for entry in manifest.files.values())})
    else:
        print(f"{printable(str(path), 400)}: {len(manifest.files):,} files, {len(manifest.tensors):,} tensors")
    return ExitCode.DONE
