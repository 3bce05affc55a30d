"""How much memory staging takes and where concurrency starts: pure arithmetic within the host-memory budget.

The budget is written as a sum with a reason per term. Tensors are split across slots, so the smallest budget holds for
tensors of any size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec import Struct

from weightlift.errors import BudgetError
from weightlift.operations import Extent, ReadPath, Sink
from weightlift.types import BudgetTerm
from weightlift.units import KIB, MIB, PAGE_BYTES, align_down, format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

ALIGNMENT_SLACK_BYTES: Final = 2 * PAGE_BYTES
"""Room in a slot for the blocks at both ends of a direct read."""

_OWN: Final = BudgetTerm(
    name="bookkeeping", nbytes=256 * KIB, reason="what Python allocates while a load runs, such as samples and events"
)
_STACK_BYTES: Final = 32 * KIB
_WORKERS_MAX: Final = 32
_SLOT_CHUNK_BYTES: Final = 4 * MIB
_SLOT_CHUNK_BYTES_MIN: Final = 64 * KIB
_SLOTS_MIN: Final = 4
_CHUNK_BYTES_MAX: Final = 16 * MIB
_MOSTLY: Final = 0.5
"""Share of what is read that the page cache holds, from which on copying out of it counts and not storage."""

_DEVICE_ROOMY_BYTES: Final = 120 * MIB
_DEVICE_WORKERS_DIRECT: Final = 2
_STORAGE_SHARE: Final = 4
_DEVICE_CHUNKS: Final = (
    *(4 * MIB, 3 * MIB, 2 * MIB, 1536 * KIB),
    *(1 * MIB, 512 * KIB, 256 * KIB, 128 * KIB),
)
"""None is larger, since the first bytes move only once a chunk is full."""
_DEVICE_CHUNK_BYTES_MIN: Final = 256 * KIB


class Pool(Struct, frozen=True, kw_only=True):
    """Staging and concurrency, as the budget allows.

    Attributes:
        slot_count: slots to stage in; 0 where everything is placed directly.
        slot_bytes: bytes of each.
        worker_room: most workers.
        workers: workers to start with.
        chunk_bytes: chunk size to start with.
        chunk_bytes_max: largest chunk that fits a slot.
        terms: what the budget is spent on.
    """

    slot_count: int
    slot_bytes: int
    worker_room: int
    workers: int
    chunk_bytes: int
    chunk_bytes_max: int
    terms: tuple[BudgetTerm, ...]


class _Shape(NamedTuple):
    """Most workers of a load onto devices, slots that the budget is divided into, and the largest chunk."""

    workers: int
    slots: int
    chunk_bytes: int


_FROM_CACHE: Final = _Shape(12, 30, 4 * MIB)
_FROM_STORAGE: Final = _Shape(10, 20, 3 * MIB)
_TIGHT: Final = _Shape(10, 15, 3 * MIB)
_PAGEABLE: Final = _Shape(5, 8, 4 * MIB)
_PAGEABLE_FROM_STORAGE: Final = _Shape(4, 20, 3 * MIB)


def _from_cache_to_several(devices: int) -> _Shape:
    """As many workers for each device; their chunks are small, as all of it competes for the memory's bandwidth."""
    return _Shape(12 * devices, 20 * devices, 2 * MIB)


def _shape(devices: int, *, roomy: bool, from_storage: bool, pinned: bool) -> _Shape:
    if not pinned:
        return _PAGEABLE_FROM_STORAGE if from_storage else _PAGEABLE
    if not roomy:
        return _TIGHT
    return _FROM_STORAGE if from_storage else _FROM_CACHE if devices == 1 else _from_cache_to_several(devices)


class _Concurrency(NamedTuple):
    workers: int
    chunk_bytes: int
    workers_max: int


