"""PyTorch checkpoints, to the last number and word: limits just kept, places in messages, opcodes one by one."""

from __future__ import annotations

import io
import runpy
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.errors import FormatError, HeaderError, NotACheckpointError, TruncatedFileError
from weightlift.formats import describe, pickle_reader
from weightlift.formats.files import is_zip, open_file
from weightlift.formats.pickle_reader import PickleError, PickleReader
from weightlift.formats.pytorch_objects import StorageRecord, TensorRecord, call, flatten, look_up, resolve
from weightlift.formats.zip_directory import read_directory

if TYPE_CHECKING:
    from weightlift.description import Description

HOSTILE = runpy.run_path(str(Path(__file__).with_name("test_pytorch_hostile.py")))
archive, state, tensor, storage, text = (HOSTILE[name] for name in ("archive", "state", "tensor", "storage", "text"))
DATA: bytes = HOSTILE["DATA"]
DAMAGED = "the file is damaged or was written by a faulty tool: fetch it again or save it again"
INT64_MAX = (1 << 63) - 1
RECORD = TensorRecord(StorageRecord("0", "float32", 16), "float32", 0, (4,), (1,))


def described(folder: Path, content: bytes) -> Description:
    (folder / "model.bin").write_bytes(content)
    return describe(folder / "model.bin")


def of_one(folder: Path, **fields: Any) -> tuple[tuple[int, ...], int, int]:
    """Shape, first byte and length of the only tensor of a checkpoint, from the beginning of its storage."""
    content = archive(state(text("a"), tensor(**fields)))
    (only,) = described(folder, content)
    return only.shape, only.offset - content.index(DATA), only.nbytes


