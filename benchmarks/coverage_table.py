"""What the tests reach, in words and as a table, out of ``benchmarks/results/coverage.json``, for ``page.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from page_tables import Part, Target, table
from page_tables import targets as targets_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Result = Mapping[str, Any]


def is_complete(reached: Mapping[str, Any]) -> bool:
    """Whether every statement and every branch is reached."""
    kinds = ("statements", "branches")
    return all(reached[kind] == reached[f"{kind}_reached"] for kind in kinds)


def targets(result: Result) -> list[Target]:
    """What was to be reached: a part of all branches, and all of some modules."""
    wanted, overall, packages = result["wanted"], result["overall"], result["packages"]
    least = wanted["overall_branches_percent"]
    found = [
        Target(
            "branches that the tests take",
            f"{overall['branches_percent']:.1f} %",
            f"≥ {least:.0f} %",
            overall["branches_percent"] >= least,
        )
    ]
    for name in wanted["complete"]:
        shown = f"{packages[name]['statements_percent']:.1f} %, {packages[name]['branches_percent']:.1f} %"
        found.append(
            Target(f"statements and branches of `{name}` that they take", shown, "100 %", is_complete(packages[name]))
        )
    return found


def part(result: Result) -> Part:
    """The whole record: what was to be reached, and every package."""
    lines = [
        (f"`{name}`", *(f"{reached[kind]:,}" for kind in ("statements", "branches")), *_percents(reached))
        for name, reached in (*result["packages"].items(), ("all", result["overall"]))
    ]
    headings = ("part of weightlift", "statements", "branches", "statements reached, %", "branches taken, %")
    wanted, made = targets(result), Part()
    made.add(sentence(result))
    made.add(targets_table(wanted), wanted)
    made.add(table(headings, lines))
    return made


def _percents(reached: Mapping[str, Any]) -> tuple[str, str]:
    return f"{reached['statements_percent']:.1f}", f"{reached['branches_percent']:.1f}"


def sentence(result: Result) -> str:
    """The totals, and on what they were taken."""
    tests, overall = result["tests"], result["overall"]
    return (
        f"{tests['passed']:,} tests, run on {result['date']} with CPython {result['python']} ({tests['skipped']:,} "
        f"more were skipped), take {overall['branches_percent']:.1f} % of {overall['branches']:,} branches and "
        f"{overall['statements_percent']:.1f} % of {overall['statements']:,} statements."
    )


def paragraph(result: Result) -> str:
    """For the page on reliability: totals, what is complete, and what is reached least."""
    packages, wanted = result["packages"], result["wanted"]
    complete = [f"`{name}`" for name in wanted["complete"] if is_complete(packages[name])]
    least = wanted["overall_branches_percent"]
    below = sorted(
        (reached["branches_percent"], name) for name, reached in packages.items() if reached["branches_percent"] < least
    )
    words = [sentence(result)]
    words.append(f"Reached completely, as is asked of them: {', '.join(complete) or 'none'}.")
    if below:
        shown = ", ".join(f"`{name}` ({percent:.1f} %)" for percent, name in below)
        words.append(f"Under {least:.0f} % of their branches: {shown}.")
    return "\n".join(words)


BLOCKS: Final[Mapping[str, tuple[str, Callable[[Result], str]]]] = {"coverage": ("coverage", paragraph)}
"""Every block of the page on reliability, with the results file that it shows."""
