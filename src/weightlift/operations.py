"""The contract between a plan and the engine that carries it out: extents going in, events coming out.

An extent is one contiguous range of one shard, read by one path into one sink. An engine splits it into chunks, claims
chunks in the order of submission, and reports every extent once. Nothing here does anything: these are values that the
planner makes, both engines read and the pipeline acts upon.
"""

from __future__ import annotations

import enum
from array import array
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from weightlift.steps import Steps


class ReadPath(enum.IntEnum):
    """How a chunk leaves storage. The numbers are those of the native engine."""

    DIRECT = 0
    BUFFERED = 1
    DONTCACHE = 2
    MAPPED = 3


class Sink(enum.IntEnum):
    """Where a chunk goes. The numbers are those of the native engine.

    ``DISCARD``: into a slot, and forgotten. ``PLACE``: straight to its final address, no slot. ``COPY``: into a slot,
    then to one or more final addresses. ``HAND_OVER``: into a slot that Python gets, and gives back. ``DEVICE``: into a
    slot, then to one or more addresses on a device, by copies that run while the worker goes on.
    """

    DISCARD = 0
    PLACE = 1
    COPY = 2
    HAND_OVER = 3
    DEVICE = 4


class FailureKind(enum.IntEnum):
    """What went wrong in an engine. The numbers are those of the native engine."""

    READ = 1
    END_OF_FILE = 2
    MEMORY = 3
    INTERNAL = 4
    DEVICE = 5


class Stage(enum.IntEnum):
    """What a worker is at. The numbers are those of the native engine."""

    READING = 0
    REGISTERING = 1
    DEVICE_COPY = 2
    DEVICE_WAIT = 3


STAGE_WORDS: dict[Stage, str] = {
    Stage.READING: "reading",
    Stage.REGISTERING: "pinning memory for",
    Stage.DEVICE_COPY: "starting a copy to the device from",
    Stage.DEVICE_WAIT: "waiting for the device with",
}
"""What a worker is at, for sentences that go on with the file."""

UNBOUNDED = (1 << 63) - 1
"""What an engine may claim before it is told otherwise."""

COPY_FIELDS = 3
"""Numbers per entry of a copy table: offset in the file, length, destination address."""


class CopyTable(Struct, frozen=True):
    """Where the parts of a range go: ``count`` entries of ``numbers`` from entry ``first`` on, by rising file offset.

    Attributes:
        numbers: ``offset, length, address`` per entry, all in bytes (type code ``Q``).
        first: index of the first entry.
        count: how many entries.
    """

    numbers: array[int]
    first: int
    count: int


