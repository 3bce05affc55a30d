"""Which parts of the package are mutated together, which tests have to notice, and which mutants none can notice.

Owns the suites and the table of explanations beside it, ``mutants_explained.toml``; runs nothing.
"""

from __future__ import annotations

import ast
import difflib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

EXPLAINED: Final = Path(__file__).with_name("mutants_explained.toml")

# What mutmut calls versions of a function: x_name__mutmut_7, or xǁClassǁname__mutmut_7; _orig in place of the number.
_MUTANT: Final = re.compile(r"(?P<module>.*)\.(?P<mangled>x(?:_|ǁ(?P<owner>\w+?)ǁ)(?P<name>\w+))__mutmut_\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A part of the package that is mutated, and the tests meant for it.

    Attributes:
        modules: patterns of files below ``src/weightlift``.
        tests: files of tests.
        left_out: tests in them that call mutated functions so often that counting the calls takes minutes, or that
            count calls themselves: a function that may be mutated is called by way of another.
        sample: how many mutants are tried at most, chosen at random; 0 for all.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    sample: int = 0


SUITES: Final[dict[str, Suite]] = {
    "plan": Suite(modules=("plan.py",), tests=("tests/core/test_plan.py", "tests/core/test_plan_examples.py")),
    "buffers": Suite(
        modules=("buffers.py",), tests=("tests/core/test_buffers.py", "tests/stateful/test_host_memory.py")
    ),
    "safetensors": Suite(
        modules=(
            "formats/safetensors.py",
            "formats/header_decoder.py",
            "formats/header_scanner.py",
            "formats/header_text.py",
            "formats/number_range.py",
            "formats/columns.py",
        ),
        tests=(
            "tests/formats/test_hostile_files.py",
            "tests/formats/test_differential.py",
            "tests/formats/test_values.py",
            "tests/formats/test_description.py",
            "tests/formats/test_columns.py",
            "tests/formats/test_header_details.py",
            "tests/formats/test_header_work.py",
            "tests/formats/test_rules_apart.py",
            "tests/formats/test_refusal_words.py",
        ),
        left_out=(
            "tests/formats/test_differential.py::test_many_ignored_values",
            "tests/formats/test_description.py::test_a_description_of_many_tensors_is_small",
            "tests/formats/test_header_work.py::test_the_library_leaves_nothing_to_do_for_each_tensor",
            "tests/formats/test_header_work.py::test_without_the_library_work_grows_with_the_header",
            "tests/formats/test_header_work.py::test_an_error_at_the_end_is_found_as_quickly",
        ),
        sample=250,
    ),
    "folders": Suite(
        modules=("formats/__init__.py", "formats/files.py", "formats/folder.py", "formats/index_file.py"),
        tests=(
            "tests/formats/test_folders.py",
            "tests/formats/test_folder_details.py",
            "tests/formats/test_what_the_system_refuses.py",
            "tests/formats/test_hostile_files.py",
            "tests/formats/test_description.py",
            "tests/formats/test_refusal_words.py",
        ),
        sample=250,
    ),
    "gguf": Suite(
        modules=("formats/gguf*.py", "formats/header_reader.py"),
        tests=(
            "tests/formats/test_gguf.py",
            "tests/formats/test_gguf_hostile.py",
            "tests/formats/test_gguf_details.py",
            "tests/formats/test_refusal_words.py",
        ),
        sample=250,
    ),
    "pytorch": Suite(
        modules=("formats/pytorch*.py", "formats/pickle_reader.py", "formats/zip_directory.py"),
        tests=(
            "tests/formats/test_pytorch.py",
            "tests/formats/test_pytorch_hostile.py",
            "tests/formats/test_pytorch_details.py",
            "tests/formats/test_zip_directory.py",
            "tests/formats/test_rules_apart.py",
            "tests/formats/test_refusal_words.py",
        ),
        sample=250,
    ),
}


@dataclass(frozen=True, slots=True)
class Change:
    """What a mutant changes: the lines that differ, without indentation, and the function they are in."""

    function: str
    before: str
    after: str


def explanations() -> dict[Change, str]:
    """Why nobody can notice a change, by the change."""
    entries = tomllib.loads(EXPLAINED.read_text(encoding="utf-8")).get("mutant", [])
    return {Change(entry["function"], entry["before"], entry["after"]): entry["reason"] for entry in entries}


def changes(source: str, mutants: Iterable[str]) -> dict[str, Change]:
    """What each of some mutants of one module changes.

    Args:
        source: the module with all of its mutants in it, as mutmut writes it.
        mutants: their names.
    """
    versions = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and "__mutmut_" in node.name:
            # A mutant may change the defaults of arguments too, so all versions get the same name.
            version, node.name = node.name, "function"
            versions[version] = ast.unparse(node).splitlines()
    found = {}
    for mutant in mutants:
        name = _MUTANT.fullmatch(mutant)
        assert name is not None, mutant
        original = versions[f"{name['mangled']}__mutmut_orig"]
        lines = list(difflib.ndiff(original, versions[mutant.rpartition(".")[2]]))
        before, after = ("\n".join(line[2:].strip() for line in lines if line[:2] == mark) for mark in ("- ", "+ "))
        parts = (name["module"], name["owner"], name["name"])
        found[mutant] = Change(".".join(part for part in parts if part), before, after)
    return found
