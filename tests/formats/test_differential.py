"""Every verdict on a header is the one of the safetensors library, and so is everything read from it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weightlift.dtypes import SAFETENSORS
from weightlift.errors import FormatError
from weightlift.formats import compiled, describe, header_decoder
from weightlift.formats.header_scanner import scan
from weightlift.formats.number_range import exceeds_double
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    from collections.abc import Iterator

safetensors = pytest.importorskip("safetensors", reason="the reference parser is not installed")
pytest.importorskip("numpy", reason="the reference parser opens files with numpy")

EXAMPLES = int(os.environ.get("WEIGHTLIFT_TEST_EXAMPLES", "800"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

Verdict = tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, str]] | None


def reference_verdict(path: Path) -> Verdict:
    """What the library reads: data type, shape and bytes per tensor, and metadata; ``None`` if it refuses."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            shapes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            described = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in shapes.items()}
    except (safetensors.SafetensorError, OSError):
        return None
    data = {name: bytes(view["data"]) for name, view in safetensors.deserialize(path.read_bytes())}
    return {name: (*described[name], data[name]) for name in described}, metadata


def our_verdict(path: Path) -> Verdict:
    """What we read, with the compiled library and without."""
    verdict = verdict_of_one_way(path)
    with mock.patch.object(compiled, "library", return_value=None):
        assert verdict_of_one_way(path) == verdict
    return verdict


def verdict_of_one_way(path: Path) -> Verdict:
    try:
        description = describe(path)
    except FormatError:
        return None
    content = path.read_bytes()
    tensors = {
        tensor.name: (tensor.dtype.name, tensor.shape, content[tensor.offset : tensor.offset + tensor.nbytes])
        for tensor in description
    }
    return tensors, dict(description.shards[0].metadata)


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - only a fast place for a small file
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder) / "odd.safetensors"


def check(file: Path, header: bytes, data_bytes: int, length: int | None = None) -> None:
    size = len(header) if length is None else length
    file.write_bytes(size.to_bytes(8, "little") + header + bytes(n % 251 for n in range(data_bytes)))
    assert our_verdict(file) == reference_verdict(file)


# Pieces of headers

NAMES = ["a", "b", "c", "a.weight", "", "é", "\U0001f600", "dtype", "},", "x-0", "__metadata__"]
ODD_STRINGS = [
    *(r'"\ud800"', r'"\ud83d\ude00"', r'"\ude00\ud83d"', r'"\ud83dx"', r'"\u0000"', r'"\x41"', r'"\u00e"', r'"\/"'),
    '"\t"',
    '"\x7f"',
    '"',
    r'"\"',
    r'"__metadata\u005f_"',
    r'"\u0061"',
]
ODD_NUMBERS = [
    *("-0", "-1", "0", "1", "01", "00", "1.0", "1.", ".5", "1e0", "1E+2", "1e", "1e+", "-", "+1", "0x10", "-0.0"),
    *("1e308", "1e309", "-1e309", "0e999", "0e99999999999", "1e-99999999999", "1e99999999999", "0.1e309", "10e308"),
    *("18446744073709551615", "18446744073709551616", "9223372036854775808", "-9223372036854775809", "4" * 400),
    *("NaN", "Infinity", "-Infinity", "1_0", "\uff11", "1 2"),
]
ODD_VALUES = ["null", "true", "false", "nul", "True", "{}", "[]", "[,]", "[1,]", "{,}", '{"a"}', '{"a":1,}', "", "'a'"]

numbers = st.one_of(st.integers(0, 9).map(str), st.sampled_from(ODD_NUMBERS))
strings = st.one_of(st.sampled_from(NAMES).map(json.dumps), st.sampled_from(ODD_STRINGS))
values = st.recursive(
    st.one_of(numbers, strings, st.sampled_from(ODD_VALUES)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: f"[{','.join(parts)}]"),
        st.lists(st.tuples(strings, inner), max_size=3).map(
            lambda parts: "{" + ",".join(f"{key}:{value}" for key, value in parts) + "}"
        ),
    ),
    max_leaves=6,
)
blanks = st.sampled_from(["", "", "", " ", "\n", "\t\r ", "\x0b", "\xa0", "\x00", "\ufeff"])
rarely = st.integers(0, 11).map(lambda n: n == 0)


