"""Runs of cases in alternating rounds: workers start side by side, then load one after the other, each alone.

Starting costs a loader's process more than loading does, most of it imports and a device's context. Started side by
side and waiting, workers neither compute nor read, so what is measured is one load at a time in a process that has done
none. Knows nothing of particular loaders.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import harness
from claims import Run
from harness import Case

from weightlift.bench.cache_states import StateNotReached
from weightlift.bench.process import Worker, WorkerFailure, start_together
from weightlift.bench.rounds import turns
from weightlift.errors import WeightliftError
from weightlift.health.cache.evict import evict
from weightlift.health.cache.files import find_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TOGETHER = 12
"""Workers that wait at once; each takes some hundred MB on the host and, with one, on the device."""

STATE_ATTEMPTS = 3
FAILURES = (
    WorkerFailure,
    StateNotReached,
    WeightliftError,
    RuntimeError,
    OSError,
    ValueError,
    subprocess.SubprocessError,
)
"""What ends a run and not the benchmark."""

Turn = tuple[int, Case]
Started = Worker | Exception
"""A worker that is ready, or what went wrong."""

Measure = Callable[[Case, Worker, bool], Run]
"""Has a worker that is ready load, and says what was seen; whether all tensors are compared, or a few."""

Note = Callable[[int, Case, Run], None]


def rounds(
    cases: Sequence[Case],
    count: int,
    note: Note = lambda *_: None,
    *,
    deadline: float = math.inf,
    using: Measure = harness.measure,
    make_room: bool = True,
) -> dict[str, list[Run]]:
    """Run every case once per round, each round beginning with another; only whole rounds that end in time count.

    Args:
        cases: what to run.
        count: how many rounds.
        note: called after every run.
        deadline: monotonic time after which no run begins; the first round is finished all the same.
        using: how a worker is measured.
        make_room: before a run, drop the files of others from the page cache.
    """
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    assert len(runs) == len(cases), "two cases of one name"
    order = [(number, case) for number in range(count) for case in turns(cases, number, count)]
    for first in range(0, len(order), TOGETHER):
        group = order[first : first + TOGETHER]
        if _too_late(group[0], deadline):
            break
        with _started(group) as workers:
            for turn in group:
                number, case = turn
                if _too_late(turn, deadline):
                    break
                if make_room:
                    _evict_others(case, cases)
                run = _measure(case, workers.get((number, case.name)), number == 0, using)
                runs[case.name].append(run)
                note(number, case, run)
    whole = min(map(len, runs.values()), default=0)
    return {name: made[:whole] for name, made in runs.items()}


def _too_late(turn: Turn, deadline: float) -> bool:
    return turn[0] > 0 and time.monotonic() > deadline


def once(case: Case) -> Run:
    """Prepare the state, run a case once and return what was seen; a failure becomes an ``error`` entry."""
    with _started([(0, case)]) as workers:
        return _measure(case, workers.get((0, case.name)), False, harness.measure)


@contextlib.contextmanager
def _started(group: Sequence[Turn]) -> Iterator[Mapping[tuple[int, str], Started]]:
    """A worker for every case in every round, with its devices in use, started side by side."""
    with contextlib.ExitStack() as stack:
        makers = {
            (number, case.name): partial(harness.start, case) for number, case in group if not case.contestant.command
        }
        yield start_together(makers, stack, FAILURES)


def _measure(case: Case, worker: Started | None, check_all: bool, using: Measure) -> Run:
    """One run. A state that was not reached is tried again: nothing ran yet, and kernels take pages back meanwhile."""
    if isinstance(worker, Exception):
        return {"error": error_text(worker)}
    with worker or contextlib.nullcontext(), _busy_process(case.beside == "process"):
        for left in reversed(range(STATE_ATTEMPTS)):
            try:
                return harness.measure_program(case) if worker is None else using(case, worker, check_all)
            except FAILURES as error:
                if not left or not isinstance(error, StateNotReached):
                    return {"error": error_text(error)}
    raise AssertionError("the last attempt returns")


def error_text(error: BaseException) -> str:
    """What results say of a failure; a worker names the class of its own."""
    return str(error) if isinstance(error, WorkerFailure) else f"{type(error).__name__}: {error}"


def _evict_others(case: Case, cases: Sequence[Case]) -> None:
    """Drop what other cases read from the page cache, where it would take memory that this one needs."""
    others = {file for one in cases for file in one.checkpoint.files} - set(case.checkpoint.files)
    if others:
        evict(find_files(sorted(others)))


@contextlib.contextmanager
def _busy_process(wanted: bool) -> Iterator[None]:
    """Keep one processor busy meanwhile, if wanted."""
    if not wanted:
        yield
        return
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        spinner.kill()
        spinner.wait()
