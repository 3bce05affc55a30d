"""All checks run on one machine's facts; one that fails is a gap like any other, never the end of the examination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weightlift.health.checks import CHECKS
from weightlift.health.facts import Gap
from weightlift.health.findings import Finding, Level

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightlift.health.facts import Facts
    from weightlift.health.findings import Check

_WORST_FIRST: Final = (Level.ERROR, Level.WARNING, Level.ADVICE, Level.FACT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What came of all checks.

    Attributes:
        findings: the worst first.
        gaps: what could not be found out or judged.
    """

    findings: tuple[Finding, ...]
    gaps: tuple[Gap, ...]

    @property
    def degraded(self) -> bool:
        """Whether something keeps the machine from doing what it could, or endangers it."""
        return any(finding.level in {Level.WARNING, Level.ERROR} for finding in self.findings)


def examine(facts: Facts, checks: Iterable[Check] = CHECKS) -> Examination:
    """Run every check on one machine's facts.

    Args:
        facts: the machine, real or made up.
        checks: other ones than all of weightlift's.
    """
    findings: list[Finding] = []
    gaps = list(facts.gaps)
    for check in checks:
        try:
            findings += check(facts)
        except Exception as err:  # noqa: BLE001 - a defect of one check must not hide what the others find
            gaps.append(Gap(what=f"the check {check.__name__}", why=f"{type(err).__name__}: {err}"))
    return Examination(
        findings=tuple(sorted(findings, key=lambda finding: _WORST_FIRST.index(finding.level))), gaps=tuple(gaps)
    )
