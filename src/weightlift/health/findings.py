"""What a finding is, and what a check is.

A check is a function from facts to findings; it asks nobody. Each rule is declared once, with what is always true of it
(when it applies, why it matters, what mends it), and the table in the documentation is made of these declarations.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from weightlift.health.facts import Facts


class Level(enum.StrEnum):
    """How bad a finding is. A machine with warnings or errors counts as degraded."""

    FACT = "fact"
    ADVICE = "advice"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found on one machine.

    Attributes:
        id: of its rule.
        level: how bad it is.
        text: what was found, with its numbers.
        why: why it matters.
        mend: the exact command or option that mends it.
    """

    id: str
    level: Level
    text: str
    why: str
    mend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What can be found.

    Attributes:
        id: its name, for people to search for.
        level: how bad it is.
        when: what has to be the case.
        why: why it matters.
        mend: what mends it; braces stand for what depends on the machine.
    """

    id: str
    level: Level
    when: str
    why: str
    mend: str

    def found(self, text: str, mend: str | None = None) -> Finding:
        """A finding of this rule.

        Args:
            text: what was found, with its numbers.
            mend: what mends it here, where the rule's own words are not exact enough.
        """
        return Finding(id=self.id, level=self.level, text=text, why=self.why, mend=self.mend if mend is None else mend)


Check = Callable[[Facts], Iterator[Finding]]
