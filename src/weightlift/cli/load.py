"""``weightlift load``: load a checkpoint and say what that took."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any, Final

from weightlift.api import load
from weightlift.cli.arguments import add_checkpoint, described
from weightlift.cli.outcome import ExitCode, write_json
from weightlift.types import CachePolicy, EngineName, Framework, Method

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

SUMMARY: str = "load a checkpoint and report time, read path and memory"

_OPTIONS: Final = (
    "method",
    "cache",
    "host_memory",
    "engine",
    "device",
    "names",
    "dtype",
    "dequantize",
    "framework",
    "header",
    "workers",
    "chunk_bytes",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments; one that is not given is left to :class:`~weightlift.options.LoadOptions`."""
    add_checkpoint(parser)
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help=described("where tensors go: cpu, null (read and discard) or a device of the framework", "device"),
    )
    for option, kind in (("method", Method), ("cache", CachePolicy), ("engine", EngineName)):
        parser.add_argument(
            f"--{option}",
            choices=[member.value for member in kind],
            help=described("", option, f"WEIGHTLIFT_{option.upper()}"),
        )
    parser.add_argument("--host-memory", metavar="SIZE", help=described("", "host_memory", "WEIGHTLIFT_HOST_MEMORY"))
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
        "--workers",
        metavar="N",
        type=int,
        help=described("", "workers", "WEIGHTLIFT_WORKERS", otherwise="found while loading"),
    )
    parser.add_argument(
        "--chunk",
        metavar="SIZE",
        dest="chunk_bytes",
        help=described("", "chunk_bytes", "WEIGHTLIFT_CHUNK", otherwise="found while loading"),
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        default=None,
        help=described(
            "turn the quantised tensors of a GGUF file into numbers, float32 unless --dtype says", "dequantize"
        ),
    )
    parser.add_argument("--digest", action="store_true", help="print the xxh3-128 digest of every tensor as stored")
    _add_talk(parser)


def _add_talk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show progress on stderr; without this option only on a terminal and not with --json",
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="show every file and every term of the budget")


def run(arguments: argparse.Namespace) -> int:
    """Load, then print the report."""
    keywords: dict[str, Any] = {
        option: getattr(arguments, option) for option in _OPTIONS if getattr(arguments, option) is not None
    }
    with _progress(arguments) as progress:
        report = load(arguments.path, progress=progress, digest=arguments.digest, **keywords).report
    if arguments.json:
        write_json(report.to_json())
        return ExitCode.DONE
    from weightlift.reports.console import show
    from weightlift.reports.load import digest_lines, load_tables

    show(sys.stdout, *load_tables(report, arguments.path, verbose=arguments.verbose))
    for line in digest_lines(report):
        print(line)
    return ExitCode.DONE


def _progress(arguments: argparse.Namespace) -> AbstractContextManager[Callable[[int, int], None] | None]:
    on_terminal = sys.stderr.isatty()
    wanted = on_terminal and not arguments.json if arguments.progress is None else arguments.progress
    if not wanted:
        return contextlib.nullcontext()
    from weightlift.reports.progress import progress_bar, progress_lines

    return progress_bar(sys.stderr) if on_terminal else contextlib.nullcontext(progress_lines(sys.stderr))