def spelled(draw: Any, text: str) -> str:
    """A string as JSON, sometimes with escapes for what needs none."""
    style = draw(st.integers(0, 5))
    if style == 0 and text:
        return f'"\\u{ord(text[0]):04x}{json.dumps(text[1:])[1:]}' if ord(text[0]) < 0x10000 else json.dumps(text)
    return json.dumps(text, ensure_ascii=style == 1)


@st.composite
def tensors(draw: Any, start: int) -> tuple[str, int]:
    """The text of one tensor's description, most often right, and where its data ends."""
    dtype = draw(st.sampled_from([*SAFETENSORS, "F32", "U8", "F6_E2M3", "F4"]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    elements = 1
    for dim in shape:
        elements *= dim
    nbytes = SAFETENSORS[dtype].storage_bytes(elements)
    end = start + (nbytes if nbytes is not None else draw(st.integers(0, 4)))
    dims = [draw(numbers) if draw(rarely) else str(dim) for dim in shape]
    bounds = [draw(numbers) if draw(rarely) else str(bound) for bound in (start, end)]
    if draw(rarely):
        bounds += draw(st.lists(numbers, max_size=1))
    spelled_dtype = spelled(draw, draw(st.sampled_from(["f32", "F16 ", "X"])) if draw(rarely) else dtype)
    if draw(rarely):
        spelled_dtype = draw(st.sampled_from(["{%s:null}", "{%s:{}}", "{%s:[]}", "{%s:null,%s:null}", "[%s]"])).replace(
            "%s", spelled_dtype
        )
    fields = {
        "dtype": spelled_dtype,
        "shape": f"[{','.join(dims)}]",
        "data_offsets": f"[{draw(blanks) if draw(rarely) else ''}{','.join(bounds)}]",
    }
    if draw(rarely):
        fields[draw(st.sampled_from(list(fields)))] = draw(values)
    return written(draw, fields), end


def written(draw: Any, fields: dict[str, str]) -> str:
    if draw(rarely):
        parts = list(fields.values())[: draw(st.integers(2, 3))] + draw(st.lists(values, max_size=1))
        return f"[{','.join(parts)}]"
    members = [(spelled(draw, key) if draw(rarely) else f'"{key}"', value) for key, value in fields.items()]
    if draw(rarely):
        members.append((draw(strings), draw(values)))
    if draw(rarely):
        members.append(draw(st.sampled_from(members)))
    if draw(rarely):
        members.pop(draw(st.integers(0, len(members) - 1)))
    if draw(rarely):
        members = draw(st.permutations(members))
    return "{" + ",".join(f"{key}:{value}" for key, value in members) + "}"


@st.composite
def headers(draw: Any) -> tuple[bytes, int]:
    """A header, most often with one or two oddities, and the number of data bytes to put after it."""
    members: list[tuple[str, str]] = []
    position = 0
    for name in draw(st.lists(st.sampled_from(NAMES[:-1]), max_size=4, unique=not draw(rarely))):
        text, position = draw(tensors(position))
        members.append((spelled(draw, name), text))
    if draw(st.booleans()):
        metadata = draw(
            st.one_of(
                st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NAMES), max_size=2).map(json.dumps),
                st.sampled_from(["null", "{}", "[]", '{"a":1}', '{"a":"b","a":"c"}', '{"a":null}', '[["a","b"]]']),
                values,
            )
        )
        at = draw(st.integers(0, len(members)))
        members.insert(at, (spelled(draw, "__metadata__") if draw(rarely) else '"__metadata__"', metadata))
    if draw(rarely) and members:
        members.append(draw(st.sampled_from(members)))
    if draw(rarely):
        members = draw(st.permutations(members))
    comma = "," if not draw(rarely) else draw(blanks) + "," + draw(blanks)
    text = "{" + comma.join(f"{key}:{value}" for key, value in members) + "}"
    if draw(rarely):
        text = draw(blanks) + text + draw(blanks)
    text += " " * draw(st.integers(0, 8))
    size = position if not draw(rarely) else draw(st.integers(0, position + 2))
    return text.encode("utf-8"), size


VALID = (
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"U8","shape":[3,1],"data_offsets":[8,11]},"c":{"dtype":"I16","shape":[],"data_offsets":[11,13]}}'
)
FRAGMENTS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"-"),
    *(b".0", b"e0", b"0", b" ", b"\n", b"null", b"\x00", b"\x1f"),
    *(b"\xff", b"\xc3\xa9", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\\u0061", b"\\ud800"),
    *(b'"x":1,', b'"dtype":"F32",', b'"__metadata__":{},', b'"__metadata__":null,', b'{"a":"b"}', b"//", b"/**/"),
]


