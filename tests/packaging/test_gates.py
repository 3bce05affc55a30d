"""The project's own gates find what they are for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def check_lengths() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_lengths", TOOLS / "check_lengths.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def found(check_lengths: ModuleType, path: Path, text: str) -> list[tuple[str, int]]:
    path.write_text(text, encoding="utf-8")
    return [(finding.name, finding.lines) for finding in check_lengths.check_file(path)]


@pytest.mark.parametrize(("lines", "findings"), [(400, []), (401, [("module", 401)])])
def test_module_length(check_lengths: ModuleType, tmp_path: Path, lines: int, findings: list[tuple[str, int]]) -> None:
    assert found(check_lengths, tmp_path / "module.py", "value = 1\n" * lines) == findings


@pytest.mark.parametrize(("lines", "findings"), [(60, []), (61, [("work", 61)])])
def test_python_function_length_leaves_the_docstring_out(
    check_lengths: ModuleType, tmp_path: Path, lines: int, findings: list[tuple[str, int]]
) -> None:
    docstring = '    """One.\n\n    Two.\n    """\n'
    text = "class Some:\n  def work():\n" + docstring.replace("    ", "   ") + "   call()\n" * (lines - 1)
    assert found(check_lengths, tmp_path / "module.py", text) == findings


@pytest.mark.parametrize(("lines", "findings"), [(60, []), (61, [("work", 61)])])
def test_c_function_length_ignores_comments_text_and_types(
    check_lengths: ModuleType, tmp_path: Path, lines: int, findings: list[tuple[str, int]]
) -> None:
    before = "#define BRACE(x) { x\n// {\n/* { */\nstruct large {\n" + "    int field;\n" * 70 + "};\n"
    body = '    if (a) { puts("}"); }\n' * (lines - 2)
    text = before + "static int work(int a) {\n" + body + "}\nint small(void) { return '}'; }\n"
    assert found(check_lengths, tmp_path / "engine.c", text) == findings
