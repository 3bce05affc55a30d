"""One file per rule: each is refused by the right error, and the message says what is wrong."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from weightlift.errors import (
    FormatError,
    HeaderError,
    NotACheckpointError,
    TruncatedFileError,
    UnsupportedDtypeError,
    WeightliftError,
    printable,
)
from weightlift.formats import describe
from weightlift.formats.safetensors import HEADER_BYTES_MAX, parse_header
from weightlift.types import HeaderRules


def tensor(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def packed(header: str | bytes | dict[str, Any], data: int = 4, length: int | None = None) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data)


@dataclass(frozen=True)
class Case:
    name: str
    content: bytes
    error: type[WeightliftError]
    words: tuple[str, ...]
    tensor: str | None = None


GOOD = packed({"a": tensor()})
A = '{"a":%s}'
CASES = (
    # Other kinds of files
    Case("empty", b"", NotACheckpointError, ("is empty",)),
    Case(
        "lfs pointer", b"version https://git-lfs.github.com/spec/v1\nsize 5\n", NotACheckpointError, ("git lfs pull",)
    ),
    Case("web page", b"\n<!DOCTYPE html><html><body>Sign in", NotACheckpointError, ("web page", "log-in")),
    Case("empty zip", b"PK\x05\x06" + bytes(64), NotACheckpointError, ("empty zip archive",)),
    Case("pickle", b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.", NotACheckpointError, ("pickle", "run code")),
    Case(
        "legacy PyTorch",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        NotACheckpointError,
        ("before 2020", "weights_only"),
    ),
    Case("tar", b"sys_info".ljust(257, b"\0") + b"ustar" + bytes(300), NotACheckpointError, ("tar archive", "2016")),
    Case("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(64), NotACheckpointError, ("HDF5",)),
    Case("gzip", b"\x1f\x8b\x08" + b"\xff" * 64, NotACheckpointError, ("compressed",)),
    Case("json", b'{"architectures": ["X"]}', NotACheckpointError, ("JSON",)),
    Case("zeros", bytes(4096), NotACheckpointError, ("zeros", "resume")),
    # Length of the header
    Case("seven bytes", b"\x02\0\0\0\0\0\0", TruncatedFileError, ("7 bytes", "begins with 8")),
    Case("header cut", packed("{}", 0, 81_216), TruncatedFileError, ("81,216", "has 10", "incomplete")),
    Case("header at the cap", packed("{}", 0, HEADER_BYTES_MAX), TruncatedFileError, ("100,000,000", "has 10")),
    Case("header above the cap", packed("{}", 0, HEADER_BYTES_MAX + 1), HeaderError, ("100,000,001", "limit")),
    Case("header length 2^64-1", packed("{}", 0, 2**64 - 1), HeaderError, ("18,446,744,073,709,551,615",)),
    Case("header length 0", bytes(8) + b"{}" * 300, HeaderError, ("length of 0",)),
    # Text of the header
    Case("not utf-8", packed(b'{"\xff":1}'), HeaderError, ("UTF-8", "byte 2")),
    Case("not json", packed("not JSON at all"), HeaderError, ("not a JSON object", "'not JSON")),
    Case("list", packed("[]", 0), HeaderError, ("not a JSON object",)),
    Case("cut json", packed('{"a":{"dtype":"U8"'), HeaderError, ("end of the header",)),
    Case("text after", packed("{} {}", 0), HeaderError, ("more text", "byte 3")),
    Case("zero padding", packed("{}\0\0", 0), HeaderError, ("more text", r"\\x00")),
    Case("byte order mark", packed("\ufeff{}", 0), HeaderError, ("not a JSON object",)),
    Case("control character", packed('{"a\n":1}', 0), HeaderError, ("a string",)),
    Case("trailing comma", packed(A[:-1] % json.dumps(tensor()) + ",}"), HeaderError, ("expected a name",)),
    Case("nested", packed(A % ('{"x":' + "[" * 500 + "]" * 500 + "}")), HeaderError, ("127 levels",)),
    Case("lone surrogate", packed(r'{"\ud800":1}'), HeaderError, ("surrogate",)),
    # Metadata
    Case("metadata number", packed('{"__metadata__":{"a":1}}', 0), HeaderError, ("__metadata__ entry 'a'", "string")),
    Case("metadata list", packed('{"__metadata__":[]}', 0), HeaderError, ("__metadata__ is not an object",)),
    Case("metadata twice", packed('{"__metadata__":{},"__metadata__":{}}', 0), HeaderError, ("given twice",)),
    # Fields of a tensor
    Case("tensor null", packed('{"a":null}'), HeaderError, ("'a' is not an object",), "a"),
    Case("no dtype", packed('{"a":{"shape":[],"data_offsets":[0,4]}}'), HeaderError, ("has no dtype",), "a"),
    Case("no fields", packed('{"a":{}}'), HeaderError, ("no dtype and no shape and no data_offsets",), "a"),
    Case("field twice", packed('{"a":{"dtype":"U8","dtype":"U8"}}'), HeaderError, ("dtype twice",), "a"),
    Case("unknown dtype", packed({"a": tensor("F7")}), UnsupportedDtypeError, ("'F7'", "BF16"), "a"),
    Case("dtype number", packed('{"a":{"dtype":1}}'), HeaderError, ("dtype of tensor 'a', a string",)),
    Case("shape text", packed({"a": tensor(shape="4")}), HeaderError, ("shape", "not a list"), "a"),
    Case("negative dimension", packed({"a": tensor(shape=[-4])}), HeaderError, ("whole numbers", "-4"), "a"),
    Case("minus zero", packed('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', 0), HeaderError, ("-0",), "a"),
    Case("boolean dimension", packed({"a": tensor(shape=[True])}), HeaderError, ("whole numbers", "true"), "a"),
    Case("float dimension", packed({"a": tensor(shape=[4.0])}), HeaderError, ("whole numbers", "4.0"), "a"),
    Case("dimension 2^64", packed({"a": tensor(shape=[2**64])}), HeaderError, ("above 64 bits",), "a"),
    Case("offset 2^64", packed({"a": tensor(offsets=[0, 2**64])}), HeaderError, ("above 64 bits",), "a"),
    Case("boolean offset", packed({"a": tensor(offsets=[False, 4])}), HeaderError, ("data_offsets", "false"), "a"),
    Case("one offset", packed({"a": tensor(offsets=[0])}), HeaderError, ("between the two data_offsets",)),
    Case("three offsets", packed({"a": tensor(offsets=[0, 4, 4])}), HeaderError, ("after the two data_offsets",)),
    # Sizes and positions
    Case(
        "shape too large", packed({"a": tensor(shape=[5])}), HeaderError, ("U8 of shape [5]", "5 bytes", "span 4"), "a"
    ),
    Case("overflow", packed({"a": tensor(shape=[2**32, 2**32])}), HeaderError, ("64 bits can count",), "a"),
    Case("overflow before a zero", packed({"a": tensor(shape=[2**63, 2, 0])}), HeaderError, ("can count",), "a"),
    Case("overflow of bits", packed({"a": tensor("F64", [2**62])}), HeaderError, ("more bits than",), "a"),
    Case("many dimensions", packed({"a": tensor(shape=[2**60] * 5000)}), HeaderError, ("5,000 dimensions",), "a"),
    Case("half a byte", packed({"a": tensor("F4", [3], [0, 2])}, 2), HeaderError, ("12 bits", "whole bytes"), "a"),
    Case("six bits", packed({"a": tensor("F6_E2M3", [3], [0, 3])}, 3), HeaderError, ("18 bits",), "a"),
    Case("ends before it begins", packed({"a": tensor(offsets=[4, 0])}), HeaderError, ("before its beginning",), "a"),
    Case(
        "hole at the start", packed({"a": tensor(offsets=[1, 5])}, 5), HeaderError, ("begins at byte 1", "1 bytes"), "a"
    ),
    Case(
        "hole", packed({"a": tensor(), "b": tensor(offsets=[6, 10])}, 10), HeaderError, ("byte 6", "2 bytes after"), "b"
    ),
    Case(
        "overlap", packed({"a": tensor(), "b": tensor(offsets=[2, 6])}, 6), HeaderError, ("overlaps 'a'", "byte 2"), "b"
    ),
    Case("same range twice", packed({"a": tensor(), "b": tensor()}), HeaderError, ("overlaps 'a'",), "b"),
    Case("data cut", GOOD[:-1], TruncatedFileError, ("'a' is cut off", f"has {len(GOOD) - 1}", "incomplete"), "a"),
    Case(
        "data to the end of numbers",
        packed({"a": tensor("U8", [2**61 - 1], [0, 2**61 - 1])}),
        TruncatedFileError,
        ("cut off",),
        "a",
    ),
    Case("bytes after the last tensor", GOOD + b"xy", HeaderError, ("2 bytes belong to no tensor",)),
    Case("bytes and no tensor", packed("{}", 1), HeaderError, ("1 bytes belong to no tensor",)),
)

STRICT_CASES = (
    Case(
        "duplicate",
        packed(A[:-1] % json.dumps(tensor()) + ',"a":' + json.dumps(tensor()) + "}"),
        HeaderError,
        ("called 'a'",),
        "a",
    ),
    Case("leading blank", packed(" " + json.dumps({"a": tensor()})), HeaderError, ("begin with '{'",)),
    Case("unknown field", packed({"a": tensor(note="x")}), HeaderError, ("field 'note'",), "a"),
    Case("array", packed('{"a":["U8",[4],[0,4]]}'), HeaderError, ("not an object",), "a"),
    Case(
        "dtype object", packed('{"a":{"dtype":{"U8":null},"shape":[4],"data_offsets":[0,4]}}'), HeaderError, ("dtype",)
    ),
    Case("null metadata", packed('{"__metadata__":null}', 0), HeaderError, ("__metadata__",)),
    Case("metadata key twice", packed('{"__metadata__":{"a":"","a":""}}', 0), HeaderError, ("'a' twice",)),
)


def refused(tmp_path: Path, case: Case, rules: HeaderRules) -> WeightliftError:
    path = tmp_path / "model-00002.safetensors"
    path.write_bytes(case.content)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(WeightliftError) as caught:
        describe(path, header=rules)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before, "a descriptor was left open"
    return caught.value


@pytest.mark.parametrize("rules", HeaderRules)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(tmp_path: Path, case: Case, rules: HeaderRules) -> None:
    error = refused(tmp_path, case, rules)
    assert type(error) is case.error
    # Strict rules may find something else to refuse first.
    words = case.words if rules is HeaderRules.REFERENCE else ()
    for word in ("model-00002.safetensors: ", "\nhint: ", *words):
        assert word in str(error)
    assert Path(error.path or "").name == "model-00002.safetensors"
    assert error.tensor == case.tensor or case.tensor is None


@pytest.mark.parametrize("case", STRICT_CASES, ids=lambda case: case.name)
def test_refused_by_strict_rules_only(tmp_path: Path, case: Case) -> None:
    error = refused(tmp_path, case, HeaderRules.STRICT)
    assert type(error) is case.error
    for word in case.words:
        assert word in str(error)
    describe(tmp_path / "model-00002.safetensors")


def test_strict_rules_accept_an_ordinary_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed({"__metadata__": {"q": 'a "quoted" text'}, "a": tensor()}))
    assert describe(path, header=HeaderRules.STRICT).shards[0].metadata == {"q": 'a "quoted" text'}


def test_the_last_of_two_tensors_of_one_name_wins(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    first, last = json.dumps(tensor("I32", [1])), json.dumps(tensor("F32", [1]))
    path.write_bytes(packed(f'{{"a":{first},"a":{last}}}'))
    (only,) = describe(path)
    assert only.dtype.name == "F32"


def test_a_valid_file_that_begins_like_an_archive_is_accepted(tmp_path: Path) -> None:
    """Eight bytes of header length may be the magic of another format; only what cannot be a checkpoint is named."""
    length = int.from_bytes(b"PK\x03\x04\0\0\0\0", "little")
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(packed({"a": tensor()}, 0, length))
        blanks = length - file.tell() + 8
        file.write(b" " * blanks + bytes(4))
    assert describe(path).names == ["a"]


def test_messages_stay_short_and_printable(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    name = "\x1b[31m" + "x" * 100_000 + "\u202e"
    path.write_bytes(packed({name: tensor("Z" * 100_000)}))
    with pytest.raises(FormatError) as caught:
        describe(path)
    message = caught.value.message.removeprefix(str(path))
    assert message.isprintable()
    assert len(message) < 400
    assert caught.value.tensor == name
    assert len(printable("\x00" * 5000)) <= 120


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"U8","shape":[' + b"7," * 600_000 + b'7],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","x":[' + b"[]," * 50_000 + b'[]],"shape":[5],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","x":"' + b"\\n" * 300_000 + b'","shape":[5],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","x":' + b"1" * 500_000 + b',"shape":[5],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 500_000 + b'],"data_offsets":[0,4]}}',
        b'{"__metadata__":{' + b'"a":"",' * 30_000 + b'"a":""},"a":{"dtype":"U8","shape":[5],"data_offsets":[0,4]}}',
        b'{"' + "\U0001f600".encode() * 100_000 + b'":{"dtype":"U8","shape":[5],"data_offsets":[0,4]}}',
    ],
    ids=["dimensions", "nested lists", "escapes", "digits", "long dimension", "metadata", "long name"],
)
def test_refusing_a_hostile_header_takes_memory_in_proportion(header: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError):
            parse_header(header, path=Path("x"), file_size=len(header) + 12)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(header)