@st.composite
def mutations(draw: Any) -> tuple[bytes, int]:
    """A valid header with a few bytes put in, taken out or repeated."""
    text = VALID
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 3)))
        if draw(rarely):
            stop = draw(st.integers(start, len(text)))
        insert = draw(
            st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=2), st.just(b""), st.just(text[start:stop] * 2))
        )
        text = text[:start] + insert + text[stop:]
    return text, 13


@fuzz
@given(header=headers())
def test_structured_headers(file: Path, header: tuple[bytes, int]) -> None:
    check(file, *header)


@fuzz
@given(header=mutations())
def test_mutated_headers(file: Path, header: tuple[bytes, int]) -> None:
    check(file, *header)


@fuzz
@given(value=values)
@example(value="[" * 125 + "]" * 125)
@example(value="[" * 126 + "]" * 126)
@example(value="[" * 127 + "]" * 127)
@example(value='{"a":' * 125 + "1" + "}" * 125)
@example(value='{"a":' * 126 + "1" + "}" * 126)
@example(value="[" * 124 + '{"a":[1,{"b":2}],"c":3}' + "]" * 124)
@example(value="[" * 123 + '{"a":[1,{"b":2}],"c":3}' + "]" * 123)
@example(value="[[1,[2,[3,[4,5],6],7],[]],{},[[]]]")
@example(value="[[[1]],[[2]]},3]")
@example(value=r'["\ud83d\ude00",[1,"\ud83d"],2]')
@example(value="[1,1e99,1e999,1]")
@example(value="[1.,1]")
@example(value="[1,01]")
@example(value="[-0,-,1]")
def test_values_of_ignored_fields(file: Path, value: str) -> None:
    header = f'{{"a":{{"dtype":"U8","shape":[3],"data_offsets":[0,3],"extra":{value}}}}}'
    check(file, header.encode(), 3)


@fuzz
@given(fields=st.lists(st.tuples(strings, values), min_size=1, max_size=5), at=st.integers(0, 3), comma=blanks)
@example(fields=[(r'"\u0064type"', '"U8"')], at=0, comma="")
@example(fields=[('"dtype"', '"U8"')], at=3, comma="")
@example(fields=[('"dtypes"', "[[1,2],[3]]"), ('"x"', '{"y":[1,{"z":2}]}')], at=1, comma=" ")
def test_ignored_fields_in_all_places(file: Path, fields: list[tuple[str, str]], at: int, comma: str) -> None:
    known = ['"dtype":"U8"', '"shape":[3]', '"data_offsets":[0,3]']
    more = [f"{key}{comma}:{value}" for key, value in fields]
    tensor = f"{comma},".join([*known[:at], *more, *known[at:]])
    # Once as the first tensor and once behind one, where tensors of the usual form are matched at once.
    check(file, f'{{"a":{{{tensor}}}}}'.encode(), 3)
    check(file, f'{{"b":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"a":{{{tensor}}}}}'.encode(), 3)


@fuzz
@given(
    whole=st.one_of(st.integers(0, 10**22), st.integers(17 * 10**17, 18 * 10**18)),
    fraction=st.one_of(st.just(""), st.from_regex(r"\A[0-9]{1,25}\Z")),
    exponent=st.one_of(st.none(), st.integers(-400, 400), st.integers(285, 312), st.sampled_from([2**31 - 1, 2**31])),
)
@example(whole=17976931348623157, fraction="", exponent=292)
@example(whole=17976931348623159, fraction="", exponent=292)
@example(whole=18446744073709551615, fraction="99", exponent=288)
@example(whole=1844674407370955161, fraction="6" * 30, exponent=290)
def test_range_of_ignored_numbers(file: Path, whole: int, fraction: str, exponent: int | None) -> None:
    number = f"{whole}{'.' if fraction else ''}{fraction}{'' if exponent is None else f'e{exponent}'}"
    header = f'{{"a":{{"dtype":"U8","shape":[3],"data_offsets":[0,3],"extra":{number}}}}}'.encode()
    check(file, header, 3)
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    assert exceeds_double(number.encode()) == (reference_verdict(file) is None)


