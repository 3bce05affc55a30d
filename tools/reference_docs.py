"""Writes the pages of ``docs/reference`` that follow from the code: the command line, the environment, the errors.

``--check`` writes nothing and fails where a page differs; a test does the same.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightlift import errors
from weightlift.cli.main import COMMANDS, EXIT_CODES, make_parser
from weightlift.cli.spelling import option_spellings
from weightlift.options import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER: Final = Path(__file__).resolve().parent.parent / "docs" / "reference"
_WRITTEN: Final = "<!-- written by tools/reference_docs.py -->"
_ABOUT_COMMANDS: Final = """\
`python -m weightlift` is the same program as `weightlift`. Sizes are written like `128MiB` or `2GB`. What a
command finds goes to the standard output, everything else to the standard error stream; with `--json` the
standard output gets exactly one object (but for `guard`, where it is the command's own)."""
_ABOUT_VARIABLES: Final = """\
An option given by the caller beats the environment, the environment beats the default. An empty variable
counts as unset."""
_ABOUT_BUILDING: Final = """\
`WEIGHTLIFT_BUILD_ENGINE` is read by the build alone: `0` installs without the C engine, `require` makes a
failed build fatal.
"""
_ABOUT_ERRORS: Final = """\
Every error that weightlift raises on purpose is one of these, from `weightlift.errors`. Each says what was
found with its numbers, and `hint` says what to do about it; `path`, `tensor`, `offset` and `length` are set
where they apply. Running out of memory on a device is the framework's own error, raised as it is."""


def pages() -> dict[str, str]:
    """Every page by its file name, as the code has it now.

    Defaults are those of a process in which none of weightlift's environment variables is set.
    """
    kept = {name: os.environ.pop(name) for name in ENVIRONMENT if name in os.environ}
    try:
        return {"command-line.md": _command_line(), "environment.md": _environment(), "errors.md": _errors()}
    finally:
        os.environ.update(kept)


def _command_line() -> str:
    parsers = next(
        dict(action.choices)
        for action in make_parser()._actions  # noqa: SLF001 - argparse has no public list of its arguments
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001
    )
    parts = [
        "# Command line",
        _WRITTEN,
        _ABOUT_COMMANDS,
        _sentence(EXIT_CODES),
    ]
    for name in COMMANDS:
        parts += [f"## weightlift {name}", f"{_sentence(COMMANDS[name].SUMMARY)}", _arguments(parsers[name])]
    return "\n\n".join(parts) + "\n"


def _arguments(parser: argparse.ArgumentParser) -> str:
    rows = ["| argument | meaning |", "|---|---|"]
    for action in parser._actions:  # noqa: SLF001 - as above
        if action.dest == "help":
            continue
        values = "\\|".join(map(str, action.choices or ())) or str(action.metavar or "")
        takes = f" {values}" if values and action.nargs != 0 else ""
        spelled = [f"`{option}{takes}`" for option in action.option_strings] or [f"`{action.metavar or values}`"]
        explained = (action.help or "") % {**vars(action), "prog": parser.prog}
        rows.append(f"| {', '.join(spelled)} | {_plain(explained)} |")
    return "\n".join(rows)


def _environment() -> str:
    options = _options_by_variable()
    rows = ["| variable | what it sets | option in Python | option of `weightlift load` |", "|---|---|---|---|"]
    for variable, meaning in ENVIRONMENT.items():
        field, option = options.get(variable, ("", ""))
        rows.append(f"| `{variable}` | {_plain(meaning)} | {field and f'`{field}=`'} | {option and f'`{option}`'} |")
    return "\n\n".join(
        (
            "# Environment variables",
            _WRITTEN,
            _ABOUT_VARIABLES,
            "\n".join(rows),
            _ABOUT_BUILDING,
        )
    )


def _options_by_variable() -> dict[str, tuple[str, str]]:
    """Keyword and option of ``weightlift load`` by environment variable, read off the help that names the variable."""
    parser = make_parser()
    spelled = option_spellings(parser)
    found: dict[str, tuple[str, str]] = {}
    for group in parser._actions:  # noqa: SLF001 - as above
        if isinstance(group, argparse._SubParsersAction):  # noqa: SLF001
            for action in group.choices["load"]._actions:  # noqa: SLF001
                for variable in ENVIRONMENT:
                    if (action.help or "").endswith(f"environment: {variable})"):
                        found[variable] = (action.dest, spelled[action.dest].strip())
    return found


def _errors() -> str:
    rows = ["| error | is also a | when |", "|---|---|---|"]
    for kind in _error_classes():
        builtin = [f"`{base.__name__}`" for base in kind.__mro__[1:] if base.__module__ == "builtins"]
        nearest = ", ".join(builtin[: builtin.index("`Exception`")]) or "–"
        first = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
        rows.append(f"| `{kind.__name__}` | {nearest} | {first} |")
    return "\n\n".join(
        (
            "# Errors",
            _WRITTEN,
            _ABOUT_ERRORS,
            "\n".join(rows) + "\n",
        )
    )


def _error_classes() -> Iterator[type[errors.WeightliftError]]:
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, errors.WeightliftError):
            yield value


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table."""
    for character in "\\|*[]<>_":
        text = text.replace(character, f"\\{character}")
    return text


def main(words: list[str]) -> int:
    """Write the pages, or say which are out of date."""
    outdated = 0
    for name, wanted in pages().items():
        page = FOLDER / name
        if page.exists() and page.read_text(encoding="utf-8") == wanted:
            continue
        outdated += 1
        if "--check" in words:
            print(f"{name} is out of date: run tools/reference_docs.py")
        else:
            page.write_text(wanted, encoding="utf-8")
    return 1 if outdated and "--check" in words else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
