"""A file of known contents and guarded memory for the conformance tests of engines.

Owns descriptors, mapping, staging slots and an arena in which every byte that an engine may not touch holds a guard
value. Knows nothing of plans.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from array import array
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import pytest

from weightlift.buffers import HostRegion, SlotPool
from weightlift.host import residency, storage, sweeping
from weightlift.operations import COPY_FIELDS, ChunkReady, CopyTable, Extent, ReadPath, ShardSource, Sink
from weightlift.staging import ALIGNMENT_SLACK_BYTES
from weightlift.testing.factory import tensor_bytes
from weightlift.testing.shapes import TensorSpec
from weightlift.units import MIB, PAGE_BYTES, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weightlift.device_operations import SlotMemory

FILE_BYTES: Final = 3 * MIB + 777
GUARD: Final = 0xA5

_ARENA_BYTES: Final = 16 * MIB
_PART_BYTES: Final = (1, 7, 4095, 5000, 65_536, 3)


def threads_now() -> int:
    """How many threads this process has."""
    if sys.platform == "linux":
        return len(os.listdir("/proc/self/task"))
    return threading.active_count()


class _Place(NamedTuple):
    """Where a range of the file has to arrive; ``whole_pages`` around it may be overwritten."""

    start: int
    offset: int
    length: int
    whole_pages: bool


class Landing:
    """What was handed over, compared with the file while it lay in its slot.

    Args:
        contents: the file.
    """

    def __init__(self, contents: bytes) -> None:
        self._contents = contents
        self._chunks: dict[int, list[tuple[int, int]]] = {}

    def take(self, chunk: ChunkReady) -> None:
        """Check a chunk's bytes and remember its range."""
        found = ctypes.string_at(chunk.address, chunk.length)
        assert found == self._contents[chunk.offset : chunk.offset + chunk.length], f"other bytes in {chunk}"
        self._chunks.setdefault(chunk.extent, []).append((chunk.offset, chunk.length))

    def check(self, extents: Sequence[Extent], chunk_bytes: int) -> None:
        """Check that these extents, in order of submission, were handed over once and in chunks of the size allowed."""
        assert len(self._chunks) == len(extents)
        for index, extent in zip(sorted(self._chunks), extents, strict=True):
            position = extent.offset
            for offset, length in sorted(self._chunks[index]):
                assert offset == position
                assert 0 < length <= chunk_bytes
                position += length
            assert position == extent.offset + extent.length


