"""The directory of a zip archive: read as ``zipfile`` reads it, and refused where its numbers are not possible."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import TYPE_CHECKING

import pytest

from weightlift.errors import HeaderError, NotACheckpointError, TruncatedFileError
from weightlift.formats.files import open_file
from weightlift.formats.zip_directory import ZipEntry, read_directory

if TYPE_CHECKING:
    from pathlib import Path

UINT16, UINT32 = 0xFFFF, 0xFFFFFFFF


def read(folder: Path, content: bytes) -> dict[str, ZipEntry]:
    path = folder / "model.pt"
    path.write_bytes(content)
    with open_file(path) as file:
        return read_directory(file)


def entry(name: str, *, size: int = 4, packed: int | None = None, offset: int = 0, extra: bytes = b"") -> bytes:
    """One entry of a directory, stored as it is; sizes and position of the full 32 bits stand in ``extra``."""
    fields = (20, 20, 0, 0, 0, 0, 0, size if packed is None else packed, size, len(name), len(extra), 0, 0, 0, 0)
    return struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fields, offset) + name.encode() + extra


def field(kind: int, *numbers: int) -> bytes:
    """An extra field of 64-bit numbers."""
    return struct.pack(f"<2H{len(numbers)}Q", kind, 8 * len(numbers), *numbers)


def ended(directory: bytes, *, count: int, disk: int = 0, size: int | None = None, comment: bytes = b"") -> bytes:
    """A directory at the beginning of a file, and what ends it."""
    numbers = (disk, disk, count, count, len(directory) if size is None else size, 0, len(comment))
    return directory + struct.pack("<4s4H2LH", b"PK\x05\x06", *numbers) + comment


def ended_in_64_bits(
    directory: bytes,
    *,
    count: int,
    size: int | None = None,
    at: int | None = None,
    magic: bytes = b"PK\x06\x06",
    short: tuple[int, int] = (UINT16, UINT32),
) -> bytes:
    """The same as archives of more than 4 GiB or 65,535 entries have it; ``short`` is said in 16 and 32 bits."""
    nbytes = len(directory) if size is None else size
    end = struct.pack("<4sQ2H2L4Q", magic, 44, 45, 45, 0, 0, count, count, nbytes, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(directory) if at is None else at, 1)
    return directory + end + locator + ended(b"", count=short[0], size=short[1])


def test_the_directory_is_what_zipfile_wrote(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("m/data.pkl", b"x" * 300)
        file.writestr("m/data/0", b"", zipfile.ZIP_STORED)
        file.writestr("m/packed", b"y" * 300, zipfile.ZIP_DEFLATED)
        expected = {
            info.filename: (info.header_offset, info.file_size, info.compress_type == zipfile.ZIP_STORED)
            for info in file.infolist()
        }
    found = read(tmp_path, stream.getvalue())
    assert {name: tuple(item[1:]) for name, item in found.items()} == expected


@pytest.mark.parametrize(
    "comment",
    [b"about the weights", b"PK\x05\x06", b"PK\x05\x06 twice, and PK\x05\x06", b"PK\x05\x06" + b"\xff" * 40],
    ids=["none", "short", "two", "of impossible length"],
)
def test_what_looks_like_the_end_inside_the_comment_is_passed_over(tmp_path: Path, comment: bytes) -> None:
    assert list(read(tmp_path, ended(entry("a"), count=1, comment=comment))) == ["a"]


def test_numbers_of_64_bits_are_found_among_other_extra_fields(tmp_path: Path) -> None:
    other = field(0x5855, 1, 2)
    directory = entry("a", size=UINT32, offset=UINT32, extra=other + field(1, 5 << 32, 5 << 32, 7 << 32))
    directory += entry("b", offset=UINT32, extra=field(1, 9 << 32) + other)
    found = read(tmp_path, ended(directory, count=2))
    assert found["a"] == ZipEntry("a", 7 << 32, 5 << 32, stored=True)
    assert found["b"] == ZipEntry("b", 9 << 32, 4, stored=True)


@pytest.mark.parametrize(
    "extra",
    [b"", b"\1", field(0x5855, 1), field(1), field(1, 4), field(0x5855, 1) + field(1, 4)],
    ids=["none", "cut", "another", "empty", "too short", "too short behind another"],
)
def test_numbers_of_64_bits_that_are_not_there(tmp_path: Path, extra: bytes) -> None:
    directory = entry("a", size=UINT32, extra=extra)
    with pytest.raises(HeaderError, match="entry 'a' has 64-bit numbers in an extra field that is not there"):
        read(tmp_path, ended(directory, count=1))


def test_a_directory_that_ends_in_64_bits(tmp_path: Path) -> None:
    directory = entry("a") + entry("b", offset=3)
    assert list(read(tmp_path, ended_in_64_bits(directory, count=2))) == ["a", "b"]
    with pytest.raises(HeaderError, match=r"64-bit directory end at byte 4,096 is beyond the place that names it"):
        read(tmp_path, ended_in_64_bits(directory, count=2, at=4096))
    with pytest.raises(HeaderError, match=f"no 64-bit directory end at byte {len(directory)}"):
        read(tmp_path, ended_in_64_bits(directory, count=2, magic=b"PK\0\0"))


def test_the_largest_numbers_of_32_bits_may_be_meant(tmp_path: Path) -> None:
    """Without a 64-bit end before it, the end of the directory means what it says."""
    with pytest.raises(HeaderError, match="65,535 entries in 47 bytes"):
        read(tmp_path, ended(entry("a"), count=UINT16))
    with pytest.raises(HeaderError, match="65,535 entries in 0 bytes"):
        read(tmp_path, ended(b"", count=UINT16))


def test_a_part_of_an_archive_of_several(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match=r"model\.pt: part 3 of a zip archive of several\nhint: join"):
        read(tmp_path, ended(entry("a"), count=1, disk=2))


def test_a_directory_with_fewer_entries_than_it_says(tmp_path: Path) -> None:
    directory = entry("a" * 40) + entry("b" * 40)
    with pytest.raises(HeaderError, match="its directory ends after 2 of 3 entries"):
        read(tmp_path, ended(directory, count=3))


def test_a_name_that_is_there_twice(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="entry 'm/data/0' is there twice"):
        read(tmp_path, ended(entry("m/data/0") + entry("m/data/0", offset=50), count=2))


def test_a_name_longer_than_the_directory(tmp_path: Path) -> None:
    directory = entry("a" * 100)[:90]
    with pytest.raises(HeaderError, match="its directory is no directory at byte 0 of 90"):
        read(tmp_path, ended(directory, count=1))


def test_sizes_that_differ_though_nothing_is_compressed(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="entry 'a' is stored as it is, but in 3 bytes instead of 4"):
        read(tmp_path, ended(entry("a", packed=3), count=1))


def test_a_file_without_an_end(tmp_path: Path) -> None:
    with pytest.raises(TruncatedFileError, match="no directory at its end"):
        read(tmp_path, entry("a"))


def test_numbers_of_64_bits_count_where_one_of_the_short_ones_has_no_room(tmp_path: Path) -> None:
    directory = entry("a") + entry("b", offset=3)
    for short in ((UINT16, UINT32), (UINT16, 7), (7, UINT32)):
        assert list(read(tmp_path, ended_in_64_bits(directory, count=2, short=short))) == ["a", "b"]
    assert list(read(tmp_path, ended_in_64_bits(directory, count=2, short=(1, len(entry("a")))))) == ["a"]


def test_a_directory_of_as_many_entries_and_bytes_as_are_read(tmp_path: Path) -> None:
    """These are beyond the end of the file, which is looked at next."""
    path, entries_max, bytes_max = tmp_path / "model.pt", 1 << 20, 128 << 20
    for count, size, is_read in (
        (entries_max, 46 * entries_max, True),
        (entries_max, 46 * entries_max - 1, False),
        (entries_max + 1, bytes_max, False),
        (1, bytes_max, True),
        (1, bytes_max + 1, False),
    ):
        with pytest.raises(HeaderError) as caught:
            read(tmp_path, ended_in_64_bits(entry("a"), count=count, size=size))
        beyond = f"its directory of {size:,} bytes at byte 0 is beyond the end of the file"
        never = f"its directory has {count:,} entries in {size:,} bytes, which is beyond what is read or possible"
        assert caught.value.message == f"{path}: {beyond if is_read else never}"


def test_an_entry_without_a_name(tmp_path: Path) -> None:
    assert list(read(tmp_path, ended(entry(""), count=1))) == [""]
