"""What is measured, and how one run of it is: the case, its page-cache state, its load and the figures taken of it.

Workers, cache states and the looking at memory are those of ``weightlift bench`` (:mod:`weightlift.bench`); this owns
what a case is, and the figures that are taken of it. It knows nothing of particular loaders: a contestant is a command
line, a request and environment variables.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import states
from claims import Run, spread

from weightlift.bench.backed_memory import back_memory
from weightlift.bench.cache_states import COLD_SHARE_MAX, ModelFiles, Snapshot, StateNotReached
from weightlift.bench.memory import MemoryWatch
from weightlift.bench.process import CHECK_SECONDS, Worker, load_seconds
from weightlift.bench.rounds import SPARE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MIB = 1 << 20
WORKER = Path(__file__).resolve().parent / "worker.py"
CHECK_EVERY = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The files under measurement, and what their tensors must turn out to be.

    Attributes:
        path: what weightlift is given.
        files: the shards, as paths.
        tensor_bytes: bytes of all tensors.
        tensors: how many there are.
        digests: a JSON file with the checksum of every tensor.
    """

    path: str
    files: tuple[str, ...]
    tensor_bytes: int
    tensors: int
    digests: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """Something that reads the files: a loader in ``worker.py``, or a program with its own clock.

    Attributes:
        adapter: the worker's loader; empty for a program of its own.
        options: keywords for the loader; ``device`` among them overrides the case's.
        environment: environment variables it is configured by.
        python: the interpreter that has it installed.
        import_from: folders that come first on its import path.
        mapped: it hands out mappings, so that time is also taken with every page touched.
        touch: through what every page of a mapping is touched: the ``tensors``, one by one, or the ``mappings`` of the
            files, which costs the same however many tensors there are.
        delivers: it hands out tensors, whose bytes are checked and are no overhead.
        command: for a program: its command line, which ends in one JSON object on standard output.
        prefix: words put before the worker's command line, as those that enter a control group.
    """

    adapter: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    python: str = sys.executable
    import_from: tuple[str, ...] = ()
    mapped: bool = False
    touch: str = "tensors"
    delivers: bool = True
    command: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of a section.

    Attributes:
        name: unique in its section.
        contestant: what runs.
        checkpoint: what it reads.
        state: page cache before the run.
        beside: ``"thread"`` for a Python thread that computes in the same process, ``"process"`` for another process.
        loads: how often the load is repeated in one process; the last one counts.
        memory_bytes: memory that must be backed by the host before the run; ``None`` works it out.
        devices: where to; the first one for loaders that know only one.
    """

    name: str
    contestant: Contestant
    checkpoint: Checkpoint
    state: states.CacheState = states.CacheState.COLD
    beside: str = ""
    loads: int = 1
    memory_bytes: int | None = None
    devices: tuple[str, ...] = ("cpu",)


def summary(case: Case, runs: Sequence[Run], figures: Sequence[str] | None = None) -> dict[str, Any]:
    """Median, smallest and largest of what the runs of one case gave, with the runs themselves.

    Args:
        case: what ran.
        runs: what it gave, round by round.
        figures: which figures to sum up; :data:`FIGURES` by default.
    """
    good = [run for run in runs if "error" not in run]
    contestant = case.contestant
    head = {
        "name": case.name,
        "state": str(case.state),
        "beside": case.beside or None,
        "adapter": contestant.adapter or Path(contestant.command[0]).name,
        "options": dict(contestant.options) or list(contestant.command[1:]),
        "environment": dict(contestant.environment),
        "errors": sorted({run["error"] for run in runs if "error" in run}),
    }
    spreads = {
        key: spread([run[key] for run in good if run.get(key) is not None])
        for key in (FIGURES if figures is None else figures)
    }
    return head | {key: value for key, value in spreads.items() if value} | {"runs": list(runs)}


FIGURES = (
    "seconds",
    "first_seconds",
    "touched_seconds",
    "gigabytes_per_second",
    "extra_anonymous_bytes",
    "microseconds_per_tensor",
    "description_bytes_per_tensor",
    "resident_before",
    "resident_after",
    "resident_added",
    "resident_kept",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """Files in the state that a case wants.

    Attributes:
        files: the files.
        before: what was cached of them.
        seconds: what it took to have memory backed.
    """

    files: ModelFiles
    before: Snapshot
    seconds: float

    def change(self) -> Run:
        """What has become of the page cache since, in fractions of the files or of what was there."""
        total, before = self.files.total_bytes, self.before.cached_bytes or 0
        after, added = self.files.cached_bytes() or 0, self.files.added_bytes(self.before) or 0
        return {
            "resident_before": before / total,
            "resident_after": after / total,
            "resident_added": added / total,
            "resident_kept": (after - added) / before if before else None,
            "memory_warmed_seconds": self.seconds,
        }


def prepare(case: Case) -> Prepared:
    """Page-cache state and backed memory, just before the load.

    Raises:
        StateNotReached: the state was not reached, or did not last.
    """
    files, before = states.prepare(case.checkpoint.files, case.state)
    begin = time.perf_counter()
    back_memory(_memory_bytes(case))
    seconds = time.perf_counter() - begin
    if abs((files.cached_bytes() or 0) - (before.cached_bytes or 0)) > COLD_SHARE_MAX * files.total_bytes:
        raise StateNotReached("the page cache changed while memory was prepared: too little of it is free")
    return Prepared(files, before, seconds)


def _memory_bytes(case: Case) -> int:
    """Memory that a load takes at most, its page cache included."""
    if case.memory_bytes is not None:
        return case.memory_bytes
    owns = case.contestant.delivers and not case.contestant.mapped
    grows = case.state is not states.CacheState.WARM
    return case.checkpoint.tensor_bytes * (owns + grows) + SPARE_BYTES


def measure_program(case: Case) -> Run:
    """Prepare the state and run a program that has its own clock."""
    command, prepared = case.contestant.command, prepare(case)
    limit = load_seconds(case.checkpoint.tensor_bytes)
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} left with {done.returncode}: {done.stderr.strip()[-300:]}")
    told: Run = json.loads(done.stdout.splitlines()[-1])
    return told | prepared.change()


def request(case: Case) -> dict[str, Any]:
    """What the worker of a case is to do."""
    contestant, checkpoint = case.contestant, case.checkpoint
    options = dict(contestant.options)
    devices = [options.pop("device")] if "device" in options else list(case.devices)
    return {
        "loader": contestant.adapter,
        "path": checkpoint.path,
        "files": checkpoint.files,
        "device": devices[0],
        "devices": devices,
        "options": options,
        "touch": contestant.touch if contestant.mapped else "",
        "import_from": contestant.import_from,
        "busy_thread": case.beside == "thread",
    }


def start(case: Case) -> Worker:
    """A worker for a case, not yet ready."""
    contestant = case.contestant
    return Worker(request(case), contestant.environment, (*contestant.prefix, contestant.python, str(WORKER)))


def loaded(case: Case, worker: Worker, look: Callable[[], None] | None = None) -> Run:
    """Have a worker load; returns its figures.

    Args:
        case: what it loads.
        worker: is ready.
        look: takes a look at its memory; without it nothing is looked at.
    """
    worker.say("go")
    return worker.hear("loaded", load_seconds(case.checkpoint.tensor_bytes), look)


def checked(case: Case, worker: Worker, every: int) -> Run:
    """Have one in so many of the tensors compared, where the loader hands them out and digests are known."""
    if not case.contestant.delivers or not case.checkpoint.digests:
        return {}
    worker.say({"digests": case.checkpoint.digests, "every": every})
    return worker.hear("checked", CHECK_SECONDS)


def measure(case: Case, worker: Worker, check_all: bool) -> Run:
    """Prepare the state and have a worker that is ready load.

    Raises:
        StateNotReached: the state was not reached; nothing was loaded yet.
        WorkerFailure: the load failed, or took too long.
    """
    contestant, checkpoint = case.contestant, case.checkpoint
    prepared = prepare(case)
    memory = MemoryWatch(worker.process_id)
    told = [loaded(case, worker, memory.look)]
    while len(told) < case.loads:
        # What the load before gave back is free again, so that a host may have taken it, as before the first.
        back_memory(_memory_bytes(case))
        told.append(loaded(case, worker, memory.look))
    change = prepared.change()
    compared = checked(case, worker, 1 if check_all else CHECK_EVERY)
    last = told[-1]
    seconds = last["touched_seconds"] if contestant.mapped else last["seconds"]
    owned = checkpoint.tensor_bytes if contestant.delivers and not contestant.mapped else 0
    anonymous = memory.peaks().anonymous_bytes or 0
    return {
        **last,
        **compared,
        **change,
        "first_seconds": told[0]["seconds"],
        "microseconds_per_tensor": seconds / checkpoint.tensors * 1e6,
        "description_bytes_per_tensor": _description_bytes(last) / checkpoint.tensors,
        "gigabytes_per_second": checkpoint.tensor_bytes / seconds / 1e9,
        "peak_anonymous_bytes": anonymous,
        "extra_anonymous_bytes": anonymous - owned,
        "peaks": memory.peak,
    }


def _description_bytes(told: Run) -> int:
    memory = told.get("report", {}).get("host_memory", {})
    return int(told.get("description_bytes") or memory.get("description_bytes") or 0)
