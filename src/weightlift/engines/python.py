"""The Python engine: the reference for the contract, and what runs where no compiled library is.

Workers are Python threads; a read releases the interpreter lock while it lasts. All shared state is guarded by one
lock, so nothing here relies on the interpreter lock for correctness. Reads go through a
:class:`~weightlift.engines.reader.Reader`, which tests replace by one that injects faults.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from weightlift.engines.moving import Chunk, Mover, Outcome
from weightlift.engines.reader import Reader, SystemReader
from weightlift.operations import (
    Activity,
    ChunkReady,
    Counters,
    Event,
    Extent,
    ExtentDone,
    Failure,
    FailureKind,
    ReadPath,
    ShardSource,
    ShardUse,
    Sink,
    SlotMemory,
)
from weightlift.units import PAGE_BYTES, align_down

if TYPE_CHECKING:
    from collections.abc import Sequence

_DIRECT_REFUSED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EFAULT})

_HUGE_PAGE_BYTES: Final = 2 << 20


@dataclass(slots=True)
class _Totals:
    claimed_bytes: int = 0
    landed_bytes: int = 0
    reads: int = 0
    fallbacks: int = 0
    storage_seconds: float = 0.0
    cache_seconds: float = 0.0
    copy_seconds: float = 0.0
    slot_wait_seconds: float = 0.0


@dataclass(slots=True)
class _Use:
    bytes_by_path: dict[ReadPath, int] = field(default_factory=lambda: dict.fromkeys(ReadPath, 0))
    refused_bytes: int = 0
    refused_errno: int = 0


class PythonEngine:
    """An :class:`~weightlift.operations.Engine` made of Python threads.

    Args:
        shards: the open shards that extents refer to.
        slots: memory to stage in, alive for as long as the engine is.
        worker_room: most workers that :meth:`set_limits` may ask for.
        reader: how bytes are asked for; the operating system's own calls by default.
    """

    name = "python"

    def __init__(
        self, shards: Sequence[ShardSource], slots: SlotMemory, worker_room: int, reader: Reader | None = None
    ) -> None:
        self._slots = slots
        self._mover = Mover(tuple(shards), slots, reader or SystemReader())
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._news = threading.Condition(self._lock)
        self._extents: list[Extent] = []
        self._remaining: list[int] = []
        self._next_extent = 0
        self._next_offset = 0
        self._free_slots = list(range(slots.count))
        self._events: deque[Event] = deque()
        self._worker_room = worker_room
        self._threads: list[threading.Thread] = []
        self._activity: dict[int, tuple[int, int, int, float]] = {}
        self._limit = 0
        self._running = 0
        self._chunk_bytes = PAGE_BYTES
        self._stopping = False
        self._failed = False
        self._totals = _Totals()
        self._uses = [_Use() for _ in shards]

    def submit(self, extents: Sequence[Extent]) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        with self._lock:
            if self._next_extent == len(self._extents) and extents:
                self._next_offset = extents[0].offset
            self._extents.extend(extents)
            self._remaining.extend(extent.length for extent in extents)
            self._work.notify_all()

    def set_limits(self, workers: int, chunk_bytes: int) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        with self._lock:
            self._chunk_bytes = chunk_bytes
            self._limit = workers
            while not self._stopping and len(self._threads) < min(workers, self._worker_room):
                index = len(self._threads)
                thread = threading.Thread(target=self._run, args=(index,), name=f"weightlift-{index}", daemon=True)
                self._threads.append(thread)
                self._running += 1
                thread.start()
            self._work.notify_all()

    def poll(self, timeout_seconds: float) -> list[Event]:
        """See :class:`~weightlift.operations.Engine`."""
        with self._lock:
            self._news.wait_for(lambda: self._events, timeout_seconds)
            events = list(self._events)
            self._events.clear()
            return events

    def return_slot(self, slot: int) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        with self._lock:
            self._release_slot(slot)

    def counters(self) -> Counters:
        """See :class:`~weightlift.operations.Engine`."""
        with self._lock:
            totals = self._totals
            return Counters(
                totals.claimed_bytes,
                totals.landed_bytes,
                totals.reads,
                totals.fallbacks,
                totals.storage_seconds,
                totals.cache_seconds,
                0.0,
                totals.copy_seconds,
                totals.slot_wait_seconds,
                min(self._limit, len(self._threads)),
                self._running,
            )

    def shard_use(self, shard: int) -> ShardUse:
        """See :class:`~weightlift.operations.Engine`."""
        with self._lock:
            use = self._uses[shard]
            by_path = use.bytes_by_path
            return ShardUse(
                direct_bytes=by_path[ReadPath.DIRECT],
                buffered_bytes=by_path[ReadPath.BUFFERED] + by_path[ReadPath.DONTCACHE],
                mapped_bytes=by_path[ReadPath.MAPPED],
                refused_bytes=use.refused_bytes,
                refused_errno=use.refused_errno,
            )

    def activity(self) -> list[Activity]:
        """See :class:`~weightlift.operations.Engine`."""
        now = time.monotonic()
        with self._lock:
            return [
                Activity(shard, offset, length, now - since) for shard, offset, length, since in self._activity.values()
            ]

    def cancel(self) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        with self._lock:
            self._stopping = True
            self._work.notify_all()

    def join(self, timeout_seconds: float) -> int:
        """See :class:`~weightlift.operations.Engine`."""
        with self._lock:
            self._news.wait_for(lambda: self._running == 0, timeout_seconds)
            running, threads = self._running, list(self._threads)
        if not running:
            for thread in threads:
                thread.join()
        return running

    def close(self) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        self._extents.clear()

    # ---- claiming and telling, under the lock

    def _claim(self) -> Chunk | None:
        if self._next_extent == len(self._extents):
            return None
        extent = self._extents[self._next_extent]
        wants_slot = extent.sink is not Sink.PLACE
        if wants_slot and not self._free_slots:
            return None
        index, begin = self._next_extent, self._next_offset
        end = self._chunk_end(extent, begin)
        self._next_offset = end
        if extent.lane or end == extent.offset + extent.length:
            self._next_extent += 1
            if self._next_extent < len(self._extents):
                self._next_offset = self._extents[self._next_extent].offset
        self._totals.claimed_bytes += end - begin
        return Chunk(extent, index, self._free_slots.pop() if wants_slot else -1, begin, end - begin)

    def _chunk_end(self, extent: Extent, begin: int) -> int:
        end = begin + self._chunk_bytes
        if extent.lane:
            # The page cache keeps files in units of up to a huge page, which uncached reads must not divide.
            end = align_down(end, _HUGE_PAGE_BYTES if self._chunk_bytes >= _HUGE_PAGE_BYTES else PAGE_BYTES)
        elif extent.sink is Sink.PLACE:
            # Boundaries fall on pages of the destination, which direct reads need and populating likes.
            address = extent.address + begin - extent.offset
            end = begin + align_down(address + self._chunk_bytes, PAGE_BYTES) - address
        elif extent.sink is not Sink.HAND_OVER:
            end = align_down(end, PAGE_BYTES)
        return min(end if end > begin else begin + self._chunk_bytes, extent.offset + extent.length)

    def _release_slot(self, slot: int) -> None:
        self._free_slots.append(slot)
        # All, since a notice could go to a worker above the limit, which would go on sleeping.
        self._work.notify_all()

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._news.notify_all()

    def _finish(self, chunk: Chunk, outcome: Outcome) -> None:
        totals, extent = self._totals, chunk.extent
        totals.reads += 1
        totals.storage_seconds += outcome.storage_seconds
        totals.cache_seconds += outcome.cache_seconds
        totals.copy_seconds += outcome.copy_seconds
        use = self._uses[extent.shard]
        if outcome.refused_bytes:
            totals.fallbacks += 1
            use.refused_bytes += outcome.refused_bytes
            use.refused_errno = outcome.refused_errno or use.refused_errno
        handed_over = extent.sink is Sink.HAND_OVER and outcome.failure is None
        goes_on = extent.lane and not chunk.ends_extent and outcome.failure is None and not self._stopping
        if chunk.slot >= 0 and not handed_over and not goes_on:
            self._release_slot(chunk.slot)
        if outcome.failure is not None:
            if not self._failed:
                self._failed = True
                self._tell(outcome.failure)
            self._stopping = True
            self._work.notify_all()
            return
        use.bytes_by_path[extent.path] += chunk.length - outcome.refused_bytes
        use.bytes_by_path[ReadPath.BUFFERED] += outcome.refused_bytes
        totals.landed_bytes += chunk.length
        if handed_over:
            address = self._slots.address + chunk.slot * self._slots.slot_bytes + outcome.delta
            self._tell(ChunkReady(chunk.index, chunk.slot, address, chunk.offset, chunk.length))
        self._remaining[chunk.index] -= chunk.length
        if self._remaining[chunk.index] == 0:
            self._tell(ExtentDone(chunk.index))

    def _run(self, index: int) -> None:
        mover = self._mover.for_worker()
        chunk: Chunk | None = None
        while True:
            with self._lock:
                chunk = self._next_in_lane(chunk) or self._next_chunk(index)
                if chunk is None:
                    mover.close()
                    self._running -= 1
                    self._news.notify_all()
                    return
                self._activity[index] = (chunk.extent.shard, chunk.offset, chunk.length, time.monotonic())
            try:
                outcome = mover.move(chunk)
            except BaseException as err:  # noqa: BLE001 # a worker that dies silently would leave the caller waiting
                kind = FailureKind.MEMORY if isinstance(err, MemoryError) else FailureKind.INTERNAL
                failure = Failure(chunk.index, kind, errno.ENOMEM, chunk.offset, chunk.length, err)
                outcome = Outcome(failure=failure)
            with self._lock:
                del self._activity[index]
                self._finish(chunk, outcome)

    def _next_in_lane(self, last: Chunk | None) -> Chunk | None:
        """The next chunk of the lane a worker is in, in the same slot."""
        if last is None or not last.extent.lane or last.ends_extent or self._stopping:
            return None
        begin = last.offset + last.length
        length = self._chunk_end(last.extent, begin) - begin
        self._totals.claimed_bytes += length
        return Chunk(last.extent, last.index, last.slot, begin, length)

    def _next_chunk(self, index: int) -> Chunk | None:
        while not self._stopping:
            chunk = self._claim() if index < self._limit else None
            if chunk is not None:
                return chunk
            starved = index < self._limit and self._next_extent < len(self._extents)
            start = time.monotonic()
            self._work.wait()
            if starved:
                self._totals.slot_wait_seconds += time.monotonic() - start
        return None
