"""One GGUF file per rule: each is refused by the right error, and the message says what is wrong."""

from __future__ import annotations

import os
import struct
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest

from weightlift.errors import HeaderError, IndexFileError, TruncatedFileError, UnsupportedDtypeError, WeightliftError
from weightlift.formats import describe
from weightlift.formats.header_reader import HEADER_BYTES_MAX
from weightlift.testing.gguf_bytes import ARRAY, STRING, entry, tensor, text
from weightlift.testing.gguf_bytes import gguf_file as file
from weightlift.types import HeaderRules

HUGE = 1 << 60


@dataclass(frozen=True)
class Case:
    name: str
    content: bytes
    error: type[WeightliftError]
    words: tuple[str, ...]
    tensor: str | None = None


A = tensor("a")
GOOD = file([A], [entry("general.architecture", STRING, "llama")])
NESTED = b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(9)) + struct.pack("<IQ", 0, 0)


def keyed(raw: bytes, kind: int = ARRAY) -> bytes:
    return text("k") + struct.pack("<I", kind) + raw


CASES = (
    # Version and byte order
    Case("version 1", file([A], [], version=1), HeaderError, ("version 1", "32 bits")),
    Case("version 4", file([A], [], version=4), HeaderError, ("version 4", "2 and 3")),
    Case("version 0", file([A], [], version=0), HeaderError, ("version 0",)),
    Case("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), HeaderError, ("big-endian", "reads 3")),
    # Counts beyond the file
    Case(
        "tensors 2^60",
        file([A], [], tensor_count=HUGE),
        TruncatedFileError,
        ("1,152,921,504,606,846,976 tensors",),
    ),
    Case("one tensor too many", file([A], [], data=0, tensor_count=2), TruncatedFileError, ("table of 2 tensors",)),
    Case("keys 2^60", file([A], [], entry_count=HUGE), HeaderError, ("metadata keys", "limit of 65,536")),
    Case("one key too many", file([], [], data=0, entry_count=3), TruncatedFileError, ("metadata of 3 keys",)),
    Case(
        "two million tensors",
        file([bytes(24) * (1 << 21)], [], tensor_count=1 << 21),
        HeaderError,
        ("2,097,152 tensors", "limit of 1,048,576"),
    ),
    # Lengths beyond the file
    Case("key length", file([], [text("", HUGE)]), TruncatedFileError, ("metadata key 0", "incomplete")),
    Case(
        "string length",
        file([], [text("k") + struct.pack("<I", STRING) + text("v", 2**64 - 1)]),
        TruncatedFileError,
        ("value of 'k'", "18,446,744,073,709,551,615 bytes"),
    ),
    Case("array length", file([], [keyed(struct.pack("<IQ", 0, HUGE))]), TruncatedFileError, ("× uint8",)),
    Case("array of strings", file([], [keyed(struct.pack("<IQ", STRING, HUGE))]), TruncatedFileError, ("× string",)),
    Case(
        "string in an array",
        file([], [keyed(struct.pack("<IQ", STRING, 2) + text("x") + text("y", HUGE))]),
        TruncatedFileError,
        ("value of 'k'",),
    ),
    Case("long key", file([], [entry("k" * 70_000, 4, 1)]), HeaderError, ("name of 70,000 bytes",)),
    Case("long name", file([tensor("n" * 70_000)], []), HeaderError, ("tensor 0 has a name of 70,000 bytes",)),
    Case("tensor name length", file([text("", HUGE) + bytes(24)], []), TruncatedFileError, ("entry of tensor 0",)),
    # Values
    Case("nested arrays", file([], [keyed(NESTED)]), HeaderError, ("nested more than 8",)),
    Case("many arrays", file([], [keyed(struct.pack("<IQ", ARRAY, HUGE))]), TruncatedFileError, ("× array",)),
    Case(
        "array bomb",
        file([], [keyed(struct.pack("<IQ", ARRAY, 1 << 21) + struct.pack("<IQ", 0, 0) * (1 << 21))]),
        HeaderError,
        ("arrays inside arrays to 2,097,152",),
    ),
    Case("value type", file([], [keyed(bytes(8), 13)]), HeaderError, ("'k' has type 13",)),
    Case("item type", file([], [keyed(struct.pack("<IQ", 99, 1) + bytes(8))]), HeaderError, ("type 99",)),
    Case("key twice", file([], [entry("k", 4, 1), entry("k", 4, 1)]), HeaderError, ("'k' is given twice",)),
    Case("key not UTF-8", file([], [entry(b"\xff", 4, 1)]), HeaderError, ("not UTF-8",)),
    # Alignment
    Case("alignment 24", file([A], [entry("general.alignment", 4, 24)]), HeaderError, ("general.alignment is 24",)),
    Case("alignment 0", file([A], [entry("general.alignment", 4, 0)]), HeaderError, ("general.alignment is 0",)),
    Case(
        "alignment text",
        file([A], [entry("general.alignment", STRING, "32")]),
        HeaderError,
        ("is '32', not a power",),
    ),
    Case(
        "alignment array",
        file([A], [entry("general.alignment", ARRAY, (4, [32]))]),
        HeaderError,
        ("general.alignment",),
    ),
    Case(
        "alignment 2^31",
        file([A], [entry("general.alignment", 4, 1 << 31)]),
        TruncatedFileError,
        ("cut off",),
        "a",
    ),
    # Tensors
    Case("name not UTF-8", file([tensor(b"\xff")], []), HeaderError, ("entry of tensor 0 is not UTF-8",)),
    Case("tensor twice", file([A, A], []), HeaderError, ("'a' is described twice",), "a"),
    Case("five dimensions", file([tensor("a", (1,) * 5)], []), HeaderError, ("5 dimensions",), "a"),
    Case(
        "2^32-1 dimensions",
        file([text("a") + b"\xff" * 4 + bytes(64)], []),
        HeaderError,
        ("4,294,967,295 dim",),
        "a",
    ),
    Case("overflow", file([tensor("a", (1 << 32, 1 << 32))], []), HeaderError, ("63 bits",), "a"),
    Case("overflow before a zero", file([tensor("a", (1 << 63, 0))], []), HeaderError, ("63 bits",), "a"),
    Case("type unknown", file([tensor("a", kind=77)], []), UnsupportedDtypeError, ("ggml type 77",), "a"),
    Case("type removed", file([tensor("a", kind=4)], []), UnsupportedDtypeError, ("Q4_2", "convert"), "a"),
    Case("type repacked", file([tensor("a", kind=31)], []), UnsupportedDtypeError, ("Q4_0_4_4",), "a"),
    Case("part of a block", file([tensor("a", (33,), 2)], []), HeaderError, ("33 elements", "blocks of 32"), "a"),
    Case("offset unaligned", file([tensor("a", offset=4)], []), HeaderError, ("byte 4", "multiple of 32"), "a"),
    Case("offset 2^64", file([tensor("a", offset=2**64 - 32)], []), TruncatedFileError, ("cut off",), "a"),
    Case(
        "overlap",
        file([tensor("a", (16,)), tensor("b", offset=32)], [], data=64),
        HeaderError,
        ("overlaps 'a'",),
        "b",
    ),
    Case("same place", file([A, tensor("b")], [], data=64), HeaderError, ("overlaps 'a'",), "b"),
    Case("data cut", GOOD[:-1], TruncatedFileError, ("'a'", "cut off", "incomplete"), "a"),
    Case("tensor larger than the file", file([tensor("a", (1 << 40,))], []), TruncatedFileError, ("cut off",), "a"),
    # Truncated anywhere
    Case("magic alone", b"GGUF", TruncatedFileError, ("the version",)),
    Case("no counts", GOOD[:12], TruncatedFileError, ("number of tensors",)),
    Case("in the metadata", GOOD[:40], TruncatedFileError, ("metadata key 0",)),
    # Parts
    Case("split without a name", file([A], [entry("split.count", 2, 2)]), HeaderError, ("part 1 of 2", "its name")),
    Case("split count of text", file([A], [entry("split.count", STRING, "2")]), HeaderError, ("split.count is '2'",)),
    Case("split count 2^30", file([A], [entry("split.count", 4, 1 << 30)]), HeaderError, ("split.count is",)),
)

STRICT_CASES = (
    Case("gap", file([A, tensor("b", offset=64)], [], data=80), HeaderError, ("byte 64", "expects 32"), "b"),
    Case("gap at the start", file([tensor("a", offset=32)], [], data=48), HeaderError, ("expects 0",), "a"),
    Case("disorder", file([tensor("b", offset=32), A], [], data=48), HeaderError, ("before the end",), "a"),
)


def refused(tmp_path: Path, case: Case, rules: HeaderRules) -> WeightliftError:
    path = tmp_path / "model.gguf"
    path.write_bytes(case.content)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    tracemalloc.start()
    try:
        with pytest.raises(WeightliftError) as caught:
            describe(path, header=rules)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20, "memory follows a number in the header"
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before, "a descriptor was left open"
    return caught.value


@pytest.mark.parametrize("rules", HeaderRules)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(tmp_path: Path, case: Case, rules: HeaderRules) -> None:
    error = refused(tmp_path, case, rules)
    assert type(error) is case.error
    words = case.words if rules is HeaderRules.REFERENCE else ()
    for word in ("model.gguf: ", "\nhint: ", *words):
        assert word in str(error)
    assert Path(error.path or "").name == "model.gguf"
    assert error.tensor == case.tensor or case.tensor is None


@pytest.mark.parametrize("case", STRICT_CASES, ids=lambda case: case.name)
def test_refused_by_strict_rules_only(tmp_path: Path, case: Case) -> None:
    error = refused(tmp_path, case, HeaderRules.STRICT)
    assert (type(error), error.tensor) == (case.error, case.tensor)
    for word in case.words:
        assert word in str(error)
    found = describe(tmp_path / "model.gguf")
    assert list(found.offsets) == sorted(found.offsets)


def test_the_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD)
    (only,) = describe(path, header=HeaderRules.STRICT)
    assert (only.name, only.dtype.name, only.shape, only.nbytes) == ("a", "F32", (4,), 16)