def test_numbers_of_tensors_at_their_limits(tmp_path: Path) -> None:
    assert of_one(tmp_path, shape=(1,) * 64, strides=(0,) * 64) == ((1,) * 64, 0, 4)
    assert of_one(tmp_path, shape=(2,), strides=(3,)) == ((2,), 0, 16)
    assert of_one(tmp_path, shape=(1,), strides=(INT64_MAX,), offset=3) == ((1,), 12, 4)
    assert of_one(tmp_path, shape=(0,), offset=INT64_MAX) == ((0,), 0, 0)
    assert of_one(tmp_path, shape=(), strides=(), offset=1) == ((), 4, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (1,) * 65, "strides": (0,) * 65}, "has 65 dimensions, or numbers beyond 63 bits"),
        ({"shape": (INT64_MAX + 1,), "strides": (0,)}, "has 1 dimensions, or numbers beyond 63 bits"),
        ({"shape": (0,), "strides": (INT64_MAX + 1,)}, "has 1 dimensions, or numbers beyond 63 bits"),
        ({"shape": (), "strides": (), "offset": INT64_MAX + 1}, "has 0 dimensions, or numbers beyond 63 bits"),
        (
            {"shape": (1 << 62, 2), "strides": (0, 0)},
            f"has shape [{1 << 62}, 2], more elements than 63 bits can count",
        ),
        ({"shape": (2, 2), "strides": (2, 2), "offset": 0}, "reaches to element 5 of storage '0' with 4"),
        ({"shape": (1,), "offset": 4}, "reaches to element 5 of storage '0' with 4"),
        ({"shape": (3,), "strides": (1000,)}, "reaches to element 2,001 of storage '0' with 4"),
        (
            {"place": storage(count=5000)},
            "lies in storage '0' of 20,000 bytes, of which the archive holds 16",
        ),
        ({"place": storage(key="7")}, "lies in storage '7', which the archive does not hold"),
    ],
)
def test_numbers_of_tensors_beyond_their_limits(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(HeaderError) as caught:
        of_one(tmp_path, **fields)
    error, path = caught.value, tmp_path / "model.bin"
    assert error.message == f"{path}: tensor 'a' {message}"
    assert (error.hint, error.path, error.tensor) == (DAMAGED, path, "a")


def test_a_storage_may_be_shorter_than_its_entry(tmp_path: Path) -> None:
    assert of_one(tmp_path, place=storage(count=3), shape=(3,)) == ((3,), 0, 12)


def test_tensors_that_share_bytes_are_known_to(tmp_path: Path) -> None:
    first, second, inside = tensor(shape=(2,)), tensor(shape=(2,), offset=2), tensor(shape=(2,), offset=1)
    for items, shared in (((first, second), False), ((first, second, inside), True), ((tensor(), inside), True)):
        names = [text(f"t{number}") for number in range(len(items))]
        found = described(tmp_path, archive(state(*(part for pair in zip(names, items, strict=True) for part in pair))))
        assert found.shared is shared


def test_two_storages_in_the_same_bytes_are_named(tmp_path: Path) -> None:
    both = state(text("a"), tensor(), text("b"), tensor(storage(key="1")))
    local = HOSTILE["_local"](b"m/data/1")
    content = bytearray(archive(both, entries={"data/0": bytes(4) + local + DATA, "data/1": DATA}))
    inner = content.find(b"m/data/1") - 30
    struct.pack_into("<I", content, content.rfind(b"m/data/1") - 46 + 42, inner)
    begin, end = inner + len(local), inner + len(local) + 16
    with pytest.raises(HeaderError) as caught:
        described(tmp_path, bytes(content))
    error, path = caught.value, tmp_path / "model.bin"
    assert error.message == f"{path}: storage '1' begins at byte {begin:,} and overlaps storage '0', to {end:,}"
    assert (error.hint, error.path, error.offset) == (DAMAGED, path, begin)


def test_the_folder_in_the_archive(tmp_path: Path) -> None:
    """Only one may hold a checkpoint; what lies deeper is no checkpoint."""
    path = tmp_path / "model.bin"
    content = archive(state(text("a"), tensor()), entries={"data/0": DATA, "extra/data.pkl": b"", "data.pkl2": b""})
    assert described(tmp_path, content).names == ["a"]
    stream = io.BytesIO(content)
    with zipfile.ZipFile(stream, "a") as file:
        file.writestr("other/data.pkl", b"")
    with pytest.raises(NotACheckpointError) as caught:
        described(tmp_path, stream.getvalue())
    assert caught.value.message == (
        f"{path}: a zip archive of 5 entries that is no PyTorch checkpoint: more than one is called data.pkl"
    )


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (b"little", ""),
        (b"big", "its numbers are big-endian"),
        (b"little!", "its numbers are in an unknown byte order, b'little!'"),
        (b"0123456789abcdefg", "its numbers are in an unknown byte order, b'0123456789abcdef'"),
        (b"", "its numbers are in an unknown byte order, b''"),
    ],
)
def test_the_order_of_bytes(tmp_path: Path, order: bytes, message: str) -> None:
    content = archive(state(text("a"), tensor()), entries={"data/0": DATA, "byteorder": order})
    if not message:
        assert described(tmp_path, content).names == ["a"]
        return
    with pytest.raises(HeaderError) as caught:
        described(tmp_path, content)
    assert caught.value.message == f"{tmp_path / 'model.bin'}: {message}"
    assert caught.value.path == tmp_path / "model.bin"


@pytest.mark.parametrize(
    ("head", "claimed"),
    [
        (b"PK\3\4\x14\0\0\0", True),
        (b"PK\3\4", True),
        (b"PK\3\4\0\0\0\0\0", True),
        (b"PK\3\4\0\0\0\0{", False),
        (b"PK\3\4\0\0\0\0 {", False),
        (b"PK\5\6\0\0\0\0", False),
        (b"xPK\3\4", False),
    ],
)
def test_an_archive_is_told_by_its_first_bytes(head: bytes, claimed: bool) -> None:
    assert is_zip(head) is claimed


def unpickled(data: bytes) -> Any:
    return PickleReader(data, look_up=look_up, call=call, resolve=resolve).read()


