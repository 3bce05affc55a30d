"""The directory of a zip archive whose entries are stored uncompressed: where in the file each of them lies.

Owns as much of the zip format (PKWARE's APPNOTE 6.3) as checkpoints use, its 64-bit extension included. Names, sizes
and positions are checked against the file and each other; nothing is unpacked.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from weightlift.errors import HeaderError, NotACheckpointError, TruncatedFileError, printable
from weightlift.formats.files import ZIP_MAGIC, shown_path

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.formats.files import OpenFile

_DIRECTORY_BYTES_MAX: Final = 128 << 20
_ENTRIES_MAX: Final = 1 << 20
_COMMENT_BYTES_MAX: Final = 0xFFFF
_END: Final = struct.Struct("<4s4H2LH")
_END_MAGIC: Final = b"PK\x05\x06"
_LOCATOR: Final = struct.Struct("<4sLQL")
_LOCATOR_MAGIC: Final = b"PK\x06\x07"
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_END64_MAGIC: Final = b"PK\x06\x06"
_ENTRY: Final = struct.Struct("<4s6H3L5H2L")
_ENTRY_MAGIC: Final = b"PK\x01\x02"
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_ZIP64_FIELD: Final = 1
_ENCRYPTED: Final = 1
_STORED: Final = 0
_UINT16_MAX: Final = 0xFFFF
_UINT32_MAX: Final = 0xFFFFFFFF
_DAMAGED: Final = "the file is damaged or was written by a faulty tool: fetch it again or save it again"
_INCOMPLETE: Final = "the download or copy is incomplete: resume it or fetch the file again"


class ZipEntry(NamedTuple):
    """One entry of the archive, as its directory says.

    Attributes:
        name: its name.
        header_offset: where its local header begins.
        nbytes: its size.
        stored: it is neither compressed nor encrypted.
    """

    name: str
    header_offset: int
    nbytes: int
    stored: bool


def read_directory(file: OpenFile) -> dict[str, ZipEntry]:
    """The entries of an open zip archive, by name.

    Raises:
        NotACheckpointError: the file only begins like an archive.
        HeaderError: the directory breaks a rule.
        TruncatedFileError: the file has no directory at its end.
        FileChangedError: the file became shorter while it was read.
    """
    count, size, offset = _find_directory(file)
    path = file.path
    if size > _DIRECTORY_BYTES_MAX or count > _ENTRIES_MAX or count * _ENTRY.size > size:
        _refuse(
            path, f"its directory has {count:,} entries in {size:,} bytes, which is beyond what is read or possible"
        )
    if offset + size > file.identity.size_bytes:
        _refuse(path, f"its directory of {size:,} bytes at byte {offset:,} is beyond the end of the file")
    raw, at = file.read(offset, size), 0
    entries: dict[str, ZipEntry] = {}
    for _ in range(count):
        if at + _ENTRY.size > size:
            _refuse(path, f"its directory ends after {len(entries):,} of {count:,} entries")
        entry, at = _read_entry(path, raw, at)
        if entry.name in entries:
            _refuse(path, f"entry '{printable(entry.name)}' is there twice")
        entries[entry.name] = entry
    return entries


def _refuse(path: Path, message: str) -> NoReturn:
    raise HeaderError(f"{shown_path(path)}: {message}", hint=_DAMAGED, path=path)


def _find_directory(file: OpenFile) -> tuple[int, int, int]:
    """How many entries the directory has, its size, and where it begins."""
    size, path = file.identity.size_bytes, file.path
    tail_bytes = min(size, _END.size + _COMMENT_BYTES_MAX)
    tail = file.read(size - tail_bytes, tail_bytes)
    at = tail.rfind(_END_MAGIC)
    while at >= 0 and (at + _END.size > len(tail) or at + _END.size + _END.unpack_from(tail, at)[7] > len(tail)):
        at = tail.rfind(_END_MAGIC, 0, at)
    if at < 0:
        raise TruncatedFileError(
            f"{shown_path(path)}: begins like a PyTorch checkpoint (a zip archive) and has no directory at its end "
            f"(incomplete download?)",
            hint=_INCOMPLETE,
            path=path,
            offset=size,
        )
    _, disk, first_disk, _, count, directory_bytes, offset, _ = _END.unpack_from(tail, at)
    if count == _UINT16_MAX or _UINT32_MAX in (directory_bytes, offset):
        found = _find_directory64(file, size - tail_bytes + at - _LOCATOR.size)
        if found is not None:
            return found
    if disk or first_disk:
        raise NotACheckpointError(
            f"{shown_path(path)}: part {disk + 1} of a zip archive of several", hint="join the parts first", path=path
        )
    return count, directory_bytes, offset


def _find_directory64(file: OpenFile, locator_at: int) -> tuple[int, int, int] | None:
    if locator_at < 0:
        return None
    magic, _, at, _ = _LOCATOR.unpack(file.read(locator_at, _LOCATOR.size))
    if magic != _LOCATOR_MAGIC:
        return None
    if at + _END64.size > locator_at:
        _refuse(file.path, f"its 64-bit directory end at byte {at:,} is beyond the place that names it")
    magic, _, _, _, _, _, _, count, size, offset = _END64.unpack(file.read(at, _END64.size))
    if magic != _END64_MAGIC:
        _refuse(file.path, f"there is no 64-bit directory end at byte {at:,}, where there should be one")
    return count, size, offset


def _read_entry(path: Path, raw: bytes, at: int) -> tuple[ZipEntry, int]:
    """One entry of the directory, and where the next begins."""
    fields = _ENTRY.unpack_from(raw, at)
    magic, flags, method, packed, size = fields[0], fields[3], fields[4], fields[8], fields[9]
    name_bytes, extra_bytes, comment_bytes, offset = fields[10], fields[11], fields[12], fields[16]
    begin = at + _ENTRY.size
    end = begin + name_bytes + extra_bytes + comment_bytes
    if magic != _ENTRY_MAGIC or end > len(raw):
        _refuse(path, f"its directory is no directory at byte {at:,} of {len(raw):,}")
    name = raw[begin : begin + name_bytes].decode("utf-8", "surrogateescape")
    extra = raw[begin + name_bytes : begin + name_bytes + extra_bytes]
    size, packed, offset = _with_64_bits(path, name, extra, (size, packed, offset))
    stored = method == _STORED and not flags & _ENCRYPTED
    if stored and packed != size:
        _refuse(path, f"entry '{printable(name)}' is stored as it is, but in {packed:,} bytes instead of {size:,}")
    return ZipEntry(name, offset, size, stored), end


def _with_64_bits(path: Path, name: str, extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, int, int]:
    """Size, packed size and position, from the extra field where the entry has no room for them."""
    if _UINT32_MAX not in numbers:
        return numbers
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == _ZIP64_FIELD:
            wide = extra[at + 4 : at + 4 + length]
            wanted = numbers.count(_UINT32_MAX)
            if len(wide) < 8 * wanted:
                break
            found = iter(struct.unpack_from(f"<{wanted}Q", wide))
            size, packed, offset = (next(found) if number == _UINT32_MAX else number for number in numbers)
            return size, packed, offset
        at += 4 + length
    _refuse(path, f"entry '{printable(name)}' has 64-bit numbers in an extra field that is not there")


def data_offset(file: OpenFile, entry: ZipEntry, what: str) -> int:
    """Where the bytes of a stored entry begin.

    Args:
        file: the open archive.
        entry: the entry.
        what: what it holds, for messages.

    Raises:
        HeaderError: it is compressed or encrypted, or is not where the directory says.
        TruncatedFileError: it ends behind the end of the file.
    """
    path, size = file.path, file.identity.size_bytes
    shown = printable(entry.name)
    if not entry.stored:
        raise HeaderError(
            f"{shown_path(path)}: {what} ('{shown}') is compressed or encrypted, so that its bytes are not in the file "
            f"as they are",
            hint="save the checkpoint again with torch.save, which does not compress",
            path=path,
        )
    if entry.header_offset + _LOCAL.size > size:
        _refuse(path, f"{what} ('{shown}') is said to be at byte {entry.header_offset:,}, but the file has {size:,}")
    local = _LOCAL.unpack(file.read(entry.header_offset, _LOCAL.size))
    name_bytes, extra_bytes = local[9], local[10]
    begin: int = entry.header_offset + _LOCAL.size + name_bytes + extra_bytes
    name_end = entry.header_offset + _LOCAL.size + name_bytes
    raw_name = entry.name.encode("utf-8", "surrogateescape")
    found = file.read(name_end - name_bytes, name_bytes) if name_end <= size and name_bytes == len(raw_name) else b""
    if local[0] != ZIP_MAGIC or found != raw_name:
        _refuse(path, f"{what} ('{shown}') is not at byte {entry.header_offset:,}, where the directory says")
    if begin + entry.nbytes > size:
        raise TruncatedFileError(
            f"{shown_path(path)}: {what} ('{shown}') takes {entry.nbytes:,} bytes from byte {begin:,}; the file has "
            f"{size:,} (incomplete download?)",
            hint=_INCOMPLETE,
            path=path,
            offset=begin,
            length=entry.nbytes,
        )
    return begin
