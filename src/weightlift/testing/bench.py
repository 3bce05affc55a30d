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
from weightlift.host import residency, storage
from weightlift.operations import ChunkReady, CopyTable, Extent, ReadPath, ShardSource, Sink
from weightlift.staging import ALIGNMENT_SLACK_BYTES
from weightlift.testing.factory import tensor_bytes
from weightlift.testing.shapes import TensorSpec
from weightlift.units import MIB, PAGE_BYTES, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from weightlift.operations import SlotMemory

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
        self._places: list[_Place] = []
        self._cursor = 0

    def __enter__(self) -> Self:
        self._arena = HostRegion(_ARENA_BYTES)
        ctypes.memset(self._arena.address, GUARD, _ARENA_BYTES)
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
        residency.sweep(descriptor, [(0, FILE_BYTES)])
        if residency.residency(descriptor, FILE_BYTES) != 0:
            pytest.skip(f"the file system under {self.folder} keeps pages it is asked to drop, or will not tell")

    def extent(self, path: ReadPath, sink: Sink, offset: int, length: int, *, fresh: bool = False) -> Extent:
        """An extent over a range of the file, with a place in the arena where its sink needs one."""
        extent = Extent(0, path, sink, offset, length, fresh=fresh)
        if sink is Sink.PLACE:
            start = self._place(offset, length, whole_pages=path is ReadPath.DIRECT)
            return extent._replace(address=self._arena.address + start)
        if sink is Sink.COPY:
            entries = list(self._parts(offset, length))
            numbers = array("Q", [0, 0, 0] + [number for entry in entries for number in entry])
            # The table does not begin at its array's first entry.
            return extent._replace(copies=CopyTable(numbers, 1, len(entries)))
        return extent

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Copies of parts of a range, with every third part left out."""
        position, number = offset, 0
        while position < offset + length:
            part = min(_PART_BYTES[number % len(_PART_BYTES)], offset + length - position)
            if number % 3 != 2:
                yield (
                    position,
                    part,
                    self._arena.address + self._place(position + number, part, whole_pages=False, offset=position),
                )
            position += part
            number += 1

    def _place(self, residue: int, length: int, *, whole_pages: bool, offset: int | None = None) -> int:
        start = self._cursor + residue % PAGE_BYTES
        self._cursor = align_up(start + length, PAGE_BYTES) + PAGE_BYTES
        assert self._cursor <= _ARENA_BYTES, "the arena is too small for this test"
        self._places.append(_Place(start, residue if offset is None else offset, length, whole_pages))
        return start

    def check_memory(self) -> None:
        """Check that every place holds its bytes and that no other byte of the arena was touched."""
        found = ctypes.string_at(self._arena.address, _ARENA_BYTES)
        expected = bytearray([GUARD]) * _ARENA_BYTES
        for place in self._places:
            if place.whole_pages:
                first, end = align_down(place.start, PAGE_BYTES), align_up(place.start + place.length, PAGE_BYTES)
                expected[first:end] = found[first:end]
            expected[place.start : place.start + place.length] = self.contents[
                place.offset : place.offset + place.length
            ]
        if found != expected:
            wrong = next(index for index in range(_ARENA_BYTES) if found[index] != expected[index])
            where = [place for place in self._places if place.start <= wrong < place.start + place.length]
            raise AssertionError(f"byte {wrong} of the arena is wrong: {where or 'it belongs to nobody'}")

    def check_chunk(self, chunk: ChunkReady) -> None:
        """Check that a chunk still lies in its slot."""
        found = ctypes.string_at(chunk.address, chunk.length)
        assert found == self.contents[chunk.offset : chunk.offset + chunk.length], f"{chunk} was overwritten"
