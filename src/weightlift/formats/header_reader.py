"""Reading a binary header of unknown length through a small window that moves over the file.

Owns the bounds: nothing beyond the end of the file or the longest header is read, and what is skipped is not kept, so
memory stays bounded by the window and the longest single value, whatever the numbers in the header say.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NoReturn

from weightlift.errors import HeaderError, TruncatedFileError
from weightlift.formats.files import shown_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.formats.files import OpenFile

HEADER_BYTES_MAX: Final = 256 << 20
"""Longest header that is read. The largest vocabularies in use take some 20 MiB."""

_WINDOW_BYTES: Final = 1 << 20
_UINT32: Final = struct.Struct("<I")
_UINT64: Final = struct.Struct("<Q")
_DAMAGED: Final = "the file is damaged or was written by a faulty tool: fetch it again or convert it again"
_INCOMPLETE: Final = "the download or copy is incomplete: resume it or fetch the file again"


class HeaderReader:
    """A cursor over the little-endian numbers and strings of a header.

    Args:
        file: the open file.
        position: where to begin.
    """

    def __init__(self, file: OpenFile, position: int) -> None:
        self._file = file
        self._size = file.identity.size_bytes
        self._end = min(self._size, HEADER_BYTES_MAX)
        self._buffer = b""
        self._base = position
        self._at = 0

    @property
    def position(self) -> int:
        """Where in the file the next value begins."""
        return self._base + self._at

    @property
    def left(self) -> int:
        """Bytes between here and the end of the file, or of the longest header."""
        return self._end - self.position

    def refuse(self, message: str) -> NoReturn:
        """Raise :class:`HeaderError` for the file."""
        raise HeaderError(
            f"{shown_path(self._file.path)}: {message}", hint=_DAMAGED, path=self._file.path, offset=self.position
        )

    def require(self, length: int, what: str) -> None:
        """Check that ``length`` more bytes are there, without reading them.

        Args:
            length: how many bytes.
            what: what they are, for the message.

        Raises:
            TruncatedFileError: the file ends before.
            HeaderError: the header is longer than any that is read.
        """
        if length <= self.left:
            return
        shown = shown_path(self._file.path)
        if self._end < self._size:
            self.refuse(f"{what} ends {length - self.left:,} bytes behind the longest header read, {self._end:,} bytes")
        raise TruncatedFileError(
            f"{shown}: {what} at byte {self.position:,} takes {length:,} bytes but the file ends after {self.left:,} "
            f"(incomplete download?)",
            hint=_INCOMPLETE,
            path=self._file.path,
            offset=self.position,
            length=length,
        )

    def _fill(self, length: int, what: str) -> None:
        """Have ``length`` bytes from here in the window."""
        if self._at + length <= len(self._buffer):
            return
        self.require(length, what)
        self._base, self._at = self.position, 0
        self._buffer = self._file.read(self._base, min(max(length, _WINDOW_BYTES), self._size - self._base))

    def take(self, length: int, what: str) -> bytes:
        """The next ``length`` bytes."""
        self._fill(length, what)
        self._at += length
        return self._buffer[self._at - length : self._at]

    def uint32(self, what: str) -> int:
        """The next 4 bytes as a number."""
        self._fill(4, what)
        self._at += 4
        return int(_UINT32.unpack_from(self._buffer, self._at - 4)[0])

    def uint64(self, what: str) -> int:
        """The next 8 bytes as a number."""
        self._fill(8, what)
        self._at += 8
        return int(_UINT64.unpack_from(self._buffer, self._at - 8)[0])

    def string(self, what: str) -> bytes:
        """The next string: 8 bytes of length, then as many bytes."""
        return self.take(self.uint64(what), what)

    def strings(self, count: int, what: str) -> Iterator[bytes]:
        """The next ``count`` strings."""
        unpack = _UINT64.unpack_from
        while count:
            self._fill(8, what)
            buffer, at = self._buffer, self._at
            last, size = len(buffer) - 8, len(buffer)
            while count and at <= last:
                begin = at + 8
                end = begin + unpack(buffer, at)[0]
                if end > size:
                    break
                yield buffer[begin:end]
                at = end
                count -= 1
            self._at = at
            if count:
                yield self.string(what)
                count -= 1

    def skip(self, length: int, what: str) -> None:
        """Go past bytes without reading them."""
        self.require(length, what)
        self._at += length

    def skip_strings(self, count: int, what: str) -> None:
        """Go past strings, looking at nothing but their lengths."""
        self.require(8 * count, what)
        unpack = _UINT64.unpack_from
        while count:
            self._fill(8, what)
            buffer, at = self._buffer, self._at
            last, before = len(buffer) - 8, count
            while count and at <= last:
                at += 8 + unpack(buffer, at)[0]
                count -= 1
            assert count < before
            self.skip(at - self._at, what)
