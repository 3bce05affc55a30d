"""Inputs for each target: the kept corpus, the tests' hostile files per rule, good files, and mutations of them."""

from __future__ import annotations

import io
import json
import random
import runpy
import struct
import zipfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus"
MUTATION_BYTES_MAX: Final = 4096

_T: Final = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
_SHARDS: Final = {"a": "a.safetensors", "b": "b.safetensors"}
_DIGESTS: Final = {"bytes": 4, "sha256": "0" * 64}
_ENTRY: Final = {"file": "m", "dtype": "F32", "shape": [1], "bytes": 4, "xxh3_128": "f" * 32}
_INTEGERS: Final = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    32767,
    65535,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
)
_LARGE: Final = (1 << 40, (1 << 53) + 1, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)
_WORDS: Final = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"-",
        b".",
        b"e",
        b"0",
        b" ",
        b"\n",
        b"\0",
        b"\xff",
        b"\xc3\xa9",
    ),
    *(b"null", b"true", b"1e999", b"-0", b"18446744073709551616", b"..", b"/", b"\\ud800", b"\\u0061", b"__metadata__"),
    *(
        b'"dtype"',
        b'"shape"',
        b'"data_offsets"',
        b'"F4"',
        b"[[[[",
        b"(((",
        b"\x85\x85",
        b"R",
        b"b",
        b"Q",
        b"PK\x05\x06",
    ),
)


@cache
def _tests(name: str) -> dict[str, Any]:
    """What a test module beside this folder defines."""
    return runpy.run_path(str(HERE.parent / "formats" / name))


def _rules(name: str, *tables: str) -> list[bytes]:
    module = _tests(name)
    return [case.content for table in tables for case in module[table]]


def rule_files(target: str) -> list[bytes]:
    """One hostile input for each rule, as the tests of the format have them."""
    if target == "safetensors":
        return _rules("test_hostile_files.py", "CASES")
    if target == "gguf":
        return _rules("test_gguf_hostile.py", "CASES")
    if target == "pytorch":
        return _rules("test_pytorch_hostile.py", "CASES")
    if target == "index":
        return list(_indexes())
    return list(_manifests()) if target == "manifest" else []


def _indexes() -> Iterator[bytes]:
    for text in (
        "",
        "{",
        "[]",
        "{}",
        "\xff",
        '{"weight_map":[]}',
        '{"weight_map":{}}',
        '{"weight_map":{"a":1}}',
        "[" * 9999,
    ):
        yield text.encode("latin-1")
    names = (
        "",
        ".",
        "..",
        "../a.safetensors",
        "/etc/passwd",
        "x/../../a",
        "C:\\a",
        "C:/a",
        "\\\\host\\a",
        "a\0b",
        "no.file",
    )
    for name in (*names, "a.safetensors/b", "a" * 5000, "\x1b[2J", "//a", "./..", "model.safetensors.index.json"):
        yield json.dumps({"weight_map": _SHARDS | {"a": name}}).encode()
    yield json.dumps({"weight_map": {"a": "b.safetensors"}}).encode()


def _manifests() -> Iterator[bytes]:
    good = {"schema": 1, "made_by": "x", "files": {"m": _DIGESTS}, "tensors": {"t": _ENTRY}}
    for text in ("", "{", "[]", "{}", "\xff", "[" * 9999, '{"schema":1}'):
        yield text.encode("latin-1")
    change: dict[str, Any]
    for change in ({"schema": 2}, {"schema": "1"}, {"schema": None}, {"files": []}, {"files": {}}, {"tensors": [1]}):
        yield json.dumps(good | change).encode()
    for name in ("", ".", "..", "../m", "/m", "a/../../m", "C:/m", "a\\b", "a\0b"):
        yield json.dumps(good | {"files": {name: _DIGESTS}, "tensors": {}}).encode()
    for odd in ({"bytes": -1}, {"bytes": 1 << 64}, {"bytes": "4"}, {"sha256": "0" * 63}, {"sha256": "G" * 64}):
        yield json.dumps(good | {"files": {"m": _DIGESTS | odd}}).encode()
    tensor: dict[str, Any]
    for tensor in (
        {"file": "n"},
        {"shape": [-1]},
        {"shape": None},
        {"shape": [True]},
        {"xxh3_128": "f" * 31},
        {"dtype": 1},
    ):
        yield json.dumps(good | {"tensors": {"t": _ENTRY | tensor}}).encode()