def make_copy_table(entries: Iterable[tuple[int, int, int]]) -> CopyTable:
    """A copy table of its own from ``(offset, length, address)`` entries, by rising offset."""
    numbers = array("Q", chain.from_iterable(entries))
    return CopyTable(numbers, 0, len(numbers) // COPY_FIELDS)


class Extent(NamedTuple):
    """One contiguous file range, read one way into one place.

    Attributes:
        shard: index of the shard.
        path: how it is read.
        sink: where it goes.
        offset: first byte in the file.
        length: bytes, more than 0.
        address: for ``PLACE``, where the byte at ``offset`` goes. With ``DIRECT`` it must be congruent to ``offset``
            modulo the page size, and the whole pages around the range must be free to be overwritten.
        copies: for ``COPY`` and ``DEVICE``, its table; ``DEVICE`` entries hold device addresses.
        fresh: the destination has never been touched; it is populated in large pages before the read.
        drop_behind: the page cache of the range was empty before and is to be emptied after each chunk.
        resident: the range was in the page cache when the plan was made.
        lane: one worker reads the extent from end to end, with a descriptor of its own, so that the system's
            read-ahead, which is kept per open file, sees one sequential reader. Not for ``HAND_OVER``.
        device: for ``DEVICE``, index of the device queue.
        ready: for ``DEVICE``, an event of the device's runtime that copies wait for (recorded on the caller's stream
            once the destination was allocated, since its memory may have work queued); 0 for none. It is recorded
            before the extent is submitted; a later submission may give the same number another meaning.
        tag: which of the wanted ranges it belongs to; engines do not look at it.
    """

    shard: int
    path: ReadPath
    sink: Sink
    offset: int
    length: int
    address: int = 0
    copies: CopyTable | None = None
    fresh: bool = False
    drop_behind: bool = False
    resident: bool = False
    lane: bool = False
    device: int = 0
    ready: int = 0
    tag: int = 0


class ShardSource(NamedTuple):
    """An open shard, as an engine sees it.

    Attributes:
        descriptor: for reads through the page cache.
        direct_descriptor: for direct reads, -1 where they are not possible.
        size_bytes: length of the file.
        offset_alignment: multiple that direct reads must start and end at.
        mapping_address: address of a shared read-only mapping of the whole file, 0 if there is none.
    """

    descriptor: int
    direct_descriptor: int
    size_bytes: int
    offset_alignment: int
    mapping_address: int = 0


class ExtentDone(NamedTuple):
    """All bytes of an extent have landed."""

    extent: int


class ChunkReady(NamedTuple):
    """A chunk of a ``HAND_OVER`` extent lies in a slot, which is the receiver's until it is returned.

    Attributes:
        extent: index of the extent, in order of submission.
        slot: which slot to return.
        address: where the chunk begins in memory.
        offset: where it begins in the file.
        length: its bytes.
    """

    extent: int
    slot: int
    address: int
    offset: int
    length: int


class Failure(NamedTuple):
    """The first thing that went wrong; the engine has stopped claiming.

    Attributes:
        extent: index of the extent, in order of submission.
        kind: what failed.
        error_number: ``errno``, 0 at the end of a file.
        offset: where in the file.
        length: bytes of the chunk that was being read.
        cause: for ``INTERNAL``, what a worker raised.
        stage: what the worker was at; for ``DEVICE`` failures, which kind of call to the runtime failed
            (``error_number`` is then the runtime's own code).
    """

    extent: int
    kind: FailureKind
    error_number: int
    offset: int
    length: int
    cause: BaseException | None = None
    stage: Stage = Stage.READING


Event = ExtentDone | ChunkReady | Failure


class Activity(NamedTuple):
    """What one worker is doing at this moment: with which shard and range, and for how long already (in seconds)."""

    shard: int
    offset: int
    length: int
    seconds: float
    stage: Stage = Stage.READING


class Counters(NamedTuple):
    """Progress of an engine since its start; times are summed over workers, in seconds.

    Attributes:
        claimed_bytes: bytes of chunks that a worker has taken on.
        read_bytes: bytes of chunks that have left storage.
        landed_bytes: bytes of chunks that are where they belong.
        reads: chunks finished.
        fallbacks: chunks of which a part was read through the cache because direct I/O was refused.
        storage_seconds: reading ranges that were not resident.
        cache_seconds: reading ranges that were resident.
        populate_seconds: preparing fresh destination memory.
        copy_seconds: copying out of slots.
        slot_wait_seconds: waiting for a slot to come back.
        device_seconds: submitting copies to devices and waiting for them.
        register_seconds: registering slots with a device's runtime.
        busy_seconds: in which at least one worker carried out a chunk; once each, however many did.
        workers: workers that may claim.
        running: workers alive.
    """

    claimed_bytes: int
    read_bytes: int
    landed_bytes: int
    reads: int
    fallbacks: int
    storage_seconds: float
    cache_seconds: float
    populate_seconds: float
    copy_seconds: float
    slot_wait_seconds: float
    device_seconds: float
    register_seconds: float
    busy_seconds: float
    workers: int
    running: int


class ShardUse(NamedTuple):
    """How one shard was read: bytes by path, and what made direct reads fall back.

    Attributes:
        direct_bytes: read past the page cache.
        buffered_bytes: read through it, fallbacks included.
        mapped_bytes: read from a mapping.
        refused_bytes: of the buffered ones, those that direct I/O refused.
        refused_errno: why, 0 if it never did.
    """

    direct_bytes: int
    buffered_bytes: int
    mapped_bytes: int
    refused_bytes: int
    refused_errno: int


class Engine(Protocol):
    """Moves the bytes of submitted extents with a bounded number of workers and a fixed pool of slots.

    Guarantees, kept by every implementation and checked by ``weightlift.testing.conformance``:

    - Every byte of every extent is read once and lands once, or a :class:`Failure` is told.
    - Chunks are claimed in order of submission; they finish in any order.
    - A slot is in use by one chunk at a time, and a handed-over slot not before it is returned.
    - Bytes for a device have landed once the copies that bring them have completed, not once they were queued, and the
      slot they came from is refilled no earlier. Workers leave only after the copies they queued have completed.
    - Every worker that reaches devices makes its first call to each before any of them reads a byte.
    - After :meth:`cancel` returns no chunk is claimed; after :meth:`join` returned nothing, no memory is touched.
    """

    name: str

    def submit(self, extents: Sequence[Extent]) -> None:
        """Add extents behind those already submitted; they are numbered from 0 over all calls."""
        ...

    def set_limits(self, workers: int, chunk_bytes: int) -> None:
        """Let that many workers claim chunks of that size, starting threads as needed.

        With 0 workers no further chunk is read until there are more again, not even of a lane that was begun.
        ``chunk_bytes`` is a multiple of the page size; with its alignment slack a chunk must fit a slot.
        """
        ...

    def poll(self, timeout_seconds: float) -> list[Event]:
        """Events since the last call, waiting for the first one at most ``timeout_seconds``."""
        ...

    def return_slot(self, slot: int) -> None:
        """Give back the slot of a :class:`ChunkReady`."""
        ...

    def allow(self, nbytes: int) -> None:
        """Claim nothing, and go on with no lane, once ``nbytes`` bytes have been claimed in all."""
        ...

    def trim(self) -> None:
        """Give the memory of free slots that are not registered back to the system, where it takes memory back."""
        ...

    def counters(self) -> Counters:
        """Progress so far."""
        ...

    def shard_use(self, shard: int) -> ShardUse:
        """How a shard has been read so far."""
        ...

    def activity(self) -> list[Activity]:
        """What every busy worker is doing now."""
        ...

    def watch(self, seconds: float, names: Sequence[str], fd: int = 2) -> None:
        """From now on, say in a line when nothing has landed for that long, and again after each doubling of the time.

        The line names what every busy worker is at, and since when. May be called once.

        Args:
            seconds: how long nothing may land.
            names: what to call each shard.
            fd: where to say it, by default the standard error stream; lines are left out while nobody reads them.
        """
        ...

    def trace(self, capacity: int) -> None:
        """From now on, keep the last ``capacity`` steps of all workers; once, and before any limits are set."""
        ...

    def steps(self) -> Steps:
        """The steps kept; empty if nothing was traced. Only after :meth:`join` returned 0 and before :meth:`close`."""
        ...

    def cancel(self) -> None:
        """Claim no further chunk. Reads under way go on; :meth:`join` waits for them."""
        ...

    def join(self, timeout_seconds: float) -> int:
        """Wait for all workers to leave; returns how many have not. Only after :meth:`cancel` or a failure."""
        ...

    def close(self) -> None:
        """Release what the engine holds. Only after :meth:`join` returned 0."""
        ...
