"""The work of reading a header of odd form grows no faster than the header, and Python does next to none of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.engines.native import library_path
from weightlift.errors import HeaderError
from weightlift.formats import compiled
from weightlift.formats.header_scanner import scan
from weightlift.formats.safetensors import parse_header
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    from collections.abc import Callable

FEW, MANY = 8_000, 80_000
STEPS_BESIDE = 2_000


def tensors(form: str) -> Callable[[int], bytes]:
    def header(count: int) -> bytes:
        return ("{" + ",".join(form.replace("#", str(number)) for number in range(count)) + "}").encode()

    return header


def metadata(form: str) -> Callable[[int], bytes]:
    def header(count: int) -> bytes:
        members = ",".join(form.replace("#", str(number)) for number in range(count))
        return ('{"__metadata__":{' + members + "}}").encode()

    return header


TENSORS = {
    "lists": '"#":["U8",[0],[0,0]]',
    "lists of one name": '"a":["U8",[0],[0,0]]',
    "ordinary of one name": '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',
    "types in objects": '"#":[{"U8":null},[0],[0,0]]',
    "blanks": ' "#" : [ { "U8" : null } , [ 0 , 3 ] , [ 0 , 0 ] ] ',
    "another order": r'"#":{"shape":[0],"data_offsets":[0,0],"dtyp\u0065":"U8"}',
    "escapes": r'"\u0061#\n":{"\u0064type":"\u0055\u0038","sh\u0061pe":[0],"data_offsets":[0,0]}',
    "fields unknown": '"#":{"x":[{"y":[1,2]}],"dtype":"U8","z":{},"shape":[0],"data_offsets":[0,0],"w":null}',
    "many dimensions": '"#":["F4",[0,1,2,3,4,5,6,7,8,9,10,11],[0,0]]',
}
METADATA = {
    "one name": '"a":""',
    "names": '"#":"x"',
    "escapes": r'"\ud83d\ude00#":"\n"',
}
HEADERS = {name: tensors(form) for name, form in TENSORS.items()}
HEADERS |= {f"metadata: {name}": metadata(form) for name, form in METADATA.items()}


def steps(call: Callable[[], Any]) -> int:
    """How many functions are called, Python's own and those written in C."""
    seen = 0

    def count(_frame: object, event: str, _: object) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def read(header: bytes, rules: HeaderRules = HeaderRules.REFERENCE) -> Any:
    return parse_header(header, path=Path("x"), file_size=8 + len(header), rules=rules)


@pytest.mark.native
@pytest.mark.parametrize("make", HEADERS.values(), ids=HEADERS.keys())
def test_the_library_leaves_nothing_to_do_for_each_tensor(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[int], bytes]
) -> None:
    values = compiled.Values(library_path())
    monkeypatch.setattr(compiled, "library", lambda: values)
    read(make(1))
    few, many = make(FEW), make(MANY)
    assert steps(lambda: read(many)) < steps(lambda: read(few)) + STEPS_BESIDE


@pytest.mark.parametrize("make", HEADERS.values(), ids=HEADERS.keys())
def test_without_the_library_work_grows_with_the_header(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[int], bytes]
) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)
    read(make(1))
    few, many = make(200), make(2000)
    assert steps(lambda: read(many)) < 10.5 * steps(lambda: read(few)) + STEPS_BESIDE


@pytest.mark.parametrize("name", ["lists", "types in objects", "blanks", "ordinary of one name"])
def test_without_the_library_usual_forms_take_less_work_than_others(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)
    usual, other = HEADERS[name](300), HEADERS["another order"](300)
    rules = HeaderRules.REFERENCE
    scan(usual, path="x", rules=rules)
    assert 2 * steps(lambda: scan(usual, path="x", rules=rules)) < steps(lambda: scan(other, path="x", rules=rules))


@pytest.mark.parametrize("form", METADATA.values(), ids=METADATA.keys())
def test_without_the_library_texts_take_less_than_a_step_each(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)
    header = metadata(form)(20_000)
    scan(header, path="x", rules=HeaderRules.REFERENCE)
    assert steps(lambda: scan(header, path="x", rules=HeaderRules.REFERENCE)) < 20_000


def test_without_the_library_unknown_fields_take_less_than_a_step_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)
    fields = '"x":1,' * 20_000
    header = (r'{"a":{%s"shape":[0],"data_offsets":[0,0],"dtyp\u0065":"U8"}}' % fields).encode()  # noqa: UP031
    scan(header, path="x", rules=HeaderRules.REFERENCE)
    assert steps(lambda: scan(header, path="x", rules=HeaderRules.REFERENCE)) < 20_000


