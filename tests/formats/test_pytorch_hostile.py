"""One PyTorch checkpoint per rule: each is refused by the right error, and nothing in it is ever executed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from weightlift.errors import FormatError, HeaderError, NotACheckpointError, TruncatedFileError, WeightliftError
from weightlift.formats import describe, pickle_reader

STEPS = 1 << 18
DATA = struct.pack("<4f", 1, 2, 3, 4)


def archive(
    data: bytes | None, *, root: str = "m", method: int = zipfile.ZIP_STORED, entries: dict[str, bytes] | None = None
) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        if data is not None:
            file.writestr(f"{root}/data.pkl", data)
        for name, content in ({"data/0": DATA} if entries is None else entries).items():
            file.writestr(f"{root}/{name}", content)
    return stream.getvalue()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(max(1, (value.bit_length() + 8) // 8), "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 4, what: str = "storage") -> bytes:
    return tuple_of(text(what), named("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(
    place: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    tail: bytes = b"\x89N",
    rebuild: str = "_rebuild_tensor_v2",
) -> bytes:
    sizes, steps = (tuple_of(*map(number, some)) for some in (shape, strides))
    arguments = (storage() if place is None else place, number(offset), sizes, steps, tail)
    return named("torch._utils", rebuild) + tuple_of(*arguments) + b"R"


def state(*items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(items) + b"u."


def a(value: bytes) -> bytes:
    return archive(state(text("a"), value))


@dataclass(frozen=True)
class Case:
    name: str
    content: bytes
    error: type[WeightliftError]
    words: tuple[str, ...]
    tensor: str | None = None


GOOD = a(tensor())


def protocol_4() -> bytes:
    return archive(pickle.dumps({"a": 1}, protocol=4))


def doubled(depth: int) -> bytes:
    """Dictionaries each of which holds the one before twice: few bytes, 2^depth names."""
    steps = [b"\x80\x02", state(text("a"), tensor())[2:-1], b"q\x00"]
    for level in range(depth):
        steps.append(b"}(" + text("l") + b"h" + bytes([level]) + text("r") + b"h" + bytes([level]) + b"uq")
        steps.append(bytes([level + 1]))
    return archive(b"".join(steps) + b".")


def in_itself() -> bytes:
    return archive(b"\x80\x02}q\x00(" + text("a") + b"h\x00u.")


def deep_keys() -> bytes:
    """A tuple of tuples of … as a key: hashing it takes 2^40 steps."""
    steps = b"\x80\x02K\x01\x85q\x00"
    for level in range(40):
        steps += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return archive(steps + b"}h\x28K\x01s.")


def with_entries(**more: bytes) -> bytes:
    return archive(state(text("a"), tensor()), entries={"data/0": DATA} | more)


def renamed_in_directory() -> bytes:
    content = bytearray(GOOD)
    content[content.find(b"m/data/0")] = ord("x")
    return bytes(content)


def directory_field(offset: int, form: str, value: int, entry: bytes = b"m/data/0") -> bytes:
    """The good archive with one number of an entry in its directory changed."""
    content = bytearray(GOOD)
    at = content.rfind(entry) - 46
    struct.pack_into(form, content, at + offset, value)
    return bytes(content)


def end_field(offset: int, form: str, value: int) -> bytes:
    content = bytearray(GOOD)
    struct.pack_into(form, content, content.rfind(b"PK\x05\x06") + offset, value)
    return bytes(content)


HOLDS = "its pickle holds"
CASES = (
    # The archive
    Case("no directory", GOOD[:-30], TruncatedFileError, ("no directory at its end", "incomplete")),
    Case("cut in half", GOOD[: len(GOOD) // 2], TruncatedFileError, ("no directory",)),
    Case("another archive", archive(None, entries={"word/document.xml": b"<x/>"}), NotACheckpointError, ("data.pkl",)),
    Case(
        "compressed", archive(state(), method=zipfile.ZIP_DEFLATED), HeaderError, ("compressed", "save the checkpoint")
    ),
    Case("program", with_entries(**{"constants.pkl": b""}), NotACheckpointError, ("TorchScript",)),
    Case("big-endian", with_entries(byteorder=b"big"), HeaderError, ("big-endian",)),
    Case("odd byte order", with_entries(byteorder=b"middle"), HeaderError, ("unknown byte order",)),
    Case("entry twice", renamed_in_directory(), HeaderError, ("is not at byte",), "a"),
    Case("entries 2^16", end_field(10, "<H", 65534), HeaderError, ("65,534 entries", "beyond")),
    Case("directory size", end_field(12, "<I", 1 << 31), HeaderError, ("directory",)),
    Case("directory position", end_field(16, "<I", 1 << 31), HeaderError, ("beyond the end",)),
    Case("directory elsewhere", end_field(16, "<I", 0), HeaderError, ("no directory at byte",)),
    Case("64 bits without them", directory_field(42, "<I", 0xFFFFFFFF), HeaderError, ("64-bit", "m/data/0")),
    Case("position", directory_field(42, "<I", 1 << 30), HeaderError, ("is said to be at byte",), "a"),
    Case("encrypted", directory_field(8, "<H", 1), HeaderError, ("encrypted",), "a"),
    Case("sizes differ", directory_field(20, "<I", 3), HeaderError, ("in 3 bytes instead of 16",)),
    Case(
        "size beyond the file",
        directory_field(20, "<Q", (1 << 30) | (1 << 30) << 32),
        TruncatedFileError,
        ("takes 1,073,741,824 bytes",),
        "a",
    ),
    # Names in the pickle
    Case("os.system", a(named("os", "system") + tuple_of(text("touch /tmp/x")) + b"R"), HeaderError, ("os.system",)),
    Case("posix", a(named("posix", "system") + tuple_of(text("x")) + b"R"), HeaderError, ("posix.system",)),
    Case("eval", a(named("builtins", "eval") + tuple_of(text("1")) + b"R"), HeaderError, ("builtins.eval",)),
    Case("getattr", a(named("builtins", "getattr")), HeaderError, ("builtins.getattr",)),
    Case(
        "a class of torch",
        a(named("torch.nn.modules.linear", "Linear")),
        HeaderError,
        ("torch.nn.modules.linear.Linear",),
    ),
    Case("a quantised tensor", a(named("torch._utils", "_rebuild_qtensor")), HeaderError, ("_rebuild_qtensor",)),
    Case(
        "a sparse tensor", a(named("torch._utils", "_rebuild_sparse_tensor")), HeaderError, ("_rebuild_sparse_tensor",)
    ),
    Case(
        "numpy", a(named("numpy.core.multiarray", "_reconstruct")), HeaderError, ("numpy.core.multiarray._reconstruct",)
    ),
    Case("storage type", a(tensor(storage("QInt8Storage"))), HeaderError, ("torch.QInt8Storage",)),
    Case(
        "a module path in a name",
        a(named("torch.FloatStorage", "__init__")),
        HeaderError,
        ("torch.FloatStorage.__init__",),
    ),
    Case("call of a type", a(named("torch", "FloatStorage") + b")R"), HeaderError, ("a call of torch.FloatStorage",)),
    Case("call of text", a(text("x") + b")R"), HeaderError, ("a call of str",)),
    Case("call with a list", a(named("collections", "OrderedDict") + b"]R"), HeaderError, ("list for arguments",)),
    Case("call that does not fit", a(named("torch", "Size") + tuple_of(b"K\x01") + b"R"), HeaderError, ("do not fit",)),
    Case("object", a(named("collections", "OrderedDict") + b")\x81"), HeaderError, ("opcode 0x81",)),
    Case("attributes", archive(b"\x80\x02}}b."), HeaderError, ("attributes for dict",)),
    Case("extension", a(b"\x82\x01"), HeaderError, ("opcode 0x82",)),
    Case("instance", a(b"(ios\nsystem\n"), HeaderError, ("opcode 0x69",)),
    Case("protocol 4", protocol_4(), HeaderError, ("pickle protocol 4",)),
    # References
    Case("reference to a module", a(storage(what="module")), HeaderError, ("something else than a storage",)),
    Case("reference of a number", a(b"K\x01Q"), HeaderError, ("something else than a storage",)),
    Case("negative storage", a(storage(count=-1)), HeaderError, ("a storage that is none",)),
    Case("a storage alone", a(storage()), HeaderError, ("a storage without a tensor at 'a'",)),
    Case(
        "storage not there", a(tensor(storage(key="1"))), HeaderError, ("storage '1', which the archive does not",), "a"
    ),
    Case("storage elsewhere", a(tensor(storage(key="../data.pkl"))), HeaderError, ("does not hold",), "a"),
    Case("storage too small", a(tensor(storage(count=5))), HeaderError, ("of 20 bytes", "holds 16"), "a"),
    Case("storage 2^60", a(tensor(storage(count=1 << 60))), HeaderError, ("of which the archive holds 16",), "a"),
    # Tensors
    Case("beyond its storage", a(tensor(shape=(5,))), HeaderError, ("reaches to element 5", "with 4"), "a"),
    Case("offset", a(tensor(offset=1)), HeaderError, ("reaches to element 5",), "a"),
    Case("strides", a(tensor(shape=(2,), strides=(4,))), HeaderError, ("reaches to element 5",), "a"),
    Case("negative size", a(tensor(shape=(-1,))), HeaderError, ("for sizes or strides",)),
    Case("negative stride", a(tensor(strides=(-1,))), HeaderError, ("for sizes or strides",)),
    Case("negative offset", a(tensor(offset=-1)), HeaderError, ("without a storage, a position",)),
    Case("two strides", a(tensor(strides=(1, 1))), HeaderError, ("1 dimensions with 2 strides",)),
    Case("size 2^70", a(tensor(shape=(1 << 70,))), HeaderError, ("beyond 63 bits",), "a"),
    Case("size 2^62 twice", a(tensor(shape=(1 << 62, 4), strides=(0, 0))), HeaderError, ("63 bits can count",), "a"),
    Case("65 dimensions", a(tensor(shape=(1,) * 65, strides=(0,) * 65)), HeaderError, ("65 dimensions",), "a"),
    Case(
        "conjugate",
        a(tensor(tail=b"\x89N}(" + text("conj") + b"\x88u")),
        HeaderError,
        ("properties (conj)", "would be lost"),
    ),
    Case(
        "two types",
        archive(state(text("a"), tensor(), text("b"), tensor(storage("IntStorage"))), entries={"data/0": DATA}),
        HeaderError,
        ("is int32", "as float32"),
        "b",
    ),
    # The structure of the pickle
    Case("empty", archive(b""), HeaderError, ("nothing sensible at byte 0",)),
    Case("no end", archive(b"\x80\x02}"), HeaderError, ("nothing sensible at byte 3",)),
    Case("nothing on the stack", archive(b"\x80\x02."), HeaderError, ("nothing sensible",)),
    Case("nothing in the memo", archive(b"\x80\x02h\x07."), HeaderError, ("nothing sensible",)),
    Case("text beyond the end", archive(b"\x80\x02X\xff\xff\xff\xff."), HeaderError, ("4,294,967,295 bytes",)),
    Case("text not UTF-8", archive(b"\x80\x02X\x01\x00\x00\x00\xff."), HeaderError, ("nothing sensible",)),
    Case("name without an end", archive(b"\x80\x02cos"), HeaderError, ("without an end",)),
    Case("key without a value", archive(b"\x80\x02}(K\x01u."), HeaderError, ("a key and no value",)),
    Case("items for a number", archive(b"\x80\x02K\x01K\x02a."), HeaderError, ("items for int",)),
    Case("a mark too few", archive(b"\x80\x02}u."), HeaderError, ("nothing sensible",)),
    Case("marks in marks", archive(b"\x80\x02" + b"(" * 2000 + b"."), HeaderError, ("more than 1000 values",)),
    Case("a number alone", archive(b"\x80\x02K\x01."), HeaderError, ("one int and no tensors",)),
    Case("key of a tuple", archive(b"\x80\x02})K\x01s."), HeaderError, ("a tuple for a key",)),
    Case("key of a fraction", archive(b"\x80\x02}G" + bytes(8) + b"K\x01s."), HeaderError, ("0.0 for a key",)),
    Case("keys that take for ever", deep_keys(), HeaderError, ("a tuple for a key",)),
    Case("in itself", in_itself(), HeaderError, ("nested more than 64 deep, or in themselves",)),
    Case("doubled", doubled(40), HeaderError, (HOLDS, "values, counting each place")),
    Case(
        "one name twice",
        archive(state(text("a.b"), tensor(), text("a"), b"}" + text("b") + tensor() + b"s")),
        HeaderError,
        ("both called 'a.b'",),
    ),
    Case("number and text", archive(state(text("0"), tensor(), b"K\x00", tensor())), HeaderError, ("both called '0'",)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(tmp_path: Path, case: Case) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(case.content)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(WeightliftError) as caught:
        describe(path)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before, "a descriptor was left open"
    assert type(caught.value) is case.error, caught.value
    for word in ("model.bin: ", "\nhint: ", *case.words):
        assert word in str(caught.value)
    assert Path(caught.value.path or "").name == "model.bin"
    assert caught.value.tensor == case.tensor


def test_the_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(GOOD)
    (only,) = describe(path)
    assert path.read_bytes()[only.offset : only.offset + only.nbytes] == DATA


@pytest.mark.parametrize("cut", range(4, len(GOOD), 7))
def test_every_truncation_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(GOOD[:cut])
    with pytest.raises(FormatError):
        describe(path)


@pytest.mark.parametrize("at", range(len(GOOD)))
def test_any_changed_byte_is_read_or_refused(tmp_path: Path, at: int) -> None:
    content = bytearray(GOOD)
    content[at] ^= 0xFF
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    try:
        found = list(describe(path))
    except FormatError:
        return
    assert all(info.offset + info.nbytes <= len(content) for info in found)


def test_entries_that_overlap(tmp_path: Path) -> None:
    both = state(text("a"), tensor(), text("b"), tensor(storage(key="1")))
    content = bytearray(archive(both, entries={"data/0": bytes(4) + _local(b"m/data/1") + DATA, "data/1": DATA}))
    # The directory has the second storage begin inside the first.
    inner = content.find(b"m/data/1") - 30
    struct.pack_into("<I", content, content.rfind(b"m/data/1") - 46 + 42, inner)
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(HeaderError, match=r"storage '1' begins at byte .* and overlaps storage '0'"):
        describe(path)


def _local(name: bytes) -> bytes:
    return struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 16, 16, len(name), 0) + name


@pytest.mark.parametrize(
    "body",
    [
        b"]" * (2 * STEPS),
        b"](" + b"]" * 200_000 + b"e",
        b"}" + b"".join(b"r" + struct.pack("<I", number) for number in range(200_000)),
        b"r\xff\xff\xff\xff" * 10,
    ],
    ids=["lists", "list of lists", "memo", "sparse memo"],
)
def test_memory_stays_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setattr(pickle_reader, "STEPS_MAX", STEPS)
    path = tmp_path / "model.bin"
    path.write_bytes(archive(b"\x80\x02" + body))
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError):
            describe(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * STEPS + 4 * len(body)


def test_messages_stay_short_and_printable(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(a(named("os\x1b[31m", "x" * 100_000 + "\u202e")))
    with pytest.raises(HeaderError) as caught:
        describe(path)
    message = caught.value.message.removeprefix(str(path))
    assert message.isprintable()
    assert len(message) < 400


def test_a_zip_with_64_bit_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {"m/data.pkl": state(text("a"), tensor()), "m/data/0": DATA}.items():
            with file.open(name, "w", force_zip64=True) as entry:
                entry.write(content)
    # As an archive of more than 4 GiB has it: an entry's sizes and position in an extra field, the end in 64 bits.
    raw = bytearray(path.read_bytes())
    at = raw.rfind(b"m/data/0") - 46
    size, offset = struct.unpack_from("<I", raw, at + 24)[0], struct.unpack_from("<I", raw, at + 42)[0]
    extra = struct.pack("<2H3Q", 1, 24, size, size, offset)
    struct.pack_into("<2I", raw, at + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", raw, at + 30, len(extra))
    struct.pack_into("<I", raw, at + 42, 0xFFFFFFFF)
    end = raw.rfind(b"PK\x05\x06")
    count, nbytes, directory = struct.unpack_from("<HII", raw, end + 10)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, nbytes + len(extra), directory)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end + len(extra), 1)
    final = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(bytes(raw[:end]) + extra + end64 + locator + final)
    (only,) = describe(path)
    assert path.read_bytes()[only.offset : only.offset + only.nbytes] == DATA


def test_a_pickle_above_the_limit_is_not_read(tmp_path: Path) -> None:
    (path := tmp_path / "model.bin").write_bytes(directory_field(20, "<Q", 0x4000001 | 0x4000001 << 32, b"m/data.pkl"))
    with pytest.raises(HeaderError, match="its pickle has 67,108,865 bytes, above the limit of 67,108,864"):
        describe(path)


def test_nothing_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    path = tmp_path / "model.bin"
    path.write_bytes(archive(pickle.dumps({"a": Evil()}, protocol=2)))
    with pytest.raises(HeaderError, match="system"):
        describe(path)
    assert not marker.exists()