@pytest.mark.parametrize("cut", range(4, len(GOOD)))
def test_every_truncation_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD[:cut])
    with pytest.raises(TruncatedFileError):
        describe(path)


def test_a_header_longer_than_any_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as stream:
        stream.write(file([], [text("k") + struct.pack("<I", STRING) + text("", HEADER_BYTES_MAX)], data=0))
        stream.truncate(2 * HEADER_BYTES_MAX)
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError, match="longest header read, 268,435,456 bytes"):
            describe(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_messages_stay_short_and_printable(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    name = "\x1b[31m" + "x" * 60_000 + "\u202e"
    path.write_bytes(file([tensor(name, kind=77)], []))
    with pytest.raises(UnsupportedDtypeError) as caught:
        describe(path)
    message = caught.value.message.removeprefix(str(path))
    assert message.isprintable()
    assert len(message) < 400


def part(number: int, count: int, names: str, total: int | None = None) -> bytes:
    entries = [entry("split.no", 2, number), entry("split.count", 2, count)]
    if total is not None:
        entries.append(entry("split.tensors.count", 5, total))
    tensors = [tensor(name, offset=32 * position) for position, name in enumerate(names)]
    return file(tensors, entries, data=32 * len(names))


def parts(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"m-{number + 1:05}-of-{len(contents):05}.gguf" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def test_a_part_that_says_it_is_another(tmp_path: Path) -> None:
    first, second = parts(tmp_path, part(0, 2, "ab", 3), part(0, 2, "c"))
    with pytest.raises(HeaderError, match=r"00002-of-00002\.gguf: .* part 1 of 2, where part 2 of 2 is expected"):
        describe(first)
    with pytest.raises(HeaderError, match="says part 1 of 2, its name says otherwise"):
        describe(second)


def test_parts_of_another_number(tmp_path: Path) -> None:
    first, _ = parts(tmp_path, part(0, 2, "ab"), part(1, 3, "c"))
    with pytest.raises(HeaderError, match="part 2 of 3, where part 2 of 2"):
        describe(first)


def test_parts_with_too_few_tensors(tmp_path: Path) -> None:
    first, _ = parts(tmp_path, part(0, 2, "ab", 4), part(1, 2, "c"))
    with pytest.raises(IndexFileError, match="says that 4 tensors are in its 2 parts, which hold 3"):
        describe(first)


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    first, _ = parts(tmp_path, part(0, 2, "ab"), part(1, 2, "b"))
    with pytest.raises(IndexFileError, match="holds tensor 'b', and so does"):
        describe(first)


def test_missing_parts(tmp_path: Path) -> None:
    paths = parts(tmp_path, part(0, 3, "a"), part(1, 3, "b"), part(2, 3, "c"))
    paths[1].unlink()
    for named in (paths[0], paths[2], tmp_path):
        with pytest.raises(IndexFileError, match=r"m-00002-of-00003\.gguf: this part is missing; 2 of 3 parts"):
            describe(named)
