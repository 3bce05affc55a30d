"""Moving one chunk, for the Python engine: read it by its path, retry what is short, put it where it belongs.

Everything here runs outside the engine's lock and touches only the chunk's own slot and destination.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import time
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weightlift.operations import COPY_FIELDS, Extent, Failure, FailureKind, ReadPath, ShardSource, Sink, SlotMemory
from weightlift.units import PAGE_BYTES, align_down, align_up

if TYPE_CHECKING:
    from weightlift.engines.reader import Reader

_DIRECT_REFUSED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EFAULT})


@dataclass(frozen=True, slots=True)
class Chunk:
    """A claimed chunk.

    Attributes:
        extent: the extent it is part of.
        index: the extent's number.
        slot: the slot it was claimed with, -1 if it needs none.
        offset: first byte in the file.
        length: bytes.
    """

    extent: Extent
    index: int
    slot: int
    offset: int
    length: int

    @property
    def ends_extent(self) -> bool:
        """No chunk of the extent comes behind this one."""
        return self.offset + self.length == self.extent.offset + self.extent.length


@dataclass(slots=True)
class Outcome:
    """What one chunk's move did; mutable because it is filled in step by step by one worker."""

    delta: int = 0
    refused_bytes: int = 0
    refused_errno: int = 0
    storage_seconds: float = 0.0
    cache_seconds: float = 0.0
    copy_seconds: float = 0.0
    failure: Failure | None = None


class _EndOfFileError(Exception):
    """The file ended at ``offset``; internal to the engine."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")


class Mover:
    """Moves chunks with one reader.

    Args:
        shards: the open shards.
        slots: the staging memory.
        reader: how bytes are asked for.
    """

    def __init__(self, shards: tuple[ShardSource, ...], slots: SlotMemory, reader: Reader) -> None:
        self._shards = shards
        self._slots = slots
        self._reader = reader
        self._own: tuple[int, ShardSource] | None = None

    def for_worker(self) -> Mover:
        """A mover of one worker's own, which reads lanes with descriptors of its own; to be closed by it."""
        return Mover(self._shards, self._slots, self._reader)

    def close(self) -> None:
        """Close the worker's own descriptor."""
        if self._own is not None:
            os.close(self._own[1].descriptor)
            self._own = None

    def _source(self, extent: Extent) -> ShardSource:
        """The shard, for lanes with a descriptor that no other worker's reads move the read-ahead of."""
        shared = self._shards[extent.shard]
        if not extent.lane or sys.platform != "linux":
            return shared
        if self._own is None or self._own[0] != extent.shard:
            self.close()
            try:
                own = os.open(f"/proc/self/fd/{shared.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return shared
            self._own = (extent.shard, shared._replace(descriptor=own))
        return self._own[1]

    def move(self, chunk: Chunk) -> Outcome:
        """Read a chunk and put it where it belongs; what failed is told in the outcome."""
        extent, outcome = chunk.extent, Outcome()
        shard = self._source(extent)
        if extent.sink is Sink.PLACE:
            address = extent.address + chunk.offset - extent.offset
        else:
            outcome.delta = chunk.offset % shard.offset_alignment if extent.path is ReadPath.DIRECT else 0
            address = self._slots.address + chunk.slot * self._slots.slot_bytes + outcome.delta
        start = time.monotonic()
        try:
            self._read(shard, extent.path, address, chunk, outcome)
        except _EndOfFileError as end:
            outcome.failure = Failure(chunk.index, FailureKind.END_OF_FILE, 0, end.offset, chunk.length)
            return outcome
        except OSError as err:
            number = err.errno or errno.EIO
            outcome.failure = Failure(chunk.index, FailureKind.READ, number, chunk.offset, chunk.length)
            return outcome
        read = time.monotonic()
        if extent.resident:
            outcome.cache_seconds = read - start
        else:
            outcome.storage_seconds = read - start
        if extent.drop_behind:
            self._drop(shard, chunk)
        if extent.copies is not None:
            self._copy_out(extent, chunk, address)
            outcome.copy_seconds = time.monotonic() - read
        return outcome

    def _read(self, shard: ShardSource, path: ReadPath, address: int, chunk: Chunk, outcome: Outcome) -> None:
        if path is ReadPath.DIRECT:
            self._read_direct(shard, address, chunk, outcome)
        elif path is ReadPath.MAPPED:
            if chunk.offset + chunk.length > shard.size_bytes:
                raise _EndOfFileError(shard.size_bytes)
            ctypes.memmove(address, shard.mapping_address + chunk.offset, chunk.length)
        else:
            self._read_cached(shard, path, _memory(address, chunk.length), chunk.offset)

    def _ask(self, shard: ShardSource, path: ReadPath, buffer: memoryview, offset: int) -> int:
        """The one place where EINTR is retried: the system reader never shows it (PEP 475), others may."""
        while True:
            try:
                return self._reader.read_into(shard, path, buffer, offset)
            except InterruptedError:
                continue

    def _read_cached(self, shard: ShardSource, path: ReadPath, buffer: memoryview, offset: int) -> None:
        """The one place where short reads of the page cache are retried."""
        done = 0
        while done < len(buffer):
            got = self._ask(shard, path, buffer[done:], offset + done)
            if got == 0:
                raise _EndOfFileError(offset + done)
            done += got

    def _read_direct(self, shard: ShardSource, address: int, chunk: Chunk, outcome: Outcome) -> None:
        alignment = shard.offset_alignment
        wanted_end = chunk.offset + chunk.length
        begin, end = align_down(chunk.offset, alignment), align_up(wanted_end, alignment)
        blocks = _memory(address - (chunk.offset - begin), end - begin)
        done = begin
        while done < wanted_end:
            try:
                got = self._ask(shard, ReadPath.DIRECT, blocks[done - begin :], done)
            except OSError as err:
                if err.errno not in _DIRECT_REFUSED:
                    raise
                outcome.refused_errno = err.errno
            else:
                if got == 0:
                    raise _EndOfFileError(done)
                done += got
                if done >= wanted_end or done % alignment == 0:
                    continue
            # Refused, or stopped at a position that no further direct read may start at.
            rest = max(done, chunk.offset)
            outcome.refused_bytes = wanted_end - rest
            self._read_cached(shard, ReadPath.BUFFERED, blocks[rest - begin : wanted_end - begin], rest)
            return

    @staticmethod
    def _drop(shard: ShardSource, chunk: Chunk) -> None:
        if hasattr(os, "posix_fadvise"):
            first = align_down(chunk.offset, PAGE_BYTES)
            length = chunk.offset + chunk.length - first
            os.posix_fadvise(shard.descriptor, first, length, os.POSIX_FADV_DONTNEED)

    @staticmethod
    def _copy_out(extent: Extent, chunk: Chunk, address: int) -> None:
        assert extent.copies is not None
        numbers, first, count = extent.copies.numbers, extent.copies.first, extent.copies.count
        entries = range(first, first + count)
        chunk_end = chunk.offset + chunk.length

        def end_of(entry: int) -> int:
            return numbers[entry * COPY_FIELDS] + numbers[entry * COPY_FIELDS + 1]

        for entry in entries[bisect_right(entries, chunk.offset, key=end_of) :]:
            offset, length, destination = numbers[entry * COPY_FIELDS : entry * COPY_FIELDS + COPY_FIELDS]
            if offset >= chunk_end:
                break
            start, stop = max(offset, chunk.offset), min(offset + length, chunk_end)
            ctypes.memmove(destination + start - offset, address + start - chunk.offset, stop - start)