def plan_pool(
    extents: Sequence[Extent],
    *,
    budget_bytes: int,
    processors: int,
    workers: int | None,
    chunk_bytes: int | None,
    open_ended: bool = False,
) -> Pool:
    """Size the staging pool and choose where concurrency starts.

    Args:
        extents: what will be read.
        budget_bytes: the host-memory budget.
        processors: how many processors this process may use.
        workers: the caller's fixed number of workers, if any.
        chunk_bytes: the caller's fixed chunk size, if any.
        open_ended: more extents will follow, and any of them may need slots.

    Raises:
        BudgetError: fixed workers and chunks do not fit the budget.
    """
    staged = open_ended or any(extent.sink is not Sink.PLACE for extent in extents)
    start = _start(extents, processors, staged=staged)
    if not staged:
        room = workers or start.workers_max
        return Pool(
            slot_count=0,
            slot_bytes=0,
            worker_room=room,
            workers=workers or start.workers,
            chunk_bytes=chunk_bytes or start.chunk_bytes,
            chunk_bytes_max=chunk_bytes or _CHUNK_BYTES_MAX,
            terms=(_stacks(room), _OWN),
        )
    budget = budget_bytes - _OWN.nbytes
    slot_chunk = chunk_bytes or _slot_chunk(budget, workers or start.workers)
    total = sum(extent.length for extent in extents)
    chunks = _WORKERS_MAX if open_ended else max(1, -(-total // slot_chunk))
    slots, room = _slots_and_workers(
        budget, slot_chunk + ALIGNMENT_SLACK_BYTES, chunks, start.workers_max, fixed_workers=workers
    )
    return Pool(
        slot_count=slots,
        slot_bytes=slot_chunk + ALIGNMENT_SLACK_BYTES,
        worker_room=room,
        workers=min(workers or start.workers, room),
        chunk_bytes=min(chunk_bytes or start.chunk_bytes, slot_chunk),
        chunk_bytes_max=slot_chunk,
        terms=(_slots_term(slots, slot_chunk), _stacks(room), _OWN),
    )


def plan_device_pool(
    extents: Sequence[Extent],
    *,
    budget_bytes: int,
    processors: int,
    workers: int | None,
    chunk_bytes: int | None,
    total_bytes: int,
    stored_bytes: int,
    pinned: bool,
    devices: int = 1,
) -> Pool:
    """Size the staging pool of a load onto devices, and choose where concurrency starts.

    Workers fill slots while copies out of others are under way. Copying out of the page cache takes nearly all
    processors to feed a fast link. Its chunks are large, since a link rests between two copies, and there
    are twice as many slots as workers, since what waits for the link holds one too. Storage is slower than the link,
    and many drives are fastest with few large reads at a time.

    Args:
        extents: what will be read, as far as it is known.
        budget_bytes: the host-memory budget.
        processors: how many processors this process may use.
        workers: the caller's fixed number of workers, if any.
        chunk_bytes: the caller's fixed chunk size, if any.
        total_bytes: bytes of all tensors, since little is staged for a small model.
        stored_bytes: how much of that has to come from storage.
        pinned: copies come from pinned memory. From pageable memory the runtime makes them itself, one at a time, and
            fastest what was just read: a few workers do, and more would only push that out of the caches.
        devices: how many are filled at once; each link wants feeding as one alone does.

    Raises:
        BudgetError: fixed workers and chunks do not fit the budget.
    """
    from_storage = _STORAGE_SHARE * stored_bytes > total_bytes
    shape = _shape(devices, roomy=budget_bytes >= _DEVICE_ROOMY_BYTES, from_storage=from_storage, pinned=pinned)
    fitting = workers or min(shape.workers, max(processors - processors // 8, 2))
    budget = budget_bytes - _OWN.nbytes
    share = (budget - _stacks(fitting).nbytes) // max(shape.slots, fitting) - ALIGNMENT_SLACK_BYTES
    most = min(share, shape.chunk_bytes)
    chunk = chunk_bytes or next((size for size in _DEVICE_CHUNKS if size <= most), _SLOT_CHUNK_BYTES_MIN)
    if chunk_bytes is None:
        chunk = min(chunk, max(_DEVICE_CHUNK_BYTES_MIN, align_down(total_bytes // (2 * fitting), PAGE_BYTES)))
    chunks = max(1, -(-total_bytes // chunk))
    slots, room = _slots_and_workers(budget, chunk + ALIGNMENT_SLACK_BYTES, chunks, fitting, fixed_workers=workers)
    slots = min(max(slots, shape.slots), chunks, (budget - _stacks(room).nbytes) // (chunk + ALIGNMENT_SLACK_BYTES))
    start = _device_start(extents, processors) if from_storage else room
    return Pool(
        slot_count=slots,
        slot_bytes=chunk + ALIGNMENT_SLACK_BYTES,
        worker_room=room,
        workers=min(workers or start, room),
        chunk_bytes=chunk,
        chunk_bytes_max=chunk,
        terms=(_slots_term(slots, chunk), _stacks(room), _OWN),
    )


def _device_start(extents: Sequence[Extent], processors: int) -> int:
    """Workers to start with where storage sets the pace; ranges from the page cache need some more beside them."""
    if extents and all(extent.path is ReadPath.DIRECT for extent in extents):
        return _DEVICE_WORKERS_DIRECT
    return max(_DEVICE_WORKERS_DIRECT, min(processors, 4))


def _slots_term(slots: int, chunk: int) -> BudgetTerm:
    return BudgetTerm(
        name="staging slots",
        nbytes=slots * (chunk + ALIGNMENT_SLACK_BYTES),
        reason=f"{slots} slots of {format_bytes(chunk)}, each with {ALIGNMENT_SLACK_BYTES} bytes for alignment",
    )


def _slots_and_workers(
    budget_bytes: int, slot_bytes: int, chunks: int, workers_max: int, *, fixed_workers: int | None
) -> tuple[int, int]:
    """How many slots and workers fit the budget; no more of either than there are chunks.

    Raises:
        BudgetError: the fixed number of workers would not have a slot each.
    """
    if fixed_workers is None:
        fitting = budget_bytes // (slot_bytes + _STACK_BYTES)
        room = max(1, min(workers_max, fitting, chunks))
    else:
        fitting = (budget_bytes - _stacks(fixed_workers).nbytes) // slot_bytes
        room = fixed_workers
    if fitting < min(room, chunks):
        smallest = min(room, chunks) * slot_bytes + _stacks(room).nbytes + _OWN.nbytes
        raise BudgetError(
            f"{room} workers with slots of {format_bytes(slot_bytes)} need {format_bytes(smallest)} for staging, "
            f"and host_memory is {format_bytes(budget_bytes + _OWN.nbytes)}",
            hint=f"set host_memory to at least {smallest}, or use fewer workers or smaller chunks",
            smallest_bytes=smallest,
        )
    return min(max(room, _SLOTS_MIN), fitting, chunks), room


def _stacks(workers: int) -> BudgetTerm:
    return BudgetTerm(
        name="worker stacks",
        nbytes=workers * _STACK_BYTES,
        reason=f"at most {workers} threads, with {_STACK_BYTES} bytes of stack in use each",
    )


def _slot_chunk(budget_bytes: int, workers: int) -> int:
    slots = max(_SLOTS_MIN, workers)
    share = (budget_bytes - _stacks(slots).nbytes) // slots - ALIGNMENT_SLACK_BYTES
    return max(_SLOT_CHUNK_BYTES_MIN, min(_SLOT_CHUNK_BYTES, align_down(share, PAGE_BYTES)))


def _start(extents: Sequence[Extent], processors: int, *, staged: bool) -> _Concurrency:
    """Where concurrency starts and ends; the tuner finds its way in between."""
    cached = sum(extent.length for extent in extents if extent.resident)
    share = cached / max(1, sum(extent.length for extent in extents))
    # Copying out of the cache is processor work. Where fresh memory is populated workers also wait for each other, so
    # two more than processors keep all busy. Of files that are partly cached, drive and processors work side by side.
    copying = max(1, min(processors + (0 if staged else 2), 16))
    reading = max(2, min(processors, 4))
    workers = round(reading + share * (copying - reading))
    if share >= _MOSTLY:
        # Staged chunks that fit a second-level cache are copied faster.
        return _Concurrency(workers, 512 * KIB if staged else 2 * MIB, max(copying, min(processors, _WORKERS_MAX)))
    # Larger chunks no longer fit a second-level cache, where memory that a read goes to was cleared just before.
    return _Concurrency(workers, 2 * MIB, _WORKERS_MAX)
