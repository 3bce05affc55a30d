"""How one run of a load onto GPUs is measured, and the figures taken of it. Knows nothing of particular loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import harness
import states
from gpu_memory import DeviceMemory, Watch
from harness import Case

if TYPE_CHECKING:
    from claims import Run

    from weightlift.bench.process import Worker

SPARE_BYTES = 1 << 30
"""Memory that is backed before a run beside the page cache it fills and what its loader is known to take."""
CHECK_EVERY = 32

FIGURES = (
    "seconds",
    "gigabytes_per_second",
    "second_gigabytes_per_second",
    "first_tensor_seconds",
    "processor_seconds",
    "peak_anonymous_bytes",
    "peak_driver_mapped_bytes",
    "peak_kernel_pinned_bytes",
    "pinned_bytes",
    "device_extra_bytes",
    "device_grown_extra_bytes",
    "microseconds_per_tensor",
    "resident_added",
)


def ordinals(case: Case) -> list[int]:
    """Numbers of the GPUs among a case's devices."""
    return [int(name.partition(":")[2] or 0) for name in case.devices if name.startswith("cuda")]


def measure(case: Case, worker: Worker, check_all: bool) -> Run:
    """Prepare the state and have a worker that is ready load, as often as the case wants, with the device watched."""
    checkpoint = case.checkpoint
    prepared = harness.prepare(case)
    memory = Watch(worker.process_id, DeviceMemory(ordinals(case)))
    run = harness.loaded(case, worker, memory.look)
    run |= prepared.change() | memory.finish()
    if not case.contestant.delivers:
        return run
    size = checkpoint.tensor_bytes
    run["gigabytes_per_second"] = size / run["seconds"] / 1e9
    run["microseconds_per_tensor"] = run["seconds"] / checkpoint.tensors * 1e6
    for figure, source in (
        ("device_extra_bytes", "device_reserved_bytes"),
        ("device_grown_extra_bytes", "device_grown_bytes"),
    ):
        run[figure] = run[source] - size if run.get(source) is not None else None
    report = run.pop("report", None)
    if report is not None:
        run["pinned_bytes"] = report["host_memory"]["peak_pinned_bytes"]
        run["phases"], run["decided"] = report["phases"], report["method"]["reason"]
        run["bottleneck"], run["workers"] = report["bottleneck"], report.get("workers")
        run["worker_seconds"] = report.get("worker_seconds")
    for _ in range(case.loads - 1):
        again = harness.loaded(case, worker)
        run["second_seconds"] = again["seconds"]
        run["second_gigabytes_per_second"] = size / again["seconds"] / 1e9
    return run | harness.checked(case, worker, 1 if check_all else CHECK_EVERY)


def memory_needed(case: Case, taken: int = 0) -> int:
    """Bytes of host memory that a run of the case will take at most, of which the loader itself takes ``taken``."""
    grows = case.state is not states.CacheState.WARM
    return SPARE_BYTES + taken + grows * case.checkpoint.tensor_bytes
