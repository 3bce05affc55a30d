"""Every check and every rule of doctor, one module per group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightlift.health.checks import devices, machine, software, storage, swap

if TYPE_CHECKING:
    from weightlift.health.findings import Check, Rule

CHECKS: Final[tuple[Check, ...]] = (
    *machine.CHECKS,
    *swap.CHECKS,
    *storage.CHECKS,
    *devices.CHECKS,
    *software.CHECKS,
)
"""All checks, in the order in which they are run."""

RULES: Final[tuple[Rule, ...]] = (
    *machine.RULES,
    *swap.RULES,
    *storage.RULES,
    *devices.RULES,
    *software.RULES,
)
"""All rules, in the order in which the documentation lists them."""
