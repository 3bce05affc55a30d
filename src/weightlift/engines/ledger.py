"""What the workers of the Python engine share: claims, slots, copies under way, counters and events.

All of it is used with the ledger's lock held, which is what makes it safe; nothing here waits, reads or copies.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.device_operations import SlotState
from weightlift.engines.moving import Chunk, Outcome
from weightlift.engines.step_ring import StepRing
from weightlift.operations import UNBOUNDED, ChunkReady, Event, Extent, ExtentDone, ReadPath, ShardUse, Sink
from weightlift.steps import StepKind
from weightlift.units import PAGE_BYTES, align_down

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.device_operations import SlotMemory
    from weightlift.engines.devices import DeviceCallError

_HUGE_PAGE_BYTES: Final = 2 << 20


@dataclass(slots=True)
class Totals:
    """What has been done so far; the names are those of :class:`~weightlift.operations.Counters`."""

    claimed_bytes: int = 0
    read_bytes: int = 0
    landed_bytes: int = 0
    reads: int = 0
    fallbacks: int = 0
    storage_seconds: float = 0.0
    cache_seconds: float = 0.0
    copy_seconds: float = 0.0
    slot_wait_seconds: float = 0.0
    device_seconds: float = 0.0
    register_seconds: float = 0.0


@dataclass(slots=True)
class _Use:
    bytes_by_path: dict[ReadPath, int] = field(default_factory=lambda: dict.fromkeys(ReadPath, 0))
    refused_bytes: int = 0
    refused_errno: int = 0


class CopyUnderWay(NamedTuple):
    """What copies out of a slot bring; ``age`` numbers them in the order in which they were queued."""

    age: int
    chunk: Chunk
    outcome: Outcome


class Ledger:
    """The shared state of one engine.

    Args:
        shard_count: how many shards extents may refer to.
        slots: the staging memory.

    Attributes:
        lock: guards everything else.
        work: what workers within the limit wait on. All wait for the same, so what serves one wakes one.
        parked: what workers above the limit wait on.
        news: what the caller waits on.
        events: what the caller has not taken yet.
        totals: counters.
        limit: workers that may claim.
        allowed_bytes: nothing is claimed once so many bytes have been.
        chunk_bytes: how large a chunk may be.
        uncalled: workers that have not made their first calls to devices; nothing is claimed before all have.
        device_failure: the first of those calls that failed.
        running: workers alive.
        stopping: nothing is claimed any more.
        submitted_bytes: bytes of all extents so far.
        steps: what workers did, where that is traced; needs no lock.
    """

    def __init__(self, shard_count: int, slots: SlotMemory) -> None:
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        self.parked = threading.Condition(self.lock)
        self.news = threading.Condition(self.lock)
        self.events: deque[Event] = deque()
        self.totals = Totals()
        self.limit = 0
        self.allowed_bytes = UNBOUNDED
        self.chunk_bytes = PAGE_BYTES
        self.uncalled = 0
        self.device_failure: DeviceCallError | None = None
        self.running = 0
        self.stopping = False
        self.submitted_bytes = 0
        self.steps = StepRing()
        self._busy = 0
        self._busy_since = 0.0
        self._busy_seconds = 0.0
        self._submissions = 0
        self._slots = slots
        self._free_slots = list(range(slots.count))
        self._copies: list[CopyUnderWay] = []
        self._last_age = 0
        self._extents: list[Extent] = []
        self._remaining: list[int] = []
        self._next_extent = 0
        self._next_offset = 0
        self._failed = False
        self._uses = [_Use() for _ in range(shard_count)]

    def submit(self, extents: Sequence[Extent]) -> None:
        """Add extents behind those already there."""
        if self._next_extent == len(self._extents) and extents:
            self._next_offset = extents[0].offset
        self._extents.extend(extents)
        self._remaining.extend(extent.length for extent in extents)
        self.submitted_bytes += sum(extent.length for extent in extents)
        self._submissions += 1
        self.work.notify_all()

    def forget(self) -> None:
        """Let go of the extents; the engine is done."""
        self._extents.clear()

    def wake_all(self) -> None:
        """Have every worker look again."""
        self.work.notify_all()
        self.parked.notify_all()

    def stop(self) -> None:
        """Claim nothing any more."""
        self.stopping = True
        self.wake_all()

    def shard_use(self, shard: int) -> ShardUse:
        """How a shard has been read so far."""
        use = self._uses[shard]
        by_path = use.bytes_by_path
        return ShardUse(
            direct_bytes=by_path[ReadPath.DIRECT],
            buffered_bytes=by_path[ReadPath.BUFFERED] + by_path[ReadPath.DONTCACHE],
            mapped_bytes=by_path[ReadPath.MAPPED],
            refused_bytes=use.refused_bytes,
            refused_errno=use.refused_errno,
        )

    def called(self, failure: DeviceCallError | None) -> None:
        """A worker has made its first calls to devices."""
        self.device_failure = self.device_failure or failure
        self.uncalled -= 1
        if not self.uncalled:
            self.work.notify_all()

    def wait_while_held(self) -> None:
        """Wait for as long as no worker may read; gives up the lock meanwhile."""
        while self.is_held and not self.stopping:
            self.parked.wait()

    @property
    def is_held(self) -> bool:
        """No worker may read, or none any more."""
        return self.limit == 0 or self.totals.claimed_bytes >= self.allowed_bytes

    # ---- claiming

    @property
    def has_more(self) -> bool:
        """Something is left to claim."""
        return self._next_extent < len(self._extents)

    @property
    def cursor(self) -> tuple[int, int]:
        """Shard and offset that the next claim begins at; of no meaning where nothing is left."""
        return (self._extents[self._next_extent].shard if self.has_more else 0, self._next_offset)

    def can_claim(self, index: int) -> bool:
        """Whether there is a chunk that the worker of this number may take on now."""
        if self.stopping or self.is_held or self.uncalled or index >= self.limit or not self.has_more:
            return False
        return bool(self._free_slots) or self._extents[self._next_extent].sink is Sink.PLACE

    def claim(self) -> Chunk:
        """Take on the next chunk, with a slot if it needs one."""
        extent = self._extents[self._next_extent]
        index, begin = self._next_extent, self._next_offset
        end = self._chunk_end(extent, begin)
        self._next_offset = end
        if extent.lane or end == extent.offset + extent.length:
            self._next_extent += 1
            if self.has_more:
                self._next_offset = self._extents[self._next_extent].offset
        self.totals.claimed_bytes += end - begin
        # What follows may need no slot, and so be claimed by one that waits for one.
        self.work.notify()
        slot = -1 if extent.sink is Sink.PLACE else self._free_slots.pop()
        return Chunk(extent, index, slot, begin, end - begin, self._submissions)

    def follow(self, last: Chunk, slot: int) -> Chunk:
        """Take on the next chunk of a lane."""
        begin = last.offset + last.length
        length = self._chunk_end(last.extent, begin) - begin
        self.totals.claimed_bytes += length
        return Chunk(last.extent, last.index, slot, begin, length, last.submissions)

    def _chunk_end(self, extent: Extent, begin: int) -> int:
        end = begin + self.chunk_bytes
        if extent.lane:
            # The page cache keeps files in units of up to a huge page, which uncached reads must not divide.
            end = align_down(end, _HUGE_PAGE_BYTES if self.chunk_bytes >= _HUGE_PAGE_BYTES else PAGE_BYTES)
        elif extent.sink is Sink.PLACE:
            # Boundaries fall on pages of the destination, which direct reads need and populating likes.
            address = extent.address + begin - extent.offset
            end = begin + align_down(address + self.chunk_bytes, PAGE_BYTES) - address
        elif extent.sink is not Sink.HAND_OVER:
            end = align_down(end, PAGE_BYTES)
        return min(end if end > begin else begin + self.chunk_bytes, extent.offset + extent.length)

    def take_slot(self) -> int:
        """A free slot, -1 if there is none."""
        return self._free_slots.pop() if self._free_slots else -1

    def begin_work(self) -> None:
        """A worker starts to carry out a chunk."""
        if not self._busy:
            self._busy_since = time.monotonic()
        self._busy += 1

    def end_work(self) -> None:
        """A worker has carried out a chunk."""
        self._busy -= 1
        if not self._busy:
            self._busy_seconds += time.monotonic() - self._busy_since

    def busy_seconds(self) -> float:
        """How long at least one worker was carrying out a chunk."""
        return self._busy_seconds + (time.monotonic() - self._busy_since if self._busy else 0.0)

    def release_slot(self, slot: int) -> None:
        """Give a slot back."""
        self._free_slots.append(slot)
        self.work.notify()

    def trimmable_slots(self) -> list[int]:
        """Free slots whose memory no device's runtime has registered."""
        states = self._slots.states
        return [slot for slot in self._free_slots if states is None or states[slot] != SlotState.REGISTERED]

    # ---- telling

    def tell(self, event: Event) -> None:
        """Have something for the caller."""
        self.events.append(event)
        self.news.notify_all()

    def finish(self, chunk: Chunk, outcome: Outcome) -> None:
        """A chunk has landed, or failed."""
        totals, extent = self.totals, chunk.extent
        totals.reads += 1
        totals.storage_seconds += outcome.storage_seconds
        totals.cache_seconds += outcome.cache_seconds
        totals.copy_seconds += outcome.copy_seconds
        totals.device_seconds += outcome.device_seconds
        totals.register_seconds += outcome.register_seconds
        use = self._uses[extent.shard]
        if not outcome.copying and outcome.failure is None:
            totals.read_bytes += chunk.length
        if outcome.refused_bytes:
            totals.fallbacks += 1
            use.refused_bytes += outcome.refused_bytes
            use.refused_errno = outcome.refused_errno or use.refused_errno
        handed_over = extent.sink is Sink.HAND_OVER and outcome.failure is None
        if chunk.slot >= 0 and not handed_over and not chunk.keeps_slot:
            self.release_slot(chunk.slot)
        if outcome.failure is not None:
            if not self._failed:
                self._failed = True
                self.tell(outcome.failure)
            self.stop()
            return
        use.bytes_by_path[extent.path] += chunk.length - outcome.refused_bytes
        use.bytes_by_path[ReadPath.BUFFERED] += outcome.refused_bytes
        totals.landed_bytes += chunk.length
        if handed_over:
            address = self._slots.address + chunk.slot * self._slots.slot_bytes + outcome.delta
            self.tell(ChunkReady(chunk.index, chunk.slot, address, chunk.offset, chunk.length))
        self._remaining[chunk.index] -= chunk.length
        if self._remaining[chunk.index] == 0:
            self.tell(ExtentDone(chunk.index))

    def rest(self, index: int) -> None:
        """Wait until there may be something to do for the worker of this number; gives up the lock meanwhile."""
        within = index < self.limit
        starved = within and self.has_more and not self.is_held
        start = time.monotonic()
        (self.work if within else self.parked).wait()
        end = time.monotonic()
        if starved:
            self.totals.slot_wait_seconds += end - start
            self.steps.note(StepKind.SLOT_WAIT, index, None, start=start, end=end)

    # ---- copies under way that no worker is waiting for; whoever takes one sees to it

    def under_way(self, chunk: Chunk) -> None:
        """A chunk has left storage, and copies bring it to a device."""
        self.totals.read_bytes += chunk.length

    def next_age(self) -> int:
        """The age of copies queued just now."""
        self._last_age += 1
        return self._last_age

    def list_copy(self, copy: CopyUnderWay) -> None:
        """Put a copy on the list, or back."""
        insort(self._copies, copy, key=lambda listed: listed.age)
        self.work.notify()

    def take_oldest_copy(self) -> CopyUnderWay | None:
        """Take the oldest off the list, if there is one."""
        return self._copies.pop(0) if self._copies else None

    def take_copy_for(self, index: int, last_age: int) -> CopyUnderWay | None:
        """Take the oldest, if it is for the worker of this number to wait for, whose own last copy has that age.

        Above the limit, a worker sees to it that its own have landed and leaves younger ones to those within, of which
        there is always one unless the limit is 0.
        """
        within = index < self.limit or self.limit == 0 or self.stopping
        return self.take_oldest_copy() if within or (self._copies and self._copies[0].age <= last_age) else None
