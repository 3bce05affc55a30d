"""What every command explains about itself, and that every public error comes with a hint."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import weightlift
from weightlift import errors
from weightlift.cli.main import COMMANDS, make_parser

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(weightlift.__file__).parent
SHORTEST_EXPLANATION = 10
"""Characters; nothing shorter explains an option."""


def _commands() -> dict[str, argparse.ArgumentParser]:
    parser = make_parser()
    return next(dict(each.choices) for each in parser._actions if isinstance(each, argparse._SubParsersAction))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_of_a_command_is_explained(command: str) -> None:
    parser = _commands()[command]
    unexplained = [
        action.dest
        for action in parser._actions
        if action.help is argparse.SUPPRESS or len(action.help or "") < SHORTEST_EXPLANATION
    ]
    assert not unexplained


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_what_a_value_is(command: str) -> None:
    parser = _commands()[command]
    nameless = [
        action.option_strings
        for action in parser._actions
        if action.option_strings and action.nargs != 0 and not action.choices and not action.metavar
    ]
    assert not nameless, "these take a value, and help shows it as their own name in capitals"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_starts_lower_case_and_ends_without_a_full_stop(command: str) -> None:
    parser = _commands()[command]
    sentences = [parser.description or "", *(action.help or "" for action in parser._actions)]
    assert [text for text in sentences if text.endswith(".") or not text or text[0].isspace()] == []
    own = [text for text in sentences if text.split()[0] != "Python"]
    assert [text for text in own if text[0].isupper()] == []


def test_help_can_be_formatted_for_every_command() -> None:
    for name, parser in _commands().items():
        assert COMMANDS[name].SUMMARY in " ".join(parser.format_help().split())


def _error_classes() -> dict[str, type[errors.WeightliftError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.WeightliftError)
    }


def _constructions() -> Iterator[tuple[str, str, ast.Call]]:
    """Every place where a public error is made: (class, place, call)."""
    classes = _error_classes()
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            if name in classes:
                yield name, f"{path.relative_to(SOURCES)}:{node.lineno}", node


def _has_hint(call: ast.Call) -> bool:
    for keyword in call.keywords:
        if keyword.arg is None:  # **details: what they hold is the business of the place that made them
            return True
        if keyword.arg == "hint":
            # Neither nothing at all, nor nothing where a table has no entry.
            ends = [keyword.value, *(keyword.value.args if isinstance(keyword.value, ast.Call) else [])]
            return not any(isinstance(end, ast.Constant) and end.value in ("", None) for end in ends)
    return False


def test_every_error_is_made_with_a_hint() -> None:
    places = [(name, place) for name, place, call in _constructions() if not _has_hint(call)]
    assert not places, "say what the reader can do about it"


def test_every_public_error_is_made_somewhere() -> None:
    made = {name for name, _, _ in _constructions()}
    bases = {base.__name__ for kind in _error_classes().values() for base in kind.__mro__[1:]}
    assert set(_error_classes()) - made - bases == set()


@pytest.mark.parametrize("name", sorted(_error_classes()))
def test_every_public_error_says_what_it_stands_for(name: str) -> None:
    kind = _error_classes()[name]
    assert kind.__dict__.get("__doc__")
    assert name in (errors.__doc__ or ""), "the overview at the head of errors.py lacks it"
