"""How a command ends: its exit code, and what is said about an error on either stream.

Owns the exit codes. Data goes to stdout, talk to stderr; with ``--json`` stdout gets exactly one object, whether the
command succeeded or not. Text that may come from a file is never written as it is: it could steer the terminal.
"""

from __future__ import annotations

import enum
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final

from weightlift.errors import EngineError, OptionError, WeightliftError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Spelling = Callable[[str], str]

_MESSAGE_CHARACTERS_MAX: Final = 4000


class ExitCode(enum.IntEnum):
    """What a command's exit code says; 3 belongs to the command that examines a machine."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DEGRADED = 3
    DOES_NOT_FIT = 4
    INTERRUPTED = 130


class UsageError(Exception):
    """The command line itself is wrong.

    Args:
        message: what is wrong with it.
        usage: how it should look.
    """

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


def exit_code(error: BaseException) -> ExitCode:
    """The exit code that an error ends the command with."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, UsageError | OptionError):
        return ExitCode.USAGE
    # BudgetError and InsufficientMemoryError are memory errors too.
    return ExitCode.DOES_NOT_FIT if isinstance(error, MemoryError) else ExitCode.FAILED


def write_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object, laid out for people on a terminal and on one line otherwise."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def write_error(error: BaseException, *, as_json: bool, debug: bool, spell: Spelling = str) -> None:
    """Say what went wrong: on stderr always, and as the one object on stdout where JSON was asked for.

    Args:
        error: what ended the command.
        as_json: ``--json`` was given.
        debug: show the traceback too.
        spell: puts what is written for callers in Python into the command line's words.
    """
    if debug and not isinstance(error, UsageError):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, UsageError):
        print(error.usage, file=sys.stderr)
    message, hint = _message(error, spell), spell(_hint(error))
    for line in _harmless(f"{'' if isinstance(error, KeyboardInterrupt) else 'error: '}{message}"):
        print(line, file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print("\n".join(_harmless(f"note: {note}")), file=sys.stderr)
    if hint:
        print("\n".join(_harmless(f"hint: {hint}")), file=sys.stderr)
    if as_json:
        write_json({"schema": 1, "error": error_fields(error, spell)})


def error_fields(error: BaseException, spell: Spelling = str) -> dict[str, Any]:
    """An error as a JSON object; what does not apply is null."""
    path = getattr(error, "path", None)
    return {
        "type": type(error).__name__,
        "message": _message(error, spell),
        "hint": spell(_hint(error)) or None,
        "path": None if path is None else os.fspath(path),
        "tensor": getattr(error, "tensor", None),
        "offset": getattr(error, "offset", None),
    }


def _message(error: BaseException, spell: Spelling) -> str:
    if isinstance(error, OptionError):
        return spell(error.message)
    if isinstance(error, WeightliftError):
        return error.message
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _hint(error: BaseException) -> str:
    if isinstance(error, WeightliftError) and not isinstance(error, EngineError):
        return error.hint
    if isinstance(error, UsageError):
        return "--help lists what is possible"
    if isinstance(error, KeyboardInterrupt | MemoryError | OSError):
        return ""
    return "please report this with the output of the same command and --debug"


def _harmless(text: str) -> list[str]:
    return [printable(line, _MESSAGE_CHARACTERS_MAX) for line in text.splitlines()]
