"""GGUF: what parts say of themselves, and values that are read late, to the last byte and word."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from weightlift.errors import FileChangedError, HeaderError, TruncatedFileError
from weightlift.formats import describe, gguf_values
from weightlift.testing.gguf_bytes import ARRAY, STRING, entry, gguf_file, tensor

if TYPE_CHECKING:
    from pathlib import Path

NO, COUNT = entry("split.no", 2, 1), entry("split.count", 2, 2)


def two_parts(folder: Path, *second: bytes) -> Path:
    first, other = (folder / f"m-{number:05}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(gguf_file([tensor("a")], [entry("split.no", 2, 0), COUNT]))
    other.write_bytes(gguf_file([tensor("b")], [*second]))
    return first


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ((COUNT,), "says that it is part 1 of 2, where part 2 of 2 is expected"),
        ((NO,), "says that it is part 2 of 0, where part 2 of 2 is expected"),
        ((NO, entry("split.count", STRING, "2")), "m-00002-of-00002.gguf: split.count is '2'"),
    ],
)
def test_a_second_part_that_does_not_say_what_it_is(tmp_path: Path, second: tuple[bytes, ...], words: str) -> None:
    with pytest.raises(HeaderError) as caught:
        describe(two_parts(tmp_path, *second))
    assert words in str(caught.value)
    assert str(caught.value.path).endswith("m-00002-of-00002.gguf")


def test_a_value_of_a_file_that_was_changed_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file([tensor("a")], [entry("k", ARRAY, (4, [1, 2]))]))
    metadata = describe(path).shards[0].metadata
    assert metadata["k"] == [1, 2]
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(FileChangedError) as caught:
        metadata["k"]
    assert caught.value.hint == "open the checkpoint again"
    assert caught.value.path == path
    assert caught.value.message == (
        f"{path}: the file was changed since its header was read, so that the value of 'k' is no longer where it was"
    )


def test_bytes_that_are_not_utf_8_come_back_from_the_file_as_they_were(tmp_path: Path) -> None:
    path, long = tmp_path / "model.gguf", b"\xff" * (64 << 10) + b"\xfe"
    entries = [entry("long", STRING, long), entry("list", ARRAY, (STRING, [b"\xffa", "b"]))]
    path.write_bytes(gguf_file([tensor("a")], entries))
    metadata = describe(path).shards[0].metadata
    assert os.fsencode(metadata["long"]) == long
    assert [*map(os.fsencode, metadata["list"])] == [b"\xffa", b"b"]


def test_arrays_inside_arrays_are_counted_over_all_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_values, "_INNER_ARRAYS_MAX", 3)
    path, inner = tmp_path / "model.gguf", (ARRAY, [(4, [1]), (4, [2])])
    path.write_bytes(gguf_file([tensor("a")], [entry("k", ARRAY, inner)]))
    describe(path)
    path.write_bytes(gguf_file([tensor("a")], [entry("k", ARRAY, inner), entry("l", ARRAY, inner)]))
    with pytest.raises(HeaderError, match="the value of 'l' brings the arrays inside arrays to 4, above 3"):
        describe(path)


def test_a_file_that_ends_in_the_length_of_an_array_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = gguf_file([], [entry("key", ARRAY, (4, []))], data=0, alignment=1)
    path.write_bytes(whole[:-1])
    with pytest.raises(TruncatedFileError, match="the value of 'key' at byte"):
        describe(path)


def test_a_header_that_ends_anywhere_says_in_what_it_ends(tmp_path: Path) -> None:
    """How much is needed at least is looked at first: 13 bytes for a key and 24 for a tensor."""
    name, key, word = "tensor.with.a.long.name", "key.with.a.long.name", "word.with.a.long.name"
    parts = [
        (8, "the version"),
        (16, "the number of tensors"),
        (24, "the number of metadata keys"),
        (24 + 2 * 13, "metadata of 2 keys"),
        (24 + 8 + len(key), "metadata key 0"),
        (24 + 8 + len(key) + 4 + 8, f"the value of '{key}'"),
    ]
    # What comes next ends so many bytes after what came before.
    for more, what in (
        (8 + len(word), "metadata key 1"),
        (4 + 8 + 5, f"the value of '{word}'"),
        (24, "a table of 1 tensors"),
        (8 + len(name) + 4 + 3 * 8 + 4 + 8 - 24, "the entry of tensor 0"),
    ):
        parts.append((parts[-1][0] + more, what))
    entries = [entry(key, 10, 7), entry(word, STRING, "value")]
    content = gguf_file([tensor(name, (4, 1, 1))], entries)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert describe(path).names == [name]
    for cut in range(5, parts[-1][0]):
        path.write_bytes(content[:cut])
        what = next(what for end, what in parts if cut < end)
        with pytest.raises(TruncatedFileError) as caught:
            describe(path)
        assert f"model.gguf: {what} at byte " in caught.value.message, cut
        assert caught.value.path == path


def test_a_tensor_without_dimensions_and_one_with_as_many_elements_as_can_be_counted(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file([tensor("scalar", ())], []))
    (only,) = describe(path)
    assert (only.shape, only.nbytes) == ((), 4)
    most = (1 << 63) - 1
    path.write_bytes(gguf_file([tensor("most", (most,))], []))
    with pytest.raises(TruncatedFileError, match=f"tensor 'most' takes {4 * most:,} bytes from byte 0 of the data"):
        describe(path)
    for ne in ((most + 1,), (most, 2), (0, most + 1)):
        path.write_bytes(gguf_file([tensor("more", ne)], []))
        with pytest.raises(HeaderError, match=r"tensor 'more' has shape .*, more elements than 63 bits can count"):
            describe(path)


def test_values_that_were_left_in_the_file_are_known(tmp_path: Path) -> None:
    path, long = tmp_path / "model.gguf", "x" * ((64 << 10) + 1)
    path.write_bytes(gguf_file([tensor("a")], [entry("long", STRING, long), entry("list", ARRAY, (4, [1, 2, 3]))]))
    metadata = describe(path).shards[0].metadata
    assert isinstance(metadata, gguf_values.GGUFMetadata)
    begin = 24 + 8 + 4 + 4
    assert metadata.stored("long") == gguf_values.StoredValue(begin, STRING, 0, len(long))
    behind = begin + 8 + len(long) + 8 + 4 + 4
    assert metadata.stored("list") == gguf_values.StoredValue(behind, ARRAY, 4, 3)
    assert metadata.stored("nothing") is None
    assert metadata["long"] == long


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("split.no", "x", "split.no is 'x'"),
        ("split.count", -1, "split.count is -1"),
        ("split.count", (1 << 16) + 1, "split.count is 65537"),
    ],
)
def test_a_part_alone_that_says_nonsense_is_named(tmp_path: Path, key: str, value: object, shown: str) -> None:
    keys = {"split.count": entry("split.count", 5, 2)}
    keys[key] = entry(key, STRING if isinstance(value, str) else 5, value)
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf_file([tensor("a")], list(keys.values())))
    with pytest.raises(HeaderError) as caught:
        describe(path)
    assert caught.value.message == f"{path}: {shown}"
    assert caught.value.path == path


def test_an_empty_text_may_be_the_last_thing_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for texts in ([""], ["a", ""], ["", "", ""]):
        path.write_bytes(gguf_file([], [entry("key", ARRAY, (STRING, texts))], data=0, alignment=1))
        assert describe(path).shards[0].metadata["key"] == texts
