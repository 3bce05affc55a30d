"""Hints in the spelling of the command line: messages are written for callers in Python, as ``cache="keep"``.

Owns the translation. The options that exist are read off the parser, so that a hint never names one that does not.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEYWORD: Final = re.compile(
    r"""(?<![\w.-])(?P<name>[a-z][a-z_]*)=
        (?: "(?P<text>[^"]*)" (?P<others> (?: (?:,|\ or)\ "[^"]*" )* )
          | (?P<word> '[^']*' | … | [\w.]+ ) )""",
    re.VERBOSE,
)


def option_spellings(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The long option of every keyword that some command takes; flags end with nothing, others with a blank."""
    found: dict[str, str] = {}
    for action in parser._actions:  # noqa: SLF001 - argparse has no public list of its arguments
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                found.update(option_spellings(command))
        elif long := [option for option in action.option_strings if option.startswith("--")]:
            found[action.dest] = long[0] if action.nargs == 0 else f"{long[0]} "
    return found


def as_options(text: str, options: Mapping[str, str]) -> str:
    """A hint with ``host_memory=8388608`` as ``--host-memory 8388608``; what is no option stays as it is.

    Args:
        text: a hint or message.
        options: from :func:`option_spellings`.
    """

    def spell(found: re.Match[str]) -> str:
        option = options.get(found["name"])
        if option is None:
            return found[0]
        if not option.endswith(" "):
            return option
        value = found["word"] if found["text"] is None else found["text"] + found["others"].replace('"', "")
        return option + value

    return _KEYWORD.sub(spell, text)
