"""What is written about the coverage of the tests is what its record says."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


def reached(statements: int, statements_reached: int, branches: int, branches_reached: int) -> dict[str, Any]:
    return {
        "statements": statements,
        "statements_reached": statements_reached,
        "branches": branches,
        "branches_reached": branches_reached,
        "statements_percent": round(100 * statements_reached / statements, 2),
        "branches_percent": round(100 * branches_reached / branches, 2),
    }


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "date": "2026-01-02",
        "python": "3.11.7",
        "wanted": {"overall_branches_percent": 90.0, "complete": ["formats", "plan.py"]},
        "tests": {"passed": 4321, "skipped": 12},
        "overall": reached(1000, 950, 400, 352),
        "packages": {
            "cli": reached(400, 350, 100, 52),
            "formats": reached(500, 500, 200, 200),
            "plan.py": reached(100, 100, 100, 99),
        },
    }


@pytest.fixture
def tables(scripts: Path) -> ModuleType:
    return importlib.import_module("coverage_table")


def test_the_paragraph_names_what_is_complete_and_what_falls_short(tables: ModuleType, record: dict[str, Any]) -> None:
    totals, *lines = tables.paragraph(record).splitlines()
    assert totals == (
        "4,321 tests, run on 2026-01-02 with CPython 3.11.7 (12 more were skipped), take 88.0 % of 400 branches and "
        "95.0 % of 1,000 statements."
    )
    assert lines == [
        "Reached completely, as is asked of them: `formats`.",
        "Under 90 % of their branches: `cli` (52.0 %).",
    ]


def test_targets_that_were_missed_are_called_so(tables: ModuleType, record: dict[str, Any]) -> None:
    part = tables.part(record)
    assert [target.reached for target in part.targets] == [False, True, False]
    assert [target.value for target in part.targets] == ["88.0 %", "100.0 %, 100.0 %", "100.0 %, 99.0 %"]
    assert "| `cli` | 400 | 100 | 87.5 | 52.0 |" in part.text[2]
    record["overall"] = reached(1000, 950, 400, 360)
    assert tables.part(record).targets[0].reached