@pytest.mark.parametrize(
    "unit", ["1,", "[],", '"",', '"\\n",', "1e9,", "[" * 100 + "]" * 100 + ",", '{"":[{"":1}]},', '{"a":{"b":{}}},']
)
def test_many_ignored_values(file: Path, unit: str) -> None:
    for last in ("0", "1e999", r'"\ud800"', "x"):
        value = f"[{unit * (200_000 // len(unit))}{last}]"
        check(file, f'{{"a":{{"dtype":"U8","shape":[3],"data_offsets":[0,3],"x":{value}}}}}'.encode(), 3)


@fuzz
@given(content=st.binary(max_size=40), length=st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1)))
def test_arbitrary_files(file: Path, content: bytes, length: int) -> None:
    check(file, content, 0, length)


@pytest.mark.parametrize("block_bytes", [1, 150, header_decoder.BLOCK_BYTES])
@pytest.mark.parametrize("strategy", [headers(), mutations()], ids=["structured", "mutated"])
def test_fast_decoding_agrees_with_exact_scanning(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, strategy: st.SearchStrategy[tuple[bytes, int]]
) -> None:
    """Cut into blocks wherever that is possible, a header reads as it does in one piece."""
    monkeypatch.setattr(header_decoder, "BLOCK_BYTES", block_bytes)

    @settings(fuzz, max_examples=EXAMPLES // 2)
    @given(header=strategy)
    def agrees(header: tuple[bytes, int]) -> None:
        decoded = header_decoder.decode(header[0])
        if decoded is not None:
            assert decoded == scan(header[0], path="x", rules=HeaderRules.REFERENCE)

    agrees()


@pytest.mark.parametrize("block_bytes", [1, 150, header_decoder.BLOCK_BYTES])
def test_ordinary_headers_are_decoded_fast(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(header_decoder, "BLOCK_BYTES", block_bytes)
    spaced = json.dumps(json.loads(VALID)).encode()
    for header in (
        VALID,
        spaced,
        VALID + b"   ",
        b"{}",
        b'{"__metadata__":{"format":"pt"}}',
        spaced.replace(b"[", b"[ "),
    ):
        decoded = header_decoder.decode(header)
        assert decoded is not None
        assert decoded == scan(header, path="x", rules=HeaderRules.REFERENCE)


T = '{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
T0, T1 = T % (0, 1), T % (1, 2)


@pytest.mark.parametrize("block_bytes", [1, header_decoder.BLOCK_BYTES])
@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{T0},}}',
        f'{{"a":{T0},,"b":{T1}}}',
        f'{{"a":{T0} "b":{T1}}}',
        f'{{"a":{T0}}},"b":{T1}}}',
        f'{{"a":{T0},"b":{T1}',
        f'{{"a":{T0},"a":{T0}}}',
        f'{{"a":{T0},"b":{T1},"a":{T0}}}',
        f'{{"a":{T0[:-1]},"dtype":"U8"}}}}',
        f'{{"a":{T0[:-1]},"note":{{}}}},"b":{T1}}}',
        f'{{"a":{T0.replace("[1]", "[-0]")}}}',
        f'{{"a":{T0.replace("[1]", "[1.0]")}}}',
        f'{{"a":["U8",[1],[0,1]],"b":{T1}}}',
        f'{{"a":{T0},"__metadata__":{{}}}}',
        f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{T0}}}',
        f'{{"__metadata__":{T0}}}',
        f'{{"__metadata__":{{"a":"b","a":"c"}},"a":{T0}}}',
        f'{{"__metadata__":null,"a":{T0}}}',
        '{"__metadata__":{},}',
        r'{"\ud800":' + T0 + "}",
    ],
)
def test_odd_headers_are_left_to_the_scanner(
    monkeypatch: pytest.MonkeyPatch, file: Path, block_bytes: int, header: str
) -> None:
    monkeypatch.setattr(header_decoder, "BLOCK_BYTES", block_bytes)
    assert header_decoder.decode(header.encode()) is None
    for data_bytes in (0, 1, 2):
        check(file, header.encode(), data_bytes)


def test_every_verdict_occurs(file: Path) -> None:
    """The generators make headers of both kinds: a fuzz test that only sees refusals shows nothing."""
    verdicts = {True: 0, False: 0}

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(header=headers())
    def count(header: tuple[bytes, int]) -> None:
        file.write_bytes(len(header[0]).to_bytes(8, "little") + header[0] + bytes(header[1]))
        verdicts[reference_verdict(file) is not None] += 1

    with contextlib.suppress(AssertionError):
        count()
    assert min(verdicts.values()) >= 20
