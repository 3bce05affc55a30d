"""How files opened through the face are loaded unless told otherwise; set for the length of a patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightlift.keywords import LoadKeywords

_current: LoadKeywords = {}


def current() -> LoadKeywords:
    """The keywords in force."""
    return _current


def replace(keywords: LoadKeywords) -> LoadKeywords:
    """Put other keywords in force; returns those that were."""
    global _current  # noqa: PLW0603 - one setting for all handles of the process, which have no argument for it
    before, _current = _current, keywords
    return before