@pytest.mark.parametrize(
    ("pickle", "value"),
    [
        (b"\x80\x02N.", None),
        (b"\x80\x01\x88.", True),
        (b"\x89.", False),
        (b"J\xfe\xff\xff\xff.", -2),
        (b"K\xff.", 255),
        (b"M\xff\xfe.", 0xFEFF),
        (b"\x8a\x00.", 0),
        (b"\x8a\x02\x00\xff.", -256),
        (b"G\x3f\xf8\0\0\0\0\0\0.", 1.5),
        (b"X\x03\0\0\0\xed\xa0\x80.", "\ud800"),
        (b"U\x02\xe9x.", "\xe9x"),
        (b").", ()),
        (b"]].", []),
        (b"}.", {}),
        (b"\x8f.", []),
        (b"K\x01(K\x02K\x03t\x86.", (1, (2, 3))),
        (b"K\x01K\x02\x85\x86.", (1, (2,))),
        (b"K\x00K\x01K\x02K\x03\x87\x86.", (0, (1, 2, 3))),
        (b"]K\x01aK\x02a.", [1, 2]),
        (b"](K\x01K\x02e(K\x03e.", [1, 2, 3]),
        (b"}K\x01K\x02s(K\x03K\x04K\x05K\x06u.", {1: 2, 3: 4, 5: 6}),
        (b"K\x07q\x05K\x08r\x06\0\0\0h\x05j\x06\0\0\0\x86.", (7, 8)),
        (b"ccollections\nOrderedDict\n)RK\x01K\x02s}b.", {1: 2}),
        (b"ctorch\nfloat16\n.", "torch.float16"),
        (b"(" * 1000 + b"N.", None),
    ],
)
def test_what_opcodes_make(pickle: bytes, value: object) -> None:
    found = unpickled(pickle)
    assert found == value
    assert type(found) is type(value) or isinstance(found, dict)


@pytest.mark.parametrize(
    ("pickle", "message"),
    [
        (b"\x80\x03N.", "pickle protocol 3, where torch.save writes 2"),
        (b"(" * 1001 + b"N.", "more than 1000 values inside each other"),
        (b"N" * 1200 + b"0", "opcode 0x30 at byte 1,200, which no checkpoint needs"),
        (b"N" * 1200, "nothing sensible at byte 1,200 of 1,200"),
        (b"\x80", "1 bytes at byte 1, beyond its end at 1"),
        (b"N" * 1200 + b"U\xff", "255 bytes at byte 1,202, beyond its end at 1,202"),
        (b"U\x02\xe9", "2 bytes at byte 2, beyond its end at 3"),
        (b"N" * 1200 + b"cos", "a name at byte 1,201 without an end"),
        (b"N" * 1200 + b"cos\nsys", "a name at byte 1,204 without an end"),
        (b"X\x01\0\0\0\xff.", "nothing sensible at byte 6: 'utf-8' codec can't decode byte 0xff in position 0: "),
        (b"NK\x01a.", "items for NoneType, which is no list"),
        (b")K\x01K\x01s.", "items for tuple, which is no dictionary"),
        (b"N" * 1200 + b"}(Nu", "a dictionary with a key and no value at byte 1,204"),
        (b"N" * 1200 + b"}NR", "a call at byte 1,203 with NoneType for arguments"),
        (b"N" * 1200 + b"}}b", "attributes for dict at byte 1,203"),
        (b"}]K\x01s.", "a dictionary with a list for a key"),
    ],
)
def test_where_a_pickle_is_wrong(pickle: bytes, message: str) -> None:
    with pytest.raises(PickleError) as caught:
        unpickled(pickle)
    assert str(caught.value).startswith(message)
    assert message.endswith(": ") or str(caught.value) == message


def test_as_many_opcodes_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_reader, "STEPS_MAX", 1200)
    assert unpickled(b"N" * 1200 + b".") is None
    with pytest.raises(PickleError, match=r"^more than 1,200 opcodes$"):
        unpickled(b"N" * 1201 + b".")


