"""Gate: modules stay within 400 lines and functions within 60.

A function counts from its ``def`` line (or the line of its name in C) to its last line, without its docstring, so
that nobody saves on explaining. Functions of the C engine count too; the file itself is meant to be one file.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULE_LINES_MAX: Final = 400
FUNCTION_LINES_MAX: Final = 60
FOLDERS: Final = ("src", "tests", "tools", "benchmarks")

C_NOISE: Final = re.compile(
    r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|^#(?:\\\n|[^\n])*", re.DOTALL | re.MULTILINE
)
C_FUNCTION_HEAD: Final = re.compile(r"([A-Za-z_]\w*)\s*\([^;{}]*\)\s*\Z", re.DOTALL)


class Finding(NamedTuple):
    """One thing that is too long.

    Attributes:
        path: the file.
        line: where it begins.
        name: the function, or ``"module"``.
        lines: how long it is.
        lines_max: how long it may be.
    """

    path: Path
    line: int
    name: str
    lines: int
    lines_max: int


def python_functions(source: str) -> Iterator[tuple[int, str, int]]:
    """Line, name and length of every function in Python source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            yield node.lineno, node.name, lines


def c_functions(source: str) -> Iterator[tuple[int, str, int]]:
    """Line, name and length of every function in C source, found by its outermost braces."""
    text = C_NOISE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)
    depth = 0
    head_start = 0
    head: re.Match[str] | None = None
    for brace in re.finditer(r"[{};]", text):
        if brace[0] == "{":
            if depth == 0:
                head = C_FUNCTION_HEAD.search(text, head_start, brace.start())
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0 and head is not None:
                first = text.count("\n", 0, head.start()) + 1
                yield first, head[1], text.count("\n", 0, brace.start()) + 2 - first
        if depth == 0:
            head_start = brace.end()


def check_file(path: Path) -> Iterator[Finding]:
    """Everything in one file that is too long."""
    source = path.read_text(encoding="utf-8")
    lines = source.count("\n")
    if path.suffix == ".py" and lines > MODULE_LINES_MAX:
        yield Finding(path, 1, "module", lines, MODULE_LINES_MAX)
    functions = python_functions(source) if path.suffix == ".py" else c_functions(source)
    for line, name, length in functions:
        if length > FUNCTION_LINES_MAX:
            yield Finding(path, line, name, length, FUNCTION_LINES_MAX)


def source_files(root: Path) -> list[Path]:
    """The project's Python files, and the C files of the package."""
    files = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    return sorted([*files, *(root / "src").rglob("*.c")])


def main() -> int:
    """Print what is too long; 1 if anything is."""
    root = Path(__file__).resolve().parent.parent
    files = source_files(root)
    findings = [finding for path in files for finding in check_file(path)]
    for path, line, name, lines, lines_max in findings:
        print(f"{path.relative_to(root)}:{line}: {name} has {lines} lines, at most {lines_max} are allowed")
    print(f"lengths: {len(files)} files, {len(findings)} too long")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
