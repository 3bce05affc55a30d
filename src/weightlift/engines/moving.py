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

from weightlift.operations import COPY_FIELDS, Extent, Failure, FailureKind, ReadPath, ShardSource, Sink, Stage
from weightlift.units import PAGE_BYTES, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.device_operations import SlotMemory
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
        submissions: how often extents had been submitted when it was claimed.
    """

    extent: Extent
    index: int
    slot: int
    offset: int
    length: int
    submissions: int = 0

    @property
    def ends_extent(self) -> bool:
        """No chunk of the extent comes behind this one."""
        return self.offset + self.length == self.extent.offset + self.extent.length

    @property
    def keeps_slot(self) -> bool:
        """Its slot is that of the lane's next chunk, too; a copy to a device has to leave the slot first."""
        return self.slot >= 0 and self.extent.lane and self.extent.sink is not Sink.DEVICE and not self.ends_extent


def runs_of(chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """Where the parts of a chunk go: offset in the file, destination address and bytes of each.

    Entries of the copy table that follow each other in the file and at their destination make one part. Not so on
    devices: they may lie in allocations that happen to be neighbours, and a copy that spans two is refused.
    """
    copies = chunk.extent.copies
    assert copies is not None
    joins = chunk.extent.sink is not Sink.DEVICE
    numbers, entries = copies.numbers, range(copies.first, copies.first + copies.count)
    chunk_end = chunk.offset + chunk.length

    def end_of(entry: int) -> int:
        return numbers[entry * COPY_FIELDS] + numbers[entry * COPY_FIELDS + 1]

    begin, destination, end = chunk.offset, 0, chunk.offset
    for entry in entries[bisect_right(entries, chunk.offset, key=end_of) :]:
        offset, length, address = numbers[entry * COPY_FIELDS : entry * COPY_FIELDS + COPY_FIELDS]
        if offset >= chunk_end:
            break
        if not joins or offset != end or address != destination + end - begin or end == begin:
            if end > begin:
                yield begin, destination, end - begin
            begin = max(offset, chunk.offset)
            destination = address + begin - offset
        end = min(offset + length, chunk_end)
    if end > begin:
        yield begin, destination, end - begin


class Doing:
    """What a worker is at, and since when; replaced as a whole, so that others may look without a lock."""

    def __init__(self) -> None:
        self.enter(Stage.READING)

    def enter(self, stage: Stage) -> None:
        """Say that the next stage begins."""
        self.now = (stage, time.monotonic())


@dataclass(slots=True)
class Outcome:
    """What one chunk's move did; mutable because it is filled in step by step by one worker."""

    begun: float = 0.0
    copies_begun: float = 0.0
    delta: int = 0
    refused_bytes: int = 0
    refused_errno: int = 0
    storage_seconds: float = 0.0
    cache_seconds: float = 0.0
    copy_seconds: float = 0.0
    device_seconds: float = 0.0
    register_seconds: float = 0.0
    copying: bool = False
    failure: Failure | None = None


class _EndOfFileError(Exception):
    """The file ended at ``offset``; internal to the engine."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")


class Mover:
    """Moves chunks between files and host memory with one reader; the devices' side is the engine's.

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

    def address_of(self, chunk: Chunk, outcome: Outcome) -> int:
        """Where a chunk that was read begins in host memory."""
        if chunk.extent.sink is Sink.PLACE:
            return chunk.extent.address + chunk.offset - chunk.extent.offset
        return self._slots.address + chunk.slot * self._slots.slot_bytes + outcome.delta

    def move(self, chunk: Chunk, outcome: Outcome) -> None:
        """Read a chunk and put it where it belongs in host memory; what failed is told in the outcome."""
        extent = chunk.extent
        shard = self._source(extent)
        if extent.sink is not Sink.PLACE and extent.path is ReadPath.DIRECT:
            outcome.delta = chunk.offset % shard.offset_alignment
        address = self.address_of(chunk, outcome)
        start = outcome.begun = time.monotonic()
        try:
            self._read(shard, extent.path, address, chunk, outcome)
        except _EndOfFileError as end:
            outcome.failure = Failure(chunk.index, FailureKind.END_OF_FILE, 0, end.offset, chunk.length)
            return
        except OSError as err:
            number = err.errno or errno.EIO
            outcome.failure = Failure(chunk.index, FailureKind.READ, number, chunk.offset, chunk.length)
            return
        read = time.monotonic()
        if extent.resident:
            outcome.cache_seconds = read - start
        else:
            outcome.storage_seconds = read - start
        if extent.drop_behind:
            self._drop(shard, chunk)
        if extent.sink is Sink.COPY:
            for begin, destination, nbytes in runs_of(chunk):
                ctypes.memmove(destination, address + begin - chunk.offset, nbytes)
            outcome.copy_seconds = time.monotonic() - read

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
