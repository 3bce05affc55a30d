"""The table of mutants that nobody can notice: found by what they change, and of code that is there."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]

MUTATED = '''
class Pool:
    @trampoline
    def take(self, count=1):
        pass

    def xǁPoolǁtake__mutmut_orig(self, count=1):
        """Take some."""
        return self.slots[:count]

    def xǁPoolǁtake__mutmut_1(self, count=2):
        """Take some."""
        return self.slots[:count]

    def xǁPoolǁtake__mutmut_2(self, count=1):
        """Take some."""
        return None

def x__cut__mutmut_orig(start, end):
    if start < end:
        yield start
    yield (
        end
    )

def x__cut__mutmut_1(start, end):
    if start <= end:
        yield start
    yield (
        end
    )
'''


@pytest.fixture(scope="module")
def suites(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("mutation_suites")


def test_what_a_mutant_changes(suites: ModuleType) -> None:
    names = ["m.buffers.xǁPoolǁtake__mutmut_1", "m.buffers.xǁPoolǁtake__mutmut_2", "m.plan.x__cut__mutmut_1"]
    take = "m.buffers.Pool.take"
    assert [*suites.changes(MUTATED, names).values()] == [
        suites.Change(take, "def function(self, count=1):", "def function(self, count=2):"),
        suites.Change(take, "return self.slots[:count]", "return None"),
        suites.Change("m.plan._cut", "if start < end:", "if start <= end:"),
    ]


def test_every_explanation_is_of_code_that_is_there(suites: ModuleType) -> None:
    """One for code that has changed since explains nothing any more."""
    for change, reason in suites.explanations().items():
        assert reason.endswith(".")
        assert change.before != change.after
        lines = function_lines(change.function)
        for line in change.before.splitlines():
            assert line.replace("def function(", f"def {change.function.rpartition('.')[2]}(") in lines, change


def function_lines(name: str) -> list[str]:
    """The lines of a function of the package, in the form in which changes have them."""
    *parts, function = name.split(".")
    for count in (len(parts), len(parts) - 1):
        path = ROOT / "src" / Path(*parts[:count])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                found = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == function]
                return [line.strip() for node in found for line in ast.unparse(node).splitlines()]
    raise AssertionError(f"{name} is not there")
