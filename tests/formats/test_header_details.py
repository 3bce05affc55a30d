"""What is said about headers of odd form, to the last word and byte, with the compiled library and without."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.engines.native import library_path
from weightlift.errors import FormatError, HeaderError
from weightlift.formats import compiled, header_text
from weightlift.formats.header_scanner import first_repeat, scan
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


@pytest.mark.parametrize(
    ("tensor", "message", "byte"),
    [
        ('["U8" [3],[0,3]]', "the header is not JSON: expected ',' before shape of tensor 'a'", 11),
        ('["U8",[3] [0,3]]', "the header is not JSON: expected ',' before data_offsets of tensor 'a'", 15),
        ('["U8",[3],[0,3],1]', "the header is not JSON: expected ']' after the three values of tensor 'a'", 20),
        ('["U8",[3 4],[0,3]]', "the header is not JSON: expected ']' after the shape of tensor 'a'", 14),
        ('["U8",[3],[0 3]]', "the header is not JSON: expected ',' between the two data_offsets of tensor 'a'", 18),
        ('["U8",[3],[0,3,4]]', "the header is not JSON: expected ']' after the two data_offsets of tensor 'a'", 19),
        ('["U8",[3],0]', "data_offsets of tensor 'a' is not a list of whole numbers", 15),
        ('["U8",3,[0,3]]', "shape of tensor 'a' is not a list of whole numbers", 11),
        ('["U8",[3,],[0,3]]', "shape of tensor 'a' holds something else than whole numbers from 0", 14),
        ('[{"U8":1},[3],[0,3]]', "dtype of tensor 'a' is not a text", 6),
        ('[{"U8" null},[3],[0,3]]', "the header is not JSON: expected ':' in dtype of tensor 'a'", 12),
        ('[{"U8":null,"F4":null},[3],[0,3]]', "the header is not JSON: expected '}' after dtype of tensor 'a'", 16),
        ("[1,[3],[0,3]]", "expected dtype of tensor 'a', a string", 6),
        ("[{1:null},[3],[0,3]]", "expected dtype of tensor 'a', a string", 7),
        ("1", "tensor 'a' is not an object with dtype, shape and data_offsets", 5),
    ],
)
@pytest.mark.usefixtures("no_library")
def test_what_is_wrong_with_a_tensor_is_said_with_its_place(tensor: str, message: str, byte: int) -> None:
    header = f'{{"a":{tensor}}}'.encode()
    with pytest.raises(HeaderError) as caught:
        scan(header, path="file", rules=HeaderRules.REFERENCE)
    assert caught.value.message == f"file: {message} (byte {byte} of the header: '{header[byte : byte + 24].decode()}')"


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


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """The module of tokens as a new interpreter has it: its patterns are made when it is imported."""
    return runpy.run_path(header_text.__file__, run_name=header_text.__name__)


@pytest.mark.parametrize(
    ("value", "is_plain"),
    [
        ('"x"', True),
        (r'"\n\u0041"', True),
        (r'"\ud83d"', False),
        ("-1.5e+3", True),
        ("1e300", False),
        ("01", False),
        ("true", True),
        ("[ ]", True),
        ("{}", True),
        ("[1 , [ null,false ],{}]", True),
        ('{ "a" : 1 , "b":[{"c" : 2}] }', False),
        ('{ "a" : 1 , "b":[true,2],"c" : {"d":"e"} }', True),
        ("[[[1]]]", False),
        ("[1,]", False),
        ('{"a":1,}', False),
        ('{"a"}', False),
        ("[", False),
    ],
)
def test_values_that_are_passed_over_at_once(fresh: dict[str, Any], value: str, is_plain: bool) -> None:
    unknown = fresh["pattern"](fresh["UNKNOWN"])
    assert (unknown.fullmatch(f'"x" :\n{value}'.encode()) is not None) is is_plain
    assert unknown.fullmatch(f'"dtype":{value}'.encode()) is None


def test_the_first_of_repeated_names() -> None:
    assert first_repeat({}.keys(), ["a", "b", "c", "b", "a"]) == "b"
    assert first_repeat({"c": 1, "d": 1}.keys(), ["a", "b", "d", "c"]) == "d"
    assert first_repeat({"c": 1}.keys(), ["a", "b"]) is None
    assert first_repeat({"c": 1}.keys(), []) is None


def zeros(count: int) -> str:
    return f'{{"dtype":"U8","shape":{[1] * count},"data_offsets":[0,1]}}'


@pytest.mark.parametrize(
    ("rank", "shown"),
    [
        (1, "[1, 2]"),
        (10, f"[{'1, ' * 10}2]"),
        (11, f"[{'1, ' * 11}2]"),
        (12, f"[{'1, ' * 11}1, … 13 dimensions]"),
        (1300, f"[{'1, ' * 11}1, … 1,301 dimensions]"),
    ],
)
def test_a_shape_is_shown_up_to_twelve_dimensions(rank: int, shown: str) -> None:
    """Wherever its tensor stands: there are dimensions of another before it."""
    shape = [1] * rank + [2]
    header = f'{{"a":{zeros(20)},"b":{{"dtype":"U8","shape":{shape},"data_offsets":[1,2]}}}}'.encode()
    with pytest.raises(HeaderError) as caught:
        parse_header(header, path=Path("file"), file_size=len(header) + 10, rules=HeaderRules.REFERENCE)
    assert caught.value.message == (f"file: tensor 'b' is U8 of shape {shown}, 2 bytes, but its data_offsets span 1")


def test_a_shape_that_overflows_before_its_zero_is_refused_though_it_takes_no_byte() -> None:
    header = b'{"a":{"dtype":"U8","shape":[9223372036854775808,2,0],"data_offsets":[0,0]}}'
    with pytest.raises(HeaderError, match="more elements than 64 bits can count"):
        parse_header(header, path=Path("file"), file_size=len(header) + 8)
    header = header.replace(b"[9223372036854775808,2,0]", b"[0,9223372036854775808,2]")
    assert len(parse_header(header, path=Path("file"), file_size=len(header) + 8).columns) == 1


@pytest.mark.parametrize("length", [6, 7, 8, 9, 10])
def test_a_size_that_is_wrong_by_little_is_refused(length: int) -> None:
    """A byte has eight bits: of nine elements of one byte, eight bytes do not pass for seventy-two bits."""
    wanted = length + 1
    header = f'{{"a":{{"dtype":"U8","shape":[{wanted}],"data_offsets":[0,{length}]}}}}'.encode()
    with pytest.raises(HeaderError, match=f"{wanted} bytes, but its data_offsets span {length}\nhint"):
        parse_header(header, path=Path("file"), file_size=len(header) + 8 + length)
