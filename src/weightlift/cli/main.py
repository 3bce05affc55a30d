"""The entry point: picks the sub-command, runs it, and turns whatever happens into an exit code.

A new sub-command is a module with ``SUMMARY``, ``configure(parser)`` and ``run(arguments)``, and one line in
:data:`COMMANDS`. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from weightlift._version import __version__
from weightlift.cli import bench, cache, doctor, guard, inspect, load, manifest, verify
from weightlift.cli.outcome import ExitCode, UsageError, exit_code, write_error
from weightlift.cli.spelling import as_options, option_spellings

if TYPE_CHECKING:
    from collections.abc import Sequence


class Command(Protocol):
    """What a sub-command's module holds."""

    SUMMARY: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Carry it out and return the exit code."""


COMMANDS: Final[dict[str, Command]] = {
    "load": load,
    "inspect": inspect,
    "manifest": manifest,
    "verify": verify,
    "doctor": doctor,
    "bench": bench,
    "guard": guard,
    "cache": cache,
}

EXIT_CODES: Final = (
    "exit codes: 0 done, 1 failed, 2 wrong usage, 3 doctor found the machine degraded, "
    "4 does not fit the budget or the machine, 130 interrupted"
)


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong with the arguments, so that it is reported in one place."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage().rstrip())


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="weightlift",
        description="Moves model weights from storage into memory, fast, inside a host-memory budget.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"weightlift {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.SUMMARY, description=command.SUMMARY, epilog=EXIT_CODES)
        command.configure(added)
        said = "write JSON lines to stderr" if name == "guard" else "print one JSON object"
        added.add_argument("--json", action="store_true", help=f"{said} instead of text")
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments after the program's name; those of this process if left out.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    _accept_any_text()
    try:
        code = _reported(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough. What is still buffered must not be flushed into the closed pipe.
        _discard_output()
        return ExitCode.DONE
    except OSError as err:
        _discard_output()
        print(f"error: the output could not be written: {err.strerror or err}", file=sys.stderr)
        return ExitCode.FAILED
    return code


def _reported(words: Sequence[str]) -> int:
    """Run a command; an error is reported and becomes an exit code, a broken pipe is left to the caller."""
    try:
        return _run(words)
    except BrokenPipeError:
        raise
    except SystemExit as finished:  # --help and --version
        return int(finished.code or 0)
    except (Exception, KeyboardInterrupt) as err:  # noqa: BLE001 - the outermost place: everything becomes an exit code
        # What follows a bare "--" belongs to another program.
        own = words[: words.index("--")] if "--" in words else words
        options = option_spellings(make_parser())
        write_error(err, as_json="--json" in own, debug="--debug" in own, spell=lambda text: as_options(text, options))
        return exit_code(err)


def _run(words: Sequence[str]) -> int:
    parser = make_parser()
    arguments = parser.parse_args(words)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return ExitCode.USAGE
    return int(arguments.run(arguments))


def _accept_any_text() -> None:
    """Characters that the terminal's encoding lacks are escaped instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    except (OSError, ValueError):  # stdout is not a descriptor of this process
        return