@pytest.mark.parametrize(
    ("value", "tensors", "values"),
    [
        (RECORD, {"tensor": RECORD}, {}),
        ({"a": RECORD, "b": [1, 2]}, {"a": RECORD}, {"b": [1, 2]}),
        ([RECORD, (RECORD, 5)], {"0": RECORD, "1.0": RECORD}, {"1.1": 5}),
        ({"a": [{"b": 1}], 3: ()}, {}, {"a.0.b": 1, "3": ()}),
        ({"": {"": 1}}, {}, {"": 1}),
        ({"a": look_up("torch.Tensor")}, {}, {"a": "torch.Tensor"}),
    ],
)
def test_names_of_nested_values(value: object, tensors: object, values: object) -> None:
    assert flatten(value, 0) == (tensors, values)


def nested(depth: int) -> Any:
    value: Any = {"a": 1}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_nesting_and_names_up_to_their_limits() -> None:
    flatten(nested(64), 0)
    with pytest.raises(PickleError, match=r"^values nested more than 64 deep, or in themselves$"):
        flatten(nested(65), 0)
    flatten({"a": dict.fromkeys(range((1 << 16) + 9), 0)}, 10)
    with pytest.raises(PickleError, match=r"^more than 65,546 values, counting each place where one is referred to$"):
        flatten({"a": dict.fromkeys(range((1 << 16) + 10), 0)}, 10)
    most = (8 << 20) + 16 * 10
    flatten({"k" * most: 1}, 10)
    flatten({"k" * (most - 1): 1, 12345: 1}, 10)
    with pytest.raises(PickleError, match=f"^values whose names take more than {most:,} characters together$"):
        flatten({"k" * most: 1, 1: 1}, 10)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("torch._utils._rebuild_tensor_v3", (RECORD.storage, 0, (4,), (1,), 0, 0, "float31"), "a tensor without a"),
        ("torch._utils._rebuild_parameter", (), "a call of torch._utils._rebuild_parameter with arguments that do not"),
        ("torch._utils._rebuild_tensor_v2", (RECORD.storage, 0, (4,), 4), "a tensor with 4 for sizes or strides"),
        ("torch.Size", ([True],), "a tensor with (True,) for sizes or strides"),
    ],
)
def test_calls_that_do_not_fit_say_so(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PickleError) as caught:
        call(look_up(name), arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "arguments", "value"),
    [
        ("torch._utils._rebuild_tensor", (RECORD.storage, 0, (4,), (1,)), RECORD),
        (
            "torch._utils._rebuild_tensor_v3",
            (RECORD.storage, 1, (2,), (1,), False, None, "torch.int32"),
            RECORD._replace(offset=1, shape=(2,), dtype="int32"),
        ),
        ("torch._utils._rebuild_parameter_with_state", (RECORD, False, {}, {"x": 1}), RECORD),
        ("torch._tensor._rebuild_from_type_v2", (look_up("torch.Size"), None, ([1],), None), (1,)),
        ("collections.OrderedDict", (), {}),
        ("_codecs.encode", ("\xe9",), b"\xc3\xa9"),
        ("_codecs.encode", ("\xe9", "latin-1"), b"\xe9"),
        ("builtins.bytearray", (), b""),
        ("__builtin__.set", (), []),
        ("builtins.complex", (1, 2), 1 + 2j),
    ],
)
def test_what_calls_give(name: str, arguments: tuple[Any, ...], value: object) -> None:
    assert call(look_up(name), arguments) == value


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (("storage", look_up("torch.FloatStorage"), "0", "cpu"), "a reference to something else than a storage: ("),
        (["storage", look_up("torch.FloatStorage"), "0", "cpu", 1], "a reference to something else than a storage: ["),
        (("module", look_up("torch.FloatStorage"), "0", "cpu", 1), "a reference to something else than a storage: ("),
        (("storage", "torch.FloatStorage", "0", "cpu", 1), "a storage that is none: ('storage', 'torch.FloatStorage'"),
        (("storage", look_up("torch.FloatStorage"), 0, "cpu", 1), "a storage that is none: ('storage', "),
        (("storage", look_up("torch.FloatStorage"), "0", "cpu", True), "a storage that is none: ('storage', "),
        (("storage", look_up("torch.Size"), "0", "cpu", 1), "a storage of type torch.Size"),
    ],
)
def test_references_that_are_no_storage(reference: object, message: str) -> None:
    with pytest.raises(PickleError) as caught:
        resolve(reference)
    assert str(caught.value).startswith(message)


