"""Rules that whole files reach rarely, each by itself: calls in pickles, limits, what the system answers."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.errors import AccessError, FormatError, HeaderError, IndexFileError, ReadError
from weightlift.formats import describe
from weightlift.formats.files import access_failure
from weightlift.formats.gguf_values import ARRAY, STRING, StoredValue
from weightlift.formats.header_scanner import scan
from weightlift.formats.index_file import INDEX_BYTES_MAX
from weightlift.formats.model_config import read_config
from weightlift.formats.pickle_reader import PickleError, PickleReader
from weightlift.formats.pytorch_objects import StorageRecord, TensorRecord, call, look_up, resolve
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.testing.gguf_factory import GGUFSpec, write_gguf
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    from pathlib import Path

STORAGE = StorageRecord("0", "float32", 40)
TENSOR = TensorRecord(STORAGE, "float32", 0, (2,), (1,))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("torch._utils._rebuild_parameter", (5,), "parameter without a tensor"),
        ("torch._tensor._rebuild_from_type_v2", (None, None, [], None), "without arguments"),
        ("torch._utils._rebuild_tensor_v2", (STORAGE, 0, (2,), (1, 1)), "1 dimensions with 2 strides"),
        ("torch._utils._rebuild_tensor_v2", (STORAGE, 0, [2], (1,)), "for sizes or strides"),
        ("torch._utils._rebuild_tensor_v2", (STORAGE, -1, (2,), (1,)), "without a storage, a position"),
        ("torch._utils._rebuild_tensor_v2", (5, 0, (2,), (1,)), "without a storage"),
        ("torch._utils._rebuild_tensor_v2", (STORAGE, 0, (2,), (1,), False, None, {"conj": True}), "would be lost"),
        ("_codecs.encode", ("a", "rot13"), "unknown encoding"),
        ("_codecs.encode", (5,), "unknown encoding"),
        ("torch.device", (5,), "device that is none"),
        ("torch.device", ("cuda", -1), "device that is none"),
        ("torch.serialization._get_layout", (5,), "layout that is none"),
        ("builtins.bytearray", ([-1],), "sizes or strides"),
        ("builtins.complex", ("x",), "arguments that do not fit"),
        ("torch.Tensor", (), "a call of torch.Tensor"),
    ],
)
def test_calls_with_wrong_arguments_are_refused(name: str, arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(PickleError, match=words):
        call(look_up(name), arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "value"),
    [
        ("torch._utils._rebuild_parameter", (TENSOR, True, {}), TENSOR),
        ("torch._utils._rebuild_tensor_v2", (STORAGE, 0, (2,), (1,), False, None, {"conj": False}), TENSOR),
        ("torch.device", ("cuda", 1), "cuda:1"),
        ("torch.device", ("cpu",), "cpu"),
        ("torch.serialization._get_layout", ("torch.strided",), "torch.strided"),
        ("_codecs.encode", ("\xe9", "latin1"), b"\xe9"),
        ("builtins.bytearray", (b"ab",), b"ab"),
        ("builtins.bytearray", ([1, 2],), b"\1\2"),
        ("builtins.set", ((1, 2),), [1, 2]),
        ("collections.OrderedDict", ({"a": 1},), {"a": 1}),
        ("collections.OrderedDict", ([("a", 1)],), {"a": 1}),
        ("torch.Size", ([2, 3],), (2, 3)),
    ],
)
def test_calls_give_inert_values(name: str, arguments: tuple[Any, ...], value: object) -> None:
    assert call(look_up(name), arguments) == value


def test_a_storage_of_no_type_is_refused() -> None:
    kind = look_up("torch.Tensor")
    with pytest.raises(PickleError, match=r"a storage of type torch\.Tensor"):
        resolve(("storage", kind, "0", "cpu", 1))
    assert resolve(("storage", look_up("torch.FloatStorage"), "0", "cpu", 3)) == StorageRecord("0", "float32", 12)


@pytest.mark.parametrize(
    ("pickle", "value"),
    [(b"U\x02\xe9x.", "\xe9x"), (b"K\x05r\x00\x01\x00\x000j\x00\x01\x00\x00.", None), (b"K\x05r\1\0\0\0j\1\0\0\0.", 5)],
)
def test_opcodes_of_other_writers(pickle: bytes, value: object) -> None:
    reader = PickleReader(pickle, look_up=look_up, call=call, resolve=resolve)
    if value is None:
        with pytest.raises(PickleError, match="opcode 0x30"):
            reader.read()
    else:
        assert reader.read() == value


def test_a_number_above_64_bits_among_many_dimensions() -> None:
    header = b'{"a":{"dtype":"U8","x":0,"shape":[1,18446744073709551616,1],"data_offsets":[0,1]}}'
    with pytest.raises(HeaderError, match="above 64 bits"):
        scan(header, path="file", rules=HeaderRules.REFERENCE)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EACCES, AccessError, "permission denied"),
        (errno.EPERM, AccessError, "permission denied"),
        (errno.EIO, ReadError, "Input/output error"),
        (None, ReadError, "odd"),
    ],
)
def test_what_the_system_answers(tmp_path: Path, number: int | None, kind: type[Exception], words: str) -> None:
    error = access_failure(tmp_path, OSError(number, os.strerror(number)) if number else OSError("odd"))
    assert isinstance(error, kind)
    assert words in str(error)
    assert (error.path, bool(error.hint)) == (tmp_path, True)
    assert not isinstance(error, ReadError) or error.errno == number


def test_an_index_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("{")
    os.truncate(path, INDEX_BYTES_MAX + 1)
    with pytest.raises(IndexFileError, match=f"{INDEX_BYTES_MAX + 1:,} bytes, above the limit"):
        describe(path)


def test_shards_of_two_formats_are_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", [TensorSpec("a", "U8", (4,))])
    write_gguf(tmp_path / "b.safetensors", [GGUFSpec("b", "F32", (4,))])
    with pytest.raises(FormatError, match=r"b\.safetensors: a GGUF file beside a\.safetensors, which is safetensors"):
        describe(tmp_path)


def test_a_configuration_is_read_within_bounds(tmp_path: Path) -> None:
    assert read_config(tmp_path) == {}
    path = tmp_path / "config.json"
    for text in ("[]", "{", '{"a": \xff'):
        path.write_bytes(text.encode("latin-1"))
        assert read_config(tmp_path) == {}
    path.write_text(json.dumps({"model_type": "llama"}))
    assert read_config(tmp_path) == {"model_type": "llama"}
    os.truncate(path, (16 << 20) + 1)
    assert read_config(tmp_path) == {}


def test_values_left_in_a_file_say_what_they_are() -> None:
    assert str(StoredValue(0, STRING, 0, 70_000)) == "a string of 70,000 bytes"
    assert str(StoredValue(0, ARRAY, 6, 3)) == "3 × float32"
