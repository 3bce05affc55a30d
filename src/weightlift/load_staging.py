"""The staging of one load: how much of it the plan takes, and where its memory comes from.

Memory for devices is borrowed from what the process keeps pinned; everything else gets slots of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlift.buffers import SlotPool
from weightlift.device_staging import StagingLoan, borrow_staging
from weightlift.host.memory import available_processors
from weightlift.staging import plan_device_pool, plan_pool
from weightlift.types import Staging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.host.gpu import GpuRuntime
    from weightlift.operations import Extent
    from weightlift.options import LoadOptions
    from weightlift.staging import Pool


def size_staging(
    extents: Sequence[Extent],
    options: LoadOptions,
    *,
    devices: int,
    total_bytes: int,
    cached_bytes: int,
    open_ended: bool,
) -> Pool:
    """Slots and concurrency for what will be read.

    Args:
        extents: what will be read, as far as it is known.
        options: the caller's options.
        devices: how many devices copies out of the slots go to.
        total_bytes: bytes of all tensors.
        cached_bytes: bytes of the shards that the page cache holds.
        open_ended: more extents will follow.

    Raises:
        BudgetError: fixed workers and chunks do not fit the budget.
    """
    # Views of mapped files need no worker, and asking control groups takes as long as making dozens of them.
    processors = available_processors() if extents or open_ended else 1
    if devices:
        stored = sum(extent.length for extent in extents if not extent.resident)
        return plan_device_pool(
            extents,
            budget_bytes=options.staging_memory,
            processors=processors,
            workers=options.workers,
            chunk_bytes=options.chunk_bytes,
            total_bytes=total_bytes,
            stored_bytes=max(0, total_bytes - cached_bytes) if open_ended else stored,
            pinned=options.staging is not Staging.PAGEABLE,
            devices=devices,
        )
    return plan_pool(
        extents,
        budget_bytes=options.staging_memory,
        processors=processors,
        workers=options.workers,
        chunk_bytes=options.chunk_bytes,
        open_ended=open_ended,
    )


def take_staging(
    pool: Pool, options: LoadOptions, runtime: GpuRuntime | None, ordinals: Sequence[int]
) -> SlotPool | StagingLoan:
    """The memory of the slots.

    Args:
        pool: how many there are and how large.
        options: the caller's options.
        runtime: the devices' runtime; ``None`` where none is copied to.
        ordinals: the devices' numbers.
    """
    if runtime is None:
        return SlotPool(pool.slot_count, pool.slot_bytes)
    return borrow_staging(
        runtime,
        ordinals,
        pool.slot_bytes,
        pool.slot_count,
        pinned=options.staging is not Staging.PAGEABLE,
        most_bytes=options.staging_memory,
    )
