"""Errors: one tree, drawn truthfully, each also the built-in error that callers expect."""

from __future__ import annotations

import inspect
import re

import pytest

from weightlift import errors
from weightlift.errors import WeightliftError

TREE = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == errors.__name__
}


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"([├└]── |^    )(\w+Error)(?: \((\w+)\))?", errors.__doc__, re.MULTILINE)
    assert {name for _, name, _ in drawn} == set(TREE)
    for _, name, builtin in drawn:
        assert not builtin or builtin in [base.__name__ for base in TREE[name].__mro__], name


def test_a_budget_error_carries_the_smallest_budget_that_works() -> None:
    error = errors.BudgetError("too small", hint="more", smallest_bytes=5)
    assert (str(error), error.smallest_bytes) == ("too small\nhint: more", 5)


@pytest.mark.parametrize("kind", [kind for kind in TREE.values() if kind is not errors.BudgetError])
def test_every_error_carries_what_it_knows(kind: type[WeightliftError]) -> None:
    error = kind("it broke", hint="mend it", path="/a/file", tensor="weight", offset=5, length=7)
    assert str(error) == "it broke\nhint: mend it"
    assert (error.message, error.hint, error.path) == ("it broke", "mend it", "/a/file")
    assert (error.tensor, error.offset, error.length) == ("weight", 5, 7)
    assert isinstance(error, WeightliftError)
    plain = kind("it broke")
    assert (str(plain), plain.path, plain.tensor, plain.offset) == ("it broke", None, None, None)
