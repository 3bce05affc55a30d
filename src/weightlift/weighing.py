"""Gathers what :mod:`weightlift.fitting` compares: what a load will take, and what host and devices have.

Asks the machine and the devices' runtimes, reads nothing of the checkpoint's data and allocates nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from weightlift.errors import DeviceError
from weightlift.fitting import DeviceFit, FitReport, staging_budget
from weightlift.host.memory import available_processors, headroom
from weightlift.staging import plan_device_pool, plan_pool
from weightlift.types import Staging

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weightlift.description import Description
    from weightlift.options import LoadOptions
    from weightlift.targets.device import DeviceAccess


def weigh(
    description: Description,
    options: LoadOptions,
    *,
    host_bytes: int = 0,
    mapped_bytes: int = 0,
    staged_bytes: int = 0,
    accesses: Sequence[DeviceAccess] = (),
    device_bytes: Mapping[str, int] | None = None,
    thorough: bool = False,
) -> FitReport:
    """Compare what a load will take with what there is.

    Args:
        description: the checkpoint.
        options: how it is loaded.
        host_bytes: what tensors take in host memory.
        mapped_bytes: what is handed out as views of the files.
        staged_bytes: most bytes that may pass through staging.
        accesses: the GPUs that are reached through their runtime.
        device_bytes: what the tensors take on each device that is not the CPU, by its name.
        thorough: ask the framework what its allocator could reuse even where free memory suffices; that takes a moment.
    """
    room = headroom()
    fixed = options.workers is not None or options.chunk_bytes is not None
    budget = options.host_memory if fixed else staging_budget(options.host_memory, host_bytes, staged_bytes, room)
    return FitReport(
        tensor_bytes=host_bytes,
        mapped_bytes=mapped_bytes,
        staging_bytes=_staging_bytes(options, accesses, staged_bytes, budget),
        budget_bytes=budget,
        requested_budget_bytes=options.host_memory,
        description_bytes=description.nbytes,
        devices=tuple(_devices(accesses, device_bytes or {}, thorough=thorough)),
        room=room,
    )


def within(fit: FitReport, options: LoadOptions) -> LoadOptions:
    """The options with the budget that the machine has room for."""
    return options if fit.budget_bytes == options.host_memory else replace(options, host_memory=fit.budget_bytes)


def _staging_bytes(options: LoadOptions, accesses: Sequence[DeviceAccess], staged_bytes: int, budget: int) -> int:
    if not staged_bytes:
        return 0
    processors = available_processors()
    if accesses:
        # Which of the two it will be is known once the page cache has been looked at.
        pools = [
            plan_device_pool(
                (),
                budget_bytes=budget,
                processors=processors,
                workers=options.workers,
                chunk_bytes=options.chunk_bytes,
                total_bytes=staged_bytes,
                stored_bytes=stored_bytes,
                pinned=options.staging is not Staging.PAGEABLE,
                devices=len(accesses),
            )
            for stored_bytes in (0, staged_bytes)
        ]
    else:
        pools = [
            plan_pool(
                (),
                budget_bytes=budget,
                processors=processors,
                workers=options.workers,
                chunk_bytes=options.chunk_bytes,
                open_ended=True,
            )
        ]
    return max(min(pool.slot_count, -(-staged_bytes // pool.chunk_bytes_max)) * pool.slot_bytes for pool in pools)


def _devices(
    accesses: Sequence[DeviceAccess], device_bytes: Mapping[str, int], *, thorough: bool
) -> Iterator[DeviceFit]:
    reached = {access.device: access for access in accesses}
    for device, nbytes in device_bytes.items():
        access = reached.get(device)
        if access is None:
            yield DeviceFit(device=device, tensor_bytes=nbytes)
            continue
        try:
            free, total = access.runtime.memory_info(access.ordinal)
        except DeviceError:
            # The load itself will meet the same trouble and report it as what it is.
            yield DeviceFit(device=device, tensor_bytes=nbytes)
            continue
        reusable = access.memory.reusable_bytes() if thorough or nbytes > free else None
        yield DeviceFit(device=device, tensor_bytes=nbytes, free_bytes=free, reusable_bytes=reusable, total_bytes=total)
