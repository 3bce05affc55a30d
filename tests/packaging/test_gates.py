"""The project's own gates find what they are for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType


@pytest.fixture(scope="module")
def check_lengths(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("check_lengths")


@pytest.fixture(scope="module")
def check_engine(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("check_engine")


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


class TestSanitizers:
    @pytest.fixture
    def compiler(self, check_engine: ModuleType) -> list[str]:
        found: list[str] | None = check_engine.find_compiler()
        return found if found is not None else pytest.skip("there is no C compiler")

    @pytest.fixture(params=["address", "thread"])
    def sanitizer(self, check_engine: ModuleType, request: pytest.FixtureRequest) -> Any:
        return next(known for known in check_engine.SANITIZERS if known.name == request.param)

    @pytest.fixture
    def runtime(self, check_engine: ModuleType, compiler: list[str], sanitizer: Any) -> Path:
        found: Path | None = check_engine.find_runtime(compiler, sanitizer)
        return found if found is not None else pytest.skip(f"{compiler[0]} has no lib{sanitizer.runtime} here")

    def test_they_find_planted_mistakes(
        self, check_engine: ModuleType, compiler: list[str], runtime: Path, sanitizer: Any
    ) -> None:
        assert check_engine.finds_mistakes(compiler, runtime, sanitizer)

    def test_one_that_finds_nothing_is_noticed(
        self,
        check_engine: ModuleType,
        compiler: list[str],
        runtime: Path,
        sanitizer: Any,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        without = dataclasses.replace(sanitizer, flags=())
        assert not check_engine.finds_mistakes(compiler, runtime, without)
        assert "did not find a planted mistake" in capfd.readouterr().out

    def test_an_engine_that_does_not_load_is_not_taken_for_a_clean_one(
        self,
        check_engine: ModuleType,
        runtime: Path,
        sanitizer: Any,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        assert not check_engine.run_tests(tmp_path / "engine.so", runtime, sanitizer, ["tests"])
        assert "engine.so is not there" in capfd.readouterr().err
