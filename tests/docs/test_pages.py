"""The pages of the documentation: their examples run, their commands exist, their references are what the code says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.cli.main import make_parser
from weightlift.cli.outcome import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = re.compile(r"^<!-- example -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^(?P<indent> *)```(?:sh)?\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _examples(page: Path) -> list[str]:
    """Every marked block, behind as many empty lines as stand before it, so that a failure names the page's line."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, found.start(1)) + found[1] for found in EXAMPLE.finditer(text)]


def _commands(page: Path) -> Iterator[str]:
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        for line in block["text"].splitlines():
            if line.strip().startswith("weightlift "):
                yield line.strip()


WITH_EXAMPLES = [page for page in PAGES if _examples(page)]
COMMANDS = sorted({(_name(page), line) for page in PAGES for line in _commands(page)})


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=_name)
def test_examples_run_one_after_the_other(page: Path, model: Path) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    for source in _examples(page):
        exec(compile(source, _name(page), "exec"), names)  # noqa: S102 - running the pages' examples is the point


def test_every_tutorial_and_every_way_to_do_something_has_an_example() -> None:
    folders = {"tutorials", "how-to"}
    without = [_name(page) for page in PAGES if page.parent.name in folders and page not in WITH_EXAMPLES]
    assert not without


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_python_that_is_not_run_can_be_compiled(page: Path) -> None:
    for found in PYTHON.finditer(page.read_text(encoding="utf-8")):
        compile(found[1], _name(page), "exec")


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_ones_that_the_command_line_takes(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    try:
        make_parser().parse_args(words)
    except UsageError as err:
        pytest.fail(f"{page} shows `{line}`: {err}")


@pytest.fixture(scope="module")
def reference_docs(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("reference_docs")


@pytest.mark.parametrize("name", ["command-line.md", "environment.md", "errors.md"])
def test_reference_pages_are_what_the_code_says(
    reference_docs: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("WEIGHTLIFT_METHOD", "mmap")  # what somebody has set here is no default
    assert sorted(reference_docs.pages()) == ["command-line.md", "environment.md", "errors.md"]
    page = reference_docs.FOLDER / name
    assert page.read_text(encoding="utf-8") == reference_docs.pages()[name], "run tools/reference_docs.py"
