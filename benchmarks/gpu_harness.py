"""Running loaders onto GPUs: workers start together, then load one after the other, each alone.

Starting costs a loader's process more than loading, most of it torch and the device's context. Started side by side and
waiting, workers neither compute nor read, so what is measured is one load at a time in a process that has done none.
Knows nothing of particular loaders.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import harness
import states
from gpu_memory import DeviceMemory, Watch
from harness import FAILURES, Case, error_text

from weightlift.bench.process import START_SECONDS, Worker
from weightlift.bench.rounds import turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from claims import Run

SPARE_BYTES = 1 << 30
"""Memory that is backed before a run beside the page cache it fills and what its loader is known to take."""
CHECK_EVERY = 32
TOGETHER = 12
"""Workers that wait at once; each takes some hundred MB on the host and on the device, and two seconds of the driver's
time to start."""

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


Turn = tuple[int, Case]
Started = Worker | str
"""A worker that is ready, or what went wrong."""


def ordinals(case: Case) -> list[int]:
    """Numbers of the GPUs among a case's devices."""
    return [int(name.partition(":")[2] or 0) for name in case.devices if name.startswith("cuda")]


@contextlib.contextmanager
def started(group: Sequence[Turn]) -> Iterator[Mapping[tuple[int, str], Started]]:
    """A worker for every case in every round, with its devices in use, started side by side."""
    with contextlib.ExitStack() as stack:
        workers = {
            (number, case.name): stack.enter_context(harness.start(case))
            for number, case in group
            if not case.contestant.command
        }
        ready: dict[tuple[int, str], Started] = {}
        for turn, worker in workers.items():
            try:
                worker.hear("ready", START_SECONDS)
                ready[turn] = worker
            except FAILURES as error:
                ready[turn] = error_text(error)
        yield ready


def measure(case: Case, worker: Started | None, *, check_all: bool) -> Run:
    """One case of a round; a failure becomes an ``error`` entry."""
    try:
        if case.contestant.command:
            return harness.measure_program(case)
        if not isinstance(worker, Worker):
            return {"error": worker or "it was not started"}
        with worker:
            return _measure(case, worker, check_all=check_all)
    except FAILURES as error:
        return {"error": error_text(error)}


def _measure(case: Case, worker: Worker, *, check_all: bool) -> Run:
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


def rounds(
    cases: Sequence[Case],
    count: int,
    deadline: float,
    note: Callable[[int, Case, Run], None] = lambda *_: None,
) -> dict[str, list[Run]]:
    """Run every case once per round, each round beginning with another; only whole rounds that end in time count.

    Args:
        cases: what to run.
        count: how many rounds.
        deadline: monotonic time after which no run begins; the first round is finished all the same.
        note: called after every run.
    """
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    assert len(runs) == len(cases), "two cases of one name"
    order = [(number, case) for number in range(count) for case in turns(cases, number, count)]
    for first in range(0, len(order), TOGETHER):
        group = order[first : first + TOGETHER]
        if _too_late(group[0], deadline):
            break
        with started(group) as workers:
            for turn in group:
                number, case = turn
                if _too_late(turn, deadline):
                    break
                run = measure(case, workers.get((number, case.name)), check_all=number == 0)
                runs[case.name].append(run)
                note(number, case, run)
    whole = min(map(len, runs.values()))
    return {name: made[:whole] for name, made in runs.items()}


def _too_late(turn: Turn, deadline: float) -> bool:
    return turn[0] > 0 and time.monotonic() > deadline


def memory_needed(case: Case, taken: int = 0) -> int:
    """Bytes of host memory that a run of the case will take at most, of which the loader itself takes ``taken``."""
    grows = case.state is not states.CacheState.WARM
    return SPARE_BYTES + taken + grows * case.checkpoint.tensor_bytes
