"""What is said about headers of odd form, to the last word and byte, with the compiled library and without."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.engines.native import library_path
from weightlift.errors import FormatError, HeaderError
from weightlift.formats import compiled
from weightlift.formats.header_scanner import scan
from weightlift.formats.safetensors import parse_header
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    from collections.abc import Iterator

HOSTILE = runpy.run_path(str(Path(__file__).with_name("test_hostile_files.py")))
NEXT = "the header is not JSON: expected ',' or "


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)


def with_value(value: str) -> bytes:
    """A header with a value in a field that nobody knows; the value begins at byte 10."""
    return f'{{"a":{{"x":{value},"dtype":"U8","shape":[3],"data_offsets":[0,3]}}}}'.encode()


@pytest.mark.parametrize(
    ("value", "message", "byte"),
    [
        ("[" * 126, "values are nested deeper than 127 levels", 135),
        ('{"a":' * 126, "values are nested deeper than 127 levels", 635),
        ("[" * 125 + '{"a":1}' + "]" * 125, "values are nested deeper than 127 levels", 135),
        ("1e999", "a number is out of range", 10),
        ("[1,1e999]", "a number is out of range", 13),
        ("nul", "the header is not JSON: expected a value", 10),
        ("-", "the header is not JSON: expected a value", 10),
        ("[1,]", "the header is not JSON: expected a value", 13),
        ('{"a":[}}', "the header is not JSON: expected a value", 16),
        ("01", f"{NEXT}'}}' after a value", 11),
        ("[1 2]", f"{NEXT}']' after a value", 13),
        ("[1}", f"{NEXT}']' after a value", 12),
        ("[[1],[2]}", f"{NEXT}']' after a value", 18),
        ("[[[1]],[[2]]},3]", f"{NEXT}']' after a value", 22),
        ('{"a":1 "b":2}', f"{NEXT}'}}' after a value", 17),
        ('{"a":1]', f"{NEXT}'}}' after a value", 16),
        ('[{"a":[1]]', f"{NEXT}'}}' after a value", 19),
        ('{"a" 1}', "the header is not JSON: expected ':' after a name", 15),
        ("{1:2}", "expected a name, a string", 11),
        ('{"a":1,}', "expected a name, a string", 17),
        ('"\1"', "expected a value, a string", 10),
        (r'["\ud800"]', "a value has a lone surrogate escape", 11),
        (r'{"\ud800":1}', "a name has a lone surrogate escape", 11),
    ],
)
@pytest.mark.usefixtures("no_library")
def test_what_is_wrong_with_an_ignored_value_is_said_with_its_place(value: str, message: str, byte: int) -> None:
    header = with_value(value)
    found = header[byte : byte + 24].decode().replace("\\", "\\\\").replace("\1", "\\\\x01")
    with pytest.raises(HeaderError) as caught:
        scan(header, path="file", rules=HeaderRules.REFERENCE)
    assert caught.value.message == f"file: {message} (byte {byte} of the header: '{found}')"


def refused_headers() -> Iterator[tuple[str, bytes, int, HeaderRules]]:
    """Headers that are whole, of the files that other tests have refused."""
    for rules, tables in ((HeaderRules.REFERENCE, ["CASES"]), (HeaderRules.STRICT, ["CASES", "STRICT_CASES"])):
        for case in (case for table in tables for case in HOSTILE[table]):
            length = int.from_bytes(case.content[:8], "little")
            if length <= len(case.content) - 8:
                yield case.name, case.content[8 : 8 + length], len(case.content), rules


def said(header: bytes, file_size: int, rules: HeaderRules) -> tuple[Any, ...]:
    with pytest.raises(FormatError) as caught:
        parse_header(header, path=Path("file"), file_size=file_size, rules=rules)
    error = caught.value
    return type(error), error.message, error.hint, error.path, error.tensor, error.offset, error.length


@pytest.mark.native
def test_the_same_is_said_with_the_library_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    values = compiled.Values(library_path())
    headers = list(refused_headers())
    found = []
    for library in (values, None):
        monkeypatch.setattr(compiled, "library", lambda library=library: library)
        found.append([(name, said(header, size, rules)) for name, header, size, rules in headers])
    assert found[0] == found[1]
    assert len(headers) > 80
