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