class Arena:
    """Memory in which every byte that an engine may not touch holds a guard value.

    Args:
        address: where it begins, on a page boundary or not.
        nbytes: its size.
        guard: what every byte holds.
        contents: the file that comes to lie in it.
    """

    def __init__(self, address: int, nbytes: int, guard: int, contents: bytes) -> None:
        self.address = address
        self._nbytes = nbytes
        self._guard = guard
        self._contents = contents
        self._places: list[_Place] = []
        self._cursor = 0

    def place(self, residue: int, length: int, *, whole_pages: bool, offset: int | None = None) -> int:
        """The address of a place for bytes of the file, congruent to ``residue`` from the arena's beginning.

        Args:
            residue: of the address, modulo the page size.
            length: bytes.
            whole_pages: whether the whole pages around may be overwritten.
            offset: where in the file the bytes are, ``residue`` by default.
        """
        start = self._cursor + residue % PAGE_BYTES
        self._cursor = align_up(start + length, PAGE_BYTES) + PAGE_BYTES
        assert self._cursor <= self._nbytes, "the arena is too small for this test"
        self._places.append(_Place(start, residue if offset is None else offset, length, whole_pages))
        return self.address + start

    def pack(self, parts: Sequence[tuple[int, int]]) -> list[int]:
        """Addresses for parts of the file, given as offset and length, one right behind the other."""
        first, addresses = self.place(0, sum(length for _, length in parts), whole_pages=False) - self.address, []
        del self._places[-1]
        for offset, length in parts:
            self._places.append(_Place(first, offset, length, whole_pages=False))
            addresses.append(self.address + first)
            first += length
        return addresses

    def scatter(self, offset: int, length: int) -> CopyTable:
        """A table that takes a range of the file apart into parts of odd sizes, with every third part left out."""
        numbers, position, number = array("Q", [0, 0, 0]), offset, 0
        while position < offset + length:
            part = min(_PART_BYTES[number % len(_PART_BYTES)], offset + length - position)
            if number % 3 != 2:
                address = self.place(position + number, part, whole_pages=False, offset=position)
                numbers.extend((position, part, address))
            position += part
            number += 1
        # The table does not begin at its array's first entry.
        return CopyTable(numbers, 1, len(numbers) // COPY_FIELDS - 1)

    def check(self) -> None:
        """Check that every place holds its bytes and that no other byte was touched."""
        found = ctypes.string_at(self.address, self._nbytes)
        expected = bytearray([self._guard]) * self._nbytes
        for place in self._places:
            if place.whole_pages:
                first, end = align_down(place.start, PAGE_BYTES), align_up(place.start + place.length, PAGE_BYTES)
                expected[first:end] = found[first:end]
            expected[place.start : place.start + place.length] = self._contents[
                place.offset : place.offset + place.length
            ]
        if found != expected:
            wrong = next(index for index in range(self._nbytes) if found[index] != expected[index])
            where = [place for place in self._places if place.start <= wrong < place.start + place.length]
            raise AssertionError(
                f"byte {wrong} of the arena is {found[wrong]:#x} and not {expected[wrong]:#x}: "
                f"{where or 'it belongs to nobody'}"
            )


class Bench:
    """The file, its descriptors, and memory.

    Args:
        folder: where the file is written.

    Attributes:
        contents: what the file holds.
        source: the file as engines see it; tests replace it by one that lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "contents"
        self.contents = tensor_bytes(TensorSpec("contents", "U8", (FILE_BYTES,)))
        self.path.write_bytes(self.contents)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._region = HostRegion(_ARENA_BYTES)
        ctypes.memset(self._region.address, GUARD, _ARENA_BYTES)
        self._arena = Arena(self._region.address, _ARENA_BYTES, GUARD, self.contents)
        access = storage.probe_direct(self.path)
        self._direct_reason = access.reason
        descriptor = self.descriptor(self.path)
        direct = self.descriptor(self.path, os.O_RDONLY | os.O_DIRECT) if access.supported else -1
        mapping = mmap.mmap(descriptor, FILE_BYTES, access=mmap.ACCESS_COPY)
        self._stack.callback(mapping.close)
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(mapping))
        alignment = access.offset_alignment if access.supported else PAGE_BYTES
        self.source = ShardSource(descriptor, direct, FILE_BYTES, alignment, address)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def descriptor(self, path: Path, flags: int = os.O_RDONLY) -> int:
        """An open descriptor, closed with the bench."""
        descriptor = os.open(path, flags)
        self._stack.callback(os.close, descriptor)
        return descriptor

    def pool(self, count: int, chunk_bytes: int) -> SlotMemory:
        """Slots that chunks of a size fit in."""
        pool = SlotPool(count, chunk_bytes + ALIGNMENT_SLACK_BYTES)
        self._stack.callback(pool.close)
        return pool.memory

    def require(self, path: ReadPath) -> None:
        """Skip the test where the file system has no such path."""
        if path is ReadPath.DIRECT and self.source.direct_descriptor < 0:
            pytest.skip(self._direct_reason)

    def refuses_odd_direct_reads(self) -> bool:
        """Whether the file system really minds the alignment of direct reads."""
        try:
            os.preadv(self.source.direct_descriptor, [bytearray(PAGE_BYTES)], 1)
        except OSError:
            return True
        return False

    def evict(self) -> None:
        """Empty the page cache of the file and switch read-ahead off, or skip the test where that cannot be done."""
        descriptor = self.source.descriptor
        if not hasattr(os, "posix_fadvise"):
            pytest.skip(f"{sys.platform} cannot drop a file from the page cache")
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.fsync(descriptor)
        sweeping.sweep(descriptor, [(0, FILE_BYTES)])
        if residency.residency(descriptor, FILE_BYTES) != 0:
            pytest.skip(f"the file system under {self.folder} keeps pages it is asked to drop, or will not tell")

    def extent(self, path: ReadPath, sink: Sink, offset: int, length: int, *, fresh: bool = False) -> Extent:
        """An extent over a range of the file, with a place in the arena where its sink needs one."""
        extent = Extent(0, path, sink, offset, length, fresh=fresh)
        if sink is Sink.PLACE:
            return extent._replace(address=self._arena.place(offset, length, whole_pages=path is ReadPath.DIRECT))
        if sink is Sink.COPY:
            return extent._replace(copies=self._arena.scatter(offset, length))
        return extent

    def check_memory(self) -> None:
        """Check that every place holds its bytes and that no other byte of the arena was touched."""
        self._arena.check()

    def check_chunk(self, chunk: ChunkReady) -> None:
        """Check that a chunk still lies in its slot."""
        found = ctypes.string_at(chunk.address, chunk.length)
        assert found == self.contents[chunk.offset : chunk.offset + chunk.length], f"{chunk} was overwritten"
