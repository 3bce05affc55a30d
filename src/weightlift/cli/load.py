"""``weightlift load``: load a checkpoint and say what that took."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from weightlift.api import fit, load
from weightlift.cli.arguments import add_checkpoint, described
from weightlift.cli.outcome import ExitCode, write_json
from weightlift.cli.reading import READING, add_progress, add_reading, given, progress_of
from weightlift.cli.recorded import recorded
from weightlift.types import Framework, Staging

if TYPE_CHECKING:
    import argparse

SUMMARY: str = "load a checkpoint and report time, read path and memory"

_OPTIONS: Final = (
    *READING,
    "staging",
    "device",
    "names",
    "dtype",
    "dequantize",
    "framework",
    "verify",
    "watch_seconds",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments; one that is not given is left to :class:`~weightlift.options.LoadOptions`."""
    add_checkpoint(parser)
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help=described("where tensors go: cpu, null (read and discard) or a device of the framework", "device"),
    )
    add_reading(parser)
    parser.add_argument(
        "--staging",
        choices=[staging.value for staging in Staging],
        help=described("which memory lies between storage and a GPU", "staging"),
    )
    parser.add_argument(
        "--framework",
        choices=[framework.value for framework in Framework],
        help=described("whose tensors are made", "framework"),
    )
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help=described("convert floating-point tensors, for example to float16", "dtype", otherwise="as stored"),
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write what every worker did and when, for ui.perfetto.dev or chrome://tracing; also if the load fails",
    )
    parser.add_argument("--report", metavar="FILE.html", help="write a page with charts of speed and memory over time")
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        dest="watch_seconds",
        help=described("", "watch_seconds", "WEIGHTLIFT_WATCH"),
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        default=None,
        help="turn the quantised tensors of a GGUF file into numbers, float32 unless --dtype says otherwise",
    )
    parser.add_argument("--digest", action="store_true", help="print the xxh3-128 digest of every tensor as stored")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the load would take and whether it fits; reads headers only"
    )
    parser.add_argument("--verify", metavar="MANIFEST", help="refuse tensors whose bytes are not those of a manifest")
    add_progress(parser)
    parser.add_argument("--verbose", "-v", action="store_true", help="show every file and every term of the budget")


def run(arguments: argparse.Namespace) -> int:
    """Load, then print the report."""
    keywords = given(arguments, _OPTIONS)
    if arguments.dry_run:
        return _dry_run(arguments, keywords)
    with progress_of(arguments) as progress, recorded(arguments.trace, arguments.report, arguments.path) as written:
        keywords["recording"] = written.recording
        report = written.report = load(arguments.path, progress=progress, digest=arguments.digest, **keywords).report
    if arguments.json:
        write_json(report.to_json())
        return ExitCode.DONE
    from weightlift.reports.console import show
    from weightlift.reports.load import digest_lines, load_tables

    show(sys.stdout, *load_tables(report, arguments.path, verbose=arguments.verbose))
    for line in digest_lines(report):
        print(line)
    return ExitCode.DONE


def _dry_run(arguments: argparse.Namespace, keywords: dict[str, Any]) -> int:
    """Print the fit report; its verdict is the exit code."""
    found = fit(arguments.path, **keywords)
    if arguments.json:
        write_json(found.to_json())
    else:
        from weightlift.reports.console import show
        from weightlift.reports.fit import fit_tables

        show(sys.stdout, *fit_tables(found, arguments.path))
    return ExitCode.DOES_NOT_FIT if found.missing_bytes else ExitCode.DONE