def test_storages_by_their_names() -> None:
    for name, dtype, nbytes in (
        ("torch.DoubleStorage", "float64", 24),
        ("torch.storage.HalfStorage", "float16", 6),
        ("torch.storage.UntypedStorage", "uint8", 3),
        ("torch.UntypedStorage", "uint8", 3),
        ("torch.ComplexDoubleStorage", "complex128", 48),
    ):
        assert resolve(("storage", look_up(name), "k", "cpu", 3)) == StorageRecord("k", dtype, nbytes)


def test_a_part_of_several_and_an_archive_without_an_end_are_pointed_at(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for disks in ((1, 0), (0, 1)):
        path.write_bytes(HOSTILE["end_field"](4, "<I", disks[0] | disks[1] << 16))
        with open_file(path) as file, pytest.raises(NotACheckpointError, match=r"part [12] of a zip") as caught:
            read_directory(file)
        assert (caught.value.hint, caught.value.path) == ("join the parts first", path)
    path.write_bytes(b"PK\3\4" + bytes(2000))
    with open_file(path) as file, pytest.raises(TruncatedFileError) as cut:
        read_directory(file)
    assert (cut.value.path, cut.value.offset) == (path, 2004)


def test_entries_that_reach_to_the_end_of_the_file_and_beyond(tmp_path: Path) -> None:
    """The position of an entry is looked at even where there is no room for what stands before it."""
    field = HOSTILE["directory_field"]
    size = len(HOSTILE["GOOD"])
    for offset in (size - 30, size - 29, size):
        path = tmp_path / "model.bin"
        with pytest.raises(FormatError) as caught:
            described(tmp_path, field(42, "<I", offset))
        beyond = f"is said to be at byte {offset}, but the file has {size}"
        elsewhere = f"is not at byte {offset}, where the directory says"
        expected = elsewhere if offset == size - 30 else beyond
        assert caught.value.message == f"{path}: the data of 'a' ('m/data/0') {expected}"
        assert (caught.value.tensor, caught.value.hint) == ("a", DAMAGED)


def test_an_entry_whose_name_would_reach_beyond_the_end_of_the_file(tmp_path: Path) -> None:
    """What stands before an entry is the last thing in the file, in the comment of the archive."""
    size = len(HOSTILE["GOOD"])
    content = bytearray(HOSTILE["directory_field"](42, "<I", size))
    struct.pack_into("<H", content, content.rfind(b"PK\5\6") + 20, 30)
    with pytest.raises(HeaderError) as caught:
        described(tmp_path, bytes(content) + HOSTILE["_local"](b"m/data/0")[:30])
    assert caught.value.message == (
        f"{tmp_path / 'model.bin'}: the data of 'a' ('m/data/0') is not at byte {size}, where the directory says"
    )
    struct.pack_into("<H", content, content.rfind(b"PK\5\6") + 20, 38)
    with pytest.raises(TruncatedFileError, match=f"takes 16 bytes from byte {size + 38}; the file has {size + 38} "):
        described(tmp_path, bytes(content) + HOSTILE["_local"](b"m/data/0"))


def test_a_pickle_that_is_too_long_says_what_to_do(tmp_path: Path) -> None:
    nbytes = (64 << 20) + 1
    content = HOSTILE["directory_field"](20, "<Q", nbytes | nbytes << 32, b"m/data.pkl")
    with pytest.raises(HeaderError) as caught:
        described(tmp_path, content)
    assert caught.value.hint == "tensors belong beside the pickle: save them as tensors, not as lists"
    assert caught.value.path == tmp_path / "model.bin"
    nbytes -= 1
    with pytest.raises(TruncatedFileError, match="takes 67,108,864 bytes"):
        described(tmp_path, HOSTILE["directory_field"](20, "<Q", nbytes | nbytes << 32, b"m/data.pkl"))
