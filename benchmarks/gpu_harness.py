"""Running loaders onto GPUs: workers start together, then load one after the other, each alone.

Starting costs a loader's process more than loading, most of it torch and the device's context. Started side by side and
waiting, workers neither compute nor read, so what is measured is one load at a time in a process that has done none.
Owns the talk with ``gpu_worker.py``; knows nothing of particular loaders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import harness
import states
from gpu_memory import DeviceMemory, Watch
from harness import Case, WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from claims import Run

WORKER = Path(__file__).resolve().parent / "gpu_worker.py"
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuCase(Case):
    """One load onto devices.

    Attributes:
        devices: where to; the first one for loaders that know only one.
    """

    devices: tuple[str, ...] = ("cuda:0",)

    @property
    def ordinals(self) -> list[int]:
        """Numbers of the GPUs among the devices."""
        return [int(name.partition(":")[2] or 0) for name in self.devices if name.startswith("cuda")]


class GpuWorker(WorkerProcess):
    """A worker that waits with its devices in use; memory is looked at from outside.

    Args:
        case: what it will load.
    """

    def __init__(self, case: GpuCase) -> None:
        contestant = case.contestant
        request = {
            "adapter": contestant.adapter,
            "options": dict(contestant.options),
            "import_from": contestant.import_from,
            "path": case.checkpoint.path,
            "files": case.checkpoint.files,
            "devices": case.devices,
            "busy_thread": case.beside == "thread",
            "digests": case.checkpoint.digests,
        }
        command = (contestant.python, str(WORKER), json.dumps(request))
        super().__init__(command, contestant.environment)
        self._ordinals = case.ordinals
        self._watch: Watch | None = None

    def watch(self) -> None:
        """Begin to look at memory; peaks count from here."""
        self._watch = Watch(self.pid, DeviceMemory(self._ordinals))

    def sample(self) -> None:
        """Look once."""
        if self._watch is not None:
            self._watch.observe()

    def peaks(self) -> dict[str, int | None]:
        """Growth of every kind of memory since :meth:`watch`."""
        return self._watch.finish() if self._watch is not None else {}


Turn = tuple[int, "GpuCase"]


@contextlib.contextmanager
def started(turns: Sequence[Turn]) -> Iterator[Mapping[tuple[int, str], GpuWorker | str]]:
    """A worker for every case in every round, ready or with what went wrong, started side by side."""
    with contextlib.ExitStack() as stack:
        workers = {
            (number, case.name): stack.enter_context(GpuWorker(case))
            for number, case in turns
            if not case.contestant.command
        }
        ready: dict[tuple[int, str], GpuWorker | str] = {}
        for turn, worker in workers.items():
            try:
                worker.hear("ready")
                ready[turn] = worker
            except (RuntimeError, OSError, ValueError) as error:
                ready[turn] = f"{type(error).__name__}: {error}"
        yield ready


def measure(case: GpuCase, worker: GpuWorker | str | None, *, check_all: bool) -> Run:
    """One case of a round; a failure becomes an ``error`` entry."""
    try:
        if case.contestant.command:
            return harness.measure_program(case)
        if not isinstance(worker, GpuWorker):
            return {"error": worker or "it was not started"}
        with worker:
            return _measure(case, worker, check_all=check_all)
    except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _measure(case: GpuCase, worker: GpuWorker, *, check_all: bool) -> Run:
    checkpoint = case.checkpoint
    before, warmed = harness.prepare(case)
    worker.watch()
    worker.say("go")
    run = worker.hear("loaded", sample=True)
    run |= harness.cache_change(case, before) | {"memory_warmed_seconds": warmed}
    run |= worker.peaks()
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
        worker.say("go")
        again = worker.hear("loaded")
        run["second_seconds"] = again["seconds"]
        run["second_gigabytes_per_second"] = size / again["seconds"] / 1e9
    worker.say(f"check {1 if check_all else CHECK_EVERY}")
    return run | worker.hear("checked")


def rounds(
    cases: Sequence[GpuCase],
    count: int,
    deadline: float,
    note: Callable[[int, GpuCase, Run], None] = lambda *_: None,
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
    turns = list(_turns(cases, count))
    for first in range(0, len(turns), TOGETHER):
        group = turns[first : first + TOGETHER]
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


def _turns(cases: Sequence[GpuCase], count: int) -> Iterator[Turn]:
    for number in range(count):
        shift = number * max(1, len(cases) // count) % len(cases)
        for case in (*cases[shift:], *cases[:shift]):
            yield number, case


def _too_late(turn: Turn, deadline: float) -> bool:
    return turn[0] > 0 and time.monotonic() > deadline


def memory_needed(case: GpuCase, taken: int = 0) -> int:
    """Bytes of host memory that a run of the case will take at most, of which the loader itself takes ``taken``."""
    grows = case.state is not states.CacheState.WARM
    return SPARE_BYTES + taken + grows * case.checkpoint.tensor_bytes
