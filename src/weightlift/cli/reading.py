"""Arguments of every command that reads tensors: along which path, within which budget, and with how much talk."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any, Final

from weightlift.cli.arguments import described
from weightlift.types import CachePolicy, EngineName, Method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

READING: Final = ("method", "cache", "host_memory", "engine", "header", "workers", "chunk_bytes")
"""The fields of :class:`~weightlift.options.LoadOptions` that these arguments set."""


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add how to read; what is not given is left to :class:`~weightlift.options.LoadOptions`."""
    for option, kind in (("method", Method), ("cache", CachePolicy), ("engine", EngineName)):
        parser.add_argument(
            f"--{option}",
            choices=[member.value for member in kind],
            help=described("", option, f"WEIGHTLIFT_{option.upper()}"),
        )
    parser.add_argument("--host-memory", metavar="SIZE", help=described("", "host_memory", "WEIGHTLIFT_HOST_MEMORY"))
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


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add the switch for a progress bar."""
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show progress on stderr; without this option only on a terminal and not with --json",
    )


def given(arguments: argparse.Namespace, options: Iterable[str] = READING) -> dict[str, Any]:
    """The options that were given, as keywords."""
    return {option: getattr(arguments, option) for option in options if getattr(arguments, option) is not None}


def progress_of(arguments: argparse.Namespace) -> AbstractContextManager[Callable[[int, int], None] | None]:
    """What to call with the progress, for as long as the command reads."""
    on_terminal = sys.stderr.isatty()
    wanted = on_terminal and not arguments.json if arguments.progress is None else arguments.progress
    if not wanted:
        return contextlib.nullcontext()
    from weightlift.reports.progress import progress_bar, progress_lines

    return progress_bar(sys.stderr) if on_terminal else contextlib.nullcontext(progress_lines(sys.stderr))
