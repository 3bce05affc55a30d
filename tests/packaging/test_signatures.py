"""Whoever asks for help on something public gets its signature, however its class is made."""

from __future__ import annotations

import inspect

import pytest

import weightlift


@pytest.mark.parametrize("name", [name for name in weightlift.__all__ if isinstance(getattr(weightlift, name), type)])
def test_a_public_class_has_a_signature(name: str) -> None:
    assert isinstance(inspect.signature(getattr(weightlift, name)), inspect.Signature)


def test_an_option_is_in_the_signature() -> None:
    assert inspect.signature(weightlift.LoadOptions).parameters["device"].default == "cpu"