@pytest.mark.native
def test_with_the_library_tensors_take_less_than_a_step_each(monkeypatch: pytest.MonkeyPatch) -> None:
    values = compiled.Values(library_path())
    monkeypatch.setattr(compiled, "library", lambda: values)
    header = HEADERS["lists"](20_000)
    scan(header, path="x", rules=HeaderRules.REFERENCE)
    assert steps(lambda: scan(header, path="x", rules=HeaderRules.REFERENCE)) < 20_000


@pytest.mark.native
@pytest.mark.parametrize("make", HEADERS.values(), ids=HEADERS.keys())
def test_an_error_at_the_end_is_found_as_quickly(monkeypatch: pytest.MonkeyPatch, make: Callable[[int], bytes]) -> None:
    values = compiled.Values(library_path())
    monkeypatch.setattr(compiled, "library", lambda: values)

    def refuse(header: bytes) -> None:
        with pytest.raises(HeaderError, match="end of the header"):
            read(header)

    few, many = make(FEW)[:-1], make(MANY)[:-1]
    refuse(make(1)[:-1])
    assert steps(lambda: refuse(many)) < steps(lambda: refuse(few)) + STEPS_BESIDE


@pytest.mark.parametrize("form", ['"a":""', r'"\u0061":""'])
def test_repeated_metadata_is_named_by_strict_rules(form: str) -> None:
    with pytest.raises(HeaderError, match="__metadata__ has 'a' twice"):
        read(metadata('"#":"",' + form)(5000), HeaderRules.STRICT)


def test_a_repeated_tensor_is_named_by_strict_rules() -> None:
    ordinary = '"#":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = tensors(ordinary)(6000)[:-1] + b"," + tensors(ordinary.replace("#", "2500"))(1)[1:]
    with pytest.raises(HeaderError, match="two tensors are called '2500'") as caught:
        read(header[:-1] + b"," + tensors(ordinary)(1)[1:], HeaderRules.STRICT)
    assert caught.value.tensor == "2500"
    assert len(read(header).columns) == 6000


@pytest.mark.parametrize("tensor", ['{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', '["U8",[0],[0,0]]'])
@pytest.mark.parametrize("has_library", [pytest.param(True, marks=pytest.mark.native), False])
def test_metadata_in_the_form_of_a_tensor_are_refused(
    monkeypatch: pytest.MonkeyPatch, has_library: bool, tensor: str
) -> None:
    library = compiled.Values(library_path()) if has_library else None
    monkeypatch.setattr(compiled, "library", lambda: library)
    header = tensors(f'"a":{tensor},"__metadata__":{tensor},"b":{tensor}')(1)
    with pytest.raises(HeaderError, match=r"__metadata__ (is not an object of texts|entry 'shape', a string)"):
        read(header)


@pytest.mark.native
@pytest.mark.parametrize("strict", [False, True])
def test_tensors_are_read_alike_with_and_without_the_library(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    rows = range(600)
    header = json.dumps({f"t{n}": {"dtype": "U8", "shape": [1] * n, "data_offsets": [n, n + 1]} for n in rows}).encode()
    rules = HeaderRules.STRICT if strict else HeaderRules.REFERENCE
    results = []
    for library in (compiled.Values(library_path()), None):
        monkeypatch.setattr(compiled, "library", lambda library=library: library)
        results.append(scan(header, path="x", rules=rules))
    assert results[0] == results[1]
    columns, _ = results[0]
    assert [len(columns), sum(columns.ranks), list(columns.begins)] == [600, 600 * 599 // 2, list(rows)]


@pytest.mark.native
@pytest.mark.parametrize(
    ("form", "message"),
    [
        ('["U8",[3],[0,0]]', "3 bytes, but its data_offsets span 0"),
        ('["U8",[9223372036854775808,2,0],[0,0]]', "more elements than 64 bits"),
        ('["F64",[4611686018427387904],[0,0]]', "more bits than"),
        ('["F4",[1],[0,0]]', "4 bits, which do not fill whole bytes"),
        ('["U8",[0],[1,0]]', "before its beginning"),
    ],
)
def test_the_one_tensor_with_a_wrong_size_is_named(monkeypatch: pytest.MonkeyPatch, form: str, message: str) -> None:
    good = '"#":["U8",[0,7],[0,0]]'
    header = tensors(good)(3000)[:-1] + b',"odd":' + form.encode() + b"," + tensors(good.replace("#", "x#"))(3000)[1:]
    for library in (compiled.Values(library_path()), None):
        monkeypatch.setattr(compiled, "library", lambda library=library: library)
        with pytest.raises(HeaderError, match=message) as caught:
            read(header)
        assert caught.value.tensor == "odd"
