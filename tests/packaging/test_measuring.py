"""What the measurement of coverage takes for reached, for short, and for unchanged."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType


@pytest.fixture(scope="module")
def measure(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("measure_coverage")


def report(**files: tuple[int, int, int, int]) -> dict[str, Any]:
    """As coverage writes it: statements, of which reached, branches, of which reached."""
    keys = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    named = {f"src/weightlift/{name.replace('__', '/')}.py": numbers for name, numbers in files.items()}
    return {"files": {name: {"summary": dict(zip(keys, numbers, strict=True))} for name, numbers in named.items()}}


def test_files_add_up_to_packages(measure: ModuleType) -> None:
    files = measure.reached_by_file(report(plan=(10, 9, 4, 4), cli__a=(5, 5, 2, 1), cli__b=(1, 0, 0, 0)))
    packages = measure.by_package(files)
    assert packages == {"cli": (6, 5, 2, 1), "plan.py": (10, 9, 4, 4)}
    assert packages["cli"].shown()["branches_percent"] == 50.0
    assert measure.Reached().shown()["branches_percent"] == 100.0


def test_what_falls_short_is_said(measure: ModuleType) -> None:
    def short(**files: tuple[int, int, int, int]) -> list[str]:
        return list(measure.shortfalls(measure.reached_by_file(report(**files))))

    assert short(plan=(10, 10, 4, 4), other=(9, 0, 96, 86)) == []
    assert short(plan=(10, 10, 4, 4), other=(9, 0, 96, 85)) == [
        "89.0 % of all branches are reached, and 90.0 % are wanted"
    ]
    assert short(plan=(10, 9, 40, 40), formats__gguf=(1, 1, 4, 3), other=(9, 0, 0, 0)) == [
        "plan.py: 1 statements and 0 branches are not reached, and all are wanted",
        "formats/gguf.py: 0 statements and 1 branches are not reached, and all are wanted",
    ]


def test_a_part_is_run_again_after_any_change_that_it_can_see(measure: ModuleType, tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    for name in ("src/weightlift/plan.py", "tests/conftest.py", "tests/one/test_a.py", "tests/two/deep/test_b.py"):
        write(name, "")
    for name in ("tests/test_c.py", "tests/fuzz/run.py", "docs/page.md"):
        write(name, "")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    parts = measure.parts_of_the_tests(tmp_path / "tests")
    assert [part.name for part in parts] == ["one", "test_c.py", "two"]

    def seen() -> list[str]:
        return [measure.fingerprint(tmp_path, part) for part in parts]

    first = seen()
    assert len(set(first)) == 3
    write("tests/two/deep/test_b.py", "changed")
    write("docs/page.md", "changed")
    second = seen()
    assert [before == after for before, after in zip(first, second, strict=True)] == [True, True, False]
    write("tests/two/deep/added.py", "")
    assert seen()[2] != second[2]
    write("src/weightlift/plan.py", "changed")
    assert not set(seen()) & set(first + second)
