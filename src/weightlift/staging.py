"""How much memory staging takes and where concurrency starts: pure arithmetic within the host-memory budget.

The budget is written as a sum with a reason per term. Tensors are split across slots, so the smallest budget holds for
tensors of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weightlift.errors import BudgetError
from weightlift.operations import Extent, ReadPath, Sink
from weightlift.types import BudgetTerm
from weightlift.units import KIB, MIB, PAGE_BYTES, align_down, format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

ALIGNMENT_SLACK_BYTES: Final = 2 * PAGE_BYTES
"""Room in a slot for the blocks at both ends of a direct read."""

_STACK_BYTES: Final = 32 * KIB
_WORKERS_MAX: Final = 32
_SLOT_CHUNK_BYTES: Final = 4 * MIB
_SLOT_CHUNK_BYTES_MIN: Final = 64 * KIB
_SLOTS_MIN: Final = 4
_CHUNK_BYTES_MAX: Final = 16 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
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


def plan_pool(
    extents: Sequence[Extent],
    *,
    budget_bytes: int,
    processors: int,
    workers: int | None,
    chunk_bytes: int | None,
    staged: bool = False,
) -> Pool:
    """Size the staging pool and choose where concurrency starts.

    Args:
        extents: what will be read.
        budget_bytes: the host-memory budget.
        processors: how many processors this process may use.
        workers: the caller's fixed number of workers, if any.
        chunk_bytes: the caller's fixed chunk size, if any.
        staged: more extents will follow that may need slots.

    Raises:
        BudgetError: fixed workers and chunks do not fit the budget.
    """
    more_follow = staged
    staged = staged or any(extent.sink is not Sink.PLACE for extent in extents)
    total = sum(extent.length for extent in extents)
    start_workers, start_chunk = _start(extents, processors, staged=staged)
    if not staged:
        room = workers or _WORKERS_MAX
        terms = (_stacks(room),)
        return Pool(
            slot_count=0,
            slot_bytes=0,
            worker_room=room,
            workers=min(workers or start_workers, room),
            chunk_bytes=chunk_bytes or start_chunk,
            chunk_bytes_max=chunk_bytes or _CHUNK_BYTES_MAX,
            terms=terms,
        )
    slot_chunk = chunk_bytes or _slot_chunk(budget_bytes, workers)
    slot_bytes = slot_chunk + ALIGNMENT_SLACK_BYTES
    fitting = (budget_bytes - _stacks(workers or 1).nbytes) // (slot_bytes + (0 if workers else _STACK_BYTES))
    needed = _WORKERS_MAX if more_follow else max(1, -(-total // slot_chunk))
    room = workers or max(1, min(_WORKERS_MAX, fitting, needed))
    slots = min(max(room, _SLOTS_MIN), fitting, max(needed, room))
    if slots < min(room, needed):
        smallest = room * slot_bytes + _stacks(room).nbytes
        raise BudgetError(
            f"{room} workers with chunks of {format_bytes(slot_chunk)} need {format_bytes(smallest)} for staging, "
            f"and host_memory is {format_bytes(budget_bytes)}",
            hint=f"set host_memory to at least {smallest}, or fewer workers or smaller chunks",
            smallest_bytes=smallest,
        )
    slots_term = BudgetTerm(
        name="staging slots",
        nbytes=slots * slot_bytes,
        reason=f"{slots} slots of {format_bytes(slot_chunk)}, each with {ALIGNMENT_SLACK_BYTES} bytes for alignment",
    )
    return Pool(
        slot_count=slots,
        slot_bytes=slot_bytes,
        worker_room=room,
        workers=min(workers or start_workers, room),
        chunk_bytes=min(chunk_bytes or start_chunk, slot_chunk),
        chunk_bytes_max=slot_chunk,
        terms=(slots_term, _stacks(room)),
    )


def _stacks(workers: int) -> BudgetTerm:
    return BudgetTerm(
        name="worker stacks", nbytes=workers * _STACK_BYTES, reason=f"{workers} threads of {_STACK_BYTES} bytes in use"
    )


def _slot_chunk(budget_bytes: int, workers: int | None) -> int:
    slots = max(_SLOTS_MIN, workers or 0)
    share = (budget_bytes - _stacks(max(slots, workers or 0)).nbytes) // slots - ALIGNMENT_SLACK_BYTES
    return max(_SLOT_CHUNK_BYTES_MIN, min(_SLOT_CHUNK_BYTES, align_down(share, PAGE_BYTES)))


def _start(extents: Sequence[Extent], processors: int, *, staged: bool) -> tuple[int, int]:
    """Workers and chunk size to begin with; the tuner goes on from there."""
    cached = sum(extent.length for extent in extents if extent.resident)
    if 2 * cached >= sum(extent.length for extent in extents):
        # Copying out of the cache is processor work; staged chunks that fit a second-level cache are copied faster.
        return max(1, min(processors, 16)), (512 * KIB if staged else 4 * MIB)
    direct = any(extent.path is ReadPath.DIRECT for extent in extents)
    if direct:
        return max(2, min(processors, 4)), 4 * MIB
    return max(2, min(processors, 4)), (1 * MIB if staged else 2 * MIB)