def good_files(target: str) -> list[bytes]:
    """Valid inputs, to be spoiled."""
    headers = [_tests("test_differential.py")["VALID"], b"{}", f'{{"a":{_T}}}'.encode()]
    headers += [
        b'{"a":["U8",[4],[0,4]]}',
        b'{"a":{"x":[1,{"y":null}],"dtype":{"U8":null},"shape":[4],"data_offsets":[0,4]}}',
    ]
    headers += [
        b'{"__metadata__":null}',
        b'{"__metadata__":{"a":"b\\u00e9","a":"\\ud83d\\ude00"}}',
        f'{{"a":{_T},"a":{_T}}}'.encode(),
    ]
    sizes = [13, 0, 4, 4, 4, 0, 0, 4]
    if target == "safetensors":
        return [len(text).to_bytes(8, "little") + text + bytes(size) for text, size in zip(headers, sizes, strict=True)]
    if target == "safetensors-header":
        return [size.to_bytes(2, "little") + text for text, size in zip(headers, sizes, strict=True)]
    if target == "gguf":
        return _gguf_files()
    if target in ("pytorch", "pickle"):
        return _pytorch_files() if target == "pytorch" else list(filter(None, map(_pickle_in, _pytorch_files())))
    if target == "index":
        return [
            json.dumps({"metadata": {"total_size": 2}, "weight_map": _SHARDS}).encode(),
            b'{"weight_map":{"a":"a.safetensors"}}',
        ]
    if target == "manifest":
        return [json.dumps({"schema": 1, "made_by": "x", "files": {"m": _DIGESTS}, "tensors": {"t": _ENTRY}}).encode()]
    if target == "config":
        settings = {"bits": 4.5, "quant_method": "exl2", "group_size": -1, "head_bits": 6}
        return [
            json.dumps({"architectures": ["X"], "max_position_embeddings": 9, "quantization_config": settings}).encode()
        ]
    return [
        b"\2" + text
        for text in (
            *headers,
            b'"x":1,"y":[[],{}],"dtype":1,',
            b'"a":["U8",[1,2],[0,4]],"b":["F32",[],[4,8]],',
            b"1e308",
        )
    ]


def _gguf_files() -> list[bytes]:
    from weightlift.testing.gguf_bytes import ARRAY, NUMBERS, STRING, entry, gguf_file, tensor

    kinds = [entry(f"k{kind}", kind, 1) for kind in NUMBERS]
    arrays = [entry("strings", ARRAY, (STRING, ["x", "yz"])), entry("nested", ARRAY, (ARRAY, [(4, [1, 2]), (4, [])]))]
    model = [
        entry("general.architecture", STRING, "llama"),
        entry("general.alignment", 4, 64),
        entry("general.file_type", 4, 15),
    ]
    return [
        gguf_file([tensor("a")], [entry("general.architecture", STRING, "llama")]),
        gguf_file([tensor("a", (4, 2)), tensor("b", (32,), 2, 32)], kinds, data=50),
        gguf_file([tensor("a", (256, 2), 12)], [*model, *arrays], data=288, alignment=64),
        gguf_file([], [entry("split.count", 2, 1)], data=0),
    ]


def _pytorch_files() -> list[bytes]:
    module = _tests("test_pytorch_hostile.py")
    archive, state, tensor, text = module["archive"], module["state"], module["tensor"], module["text"]
    nested = state(text("a"), tensor(shape=(2, 2), strides=(1, 2)), text("b"), b"](K\x01M\x00\x01G" + bytes(8) + b"e")
    ordered = module["named"]("collections", "OrderedDict") + b")R(" + text("w") + tensor(shape=(2,), offset=2) + b"u"
    return [module["GOOD"], archive(nested), archive(b"\x80\x02" + ordered + b"."), archive(state(text("a"), b"\x88"))]


def _pickle_in(archive: bytes) -> bytes | None:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            return file.read("m/data.pkl")
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, ValueError, OSError):
        return None


def kept(target: str) -> list[bytes]:
    """The kept corpus."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())] if (CORPUS / target).is_dir() else []


def seeds(target: str) -> list[bytes]:
    """Everything small that there is for a target, to begin a fuzz run with."""
    found = [*good_files(target), *rule_files(target)]
    if target == "safetensors-header":
        found += [b"\4\0" + content[8:-4] for content in rule_files("safetensors") if len(content) > 12]
    if target == "pickle":
        found += filter(None, map(_pickle_in, rule_files("pytorch")))
    return [content for content in dict.fromkeys(found) if len(content) <= MUTATION_BYTES_MAX]


def generated(target: str, count: int, seed: int) -> list[bytes]:
    """Good inputs with one to three things wrong, the same for the same seed."""
    rng, good = random.Random(f"{target} {seed}"), good_files(target)
    found: dict[bytes, None] = {}
    while len(found) < count:
        content = rng.choice(good)
        for _ in range(rng.randint(1, 3)):
            content = _mutated(rng, content, good)
        found[content[:MUTATION_BYTES_MAX]] = None
    return list(found)


def _mutated(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    stop = min(len(content), at + rng.choice((1, 1, 2, 4, 8, 30)))
    kind = rng.randrange(6)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[stop:]
    if kind == 2:
        return content[:stop] + content[at:]
    if kind == 3:
        other = rng.choice(others)
        return content[:at] + other[rng.randrange(len(other) + 1) :]
    if kind == 4:
        return content[:at] + rng.choice(_WORDS) + content[rng.choice((at, stop)) :]
    form, size = rng.choice((("B", 1), ("<H", 2), ("<I", 4), ("<Q", 8)))
    number = rng.choice((*_INTEGERS, *_LARGE, rng.getrandbits(64))) & ((1 << 8 * size) - 1)
    return content[:at] + struct.pack(form, number) + content[at + size :]
