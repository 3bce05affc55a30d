"""Running contestants in fresh processes, in alternating rounds, and summing the runs up.

Owns the protocol with ``worker.py``, the sampling of memory and the arithmetic of medians and ratios. It knows nothing
of particular loaders: a contestant is a command line, a request and environment variables.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import environment
import states
from claims import Run, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MIB = 1 << 20
WORKER = Path(__file__).resolve().parent / "worker.py"
SAMPLE_SECONDS = 0.004
TIMEOUT_SECONDS = 600.0
CHECK_EVERY = 16
STATE_ATTEMPTS = 3
SPARE_BYTES = 256 * MIB
KINDS = ("RssAnon", "RssFile", "RssShmem", "VmLck", "VmPin")
"""Kinds of memory that are sampled, as ``/proc/PID/status`` calls them."""


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
        adapter: the worker's sub-command; empty for a program of its own.
        options: keywords for the loader.
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
    """

    name: str
    contestant: Contestant
    checkpoint: Checkpoint
    state: states.CacheState = states.CacheState.COLD
    beside: str = ""
    loads: int = 1
    memory_bytes: int | None = None


def measure(case: Case, *, check_all: bool = False) -> Run:
    """Prepare the state, run the case once and return what was seen; a failure becomes an ``error`` entry.

    A state that was not reached is tried again, since nothing ran yet: the kernel may take pages back meanwhile.
    """
    for left in reversed(range(STATE_ATTEMPTS)):
        try:
            with busy_process(case.beside == "process"):
                return measure_program(case) if case.contestant.command else _measure_worker(case, check_all)
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
            if not left or not isinstance(error, states.CacheStateError):
                return {"error": f"{type(error).__name__}: {error}"}
    raise AssertionError("the last attempt returns")


def rounds(
    cases: Sequence[Case], count: int, note: Callable[[int, Case, Run], None] = lambda *_: None
) -> dict[str, list[Run]]:
    """Run every case once per round, each round starting with another case."""
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    assert len(runs) == len(cases), "two cases of one name"
    for number in range(count):
        shift = number * max(1, len(cases) // count) % len(cases)
        for case in (*cases[shift:], *cases[:shift]):
            run = measure(case, check_all=number == 0)
            runs[case.name].append(run)
            note(number, case, run)
    return runs


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


def prepare(case: Case) -> tuple[Any, float]:
    """Page-cache state and backed memory, just before the load; returns residency and the seconds for the memory."""
    files, size = case.checkpoint.files, case.checkpoint.tensor_bytes
    before = states.prepare(files, case.state)
    owns = case.contestant.delivers and not case.contestant.mapped
    grows = case.state is not states.CacheState.WARM
    needed = size * (owns + grows) + SPARE_BYTES if case.memory_bytes is None else case.memory_bytes
    seconds = environment.warm_memory(needed)
    if abs(float(states.residency(files).mean() - before.mean())) > states.COLD_RESIDENT_MAX:
        raise states.CacheStateError("the page cache changed while memory was prepared: too little of it is free")
    return before, seconds


def measure_program(case: Case) -> Run:
    """Prepare the state and run a program that has its own clock."""
    before, warmed = prepare(case)
    done = subprocess.run(case.contestant.command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.contestant.command[0]} left with {done.returncode}: {done.stderr.strip()[-300:]}")
    told: Run = json.loads(done.stdout.splitlines()[-1])
    return told | cache_change(case, before) | {"memory_warmed_seconds": warmed}


def _measure_worker(case: Case, check_all: bool) -> Run:
    contestant, checkpoint = case.contestant, case.checkpoint
    request = {
        "adapter": contestant.adapter,
        "options": dict(contestant.options),
        "import_from": contestant.import_from,
        "path": checkpoint.path,
        "files": checkpoint.files,
        "touch": contestant.touch if contestant.mapped else "",
        "loads": case.loads,
        "busy_thread": case.beside == "thread",
        "digests": checkpoint.digests if contestant.delivers else None,
        "check_every": 1 if check_all else CHECK_EVERY,
    }
    command = (*contestant.prefix, contestant.python, str(WORKER), json.dumps(request))
    with WorkerProcess(command, contestant.environment) as worker:
        worker.hear("ready")
        before, warmed = prepare(case)
        base = worker.anonymous_bytes()
        worker.say("go")
        told = worker.hear("loaded", sample=True)
        change = cache_change(case, before)
        worker.say("check")
        checked = worker.hear("checked")
    seconds = told["touched_seconds"] if contestant.mapped else told["seconds"]
    owned = checkpoint.tensor_bytes if contestant.delivers and not contestant.mapped else 0
    return {
        **told,
        **checked,
        **change,
        "memory_warmed_seconds": warmed,
        "microseconds_per_tensor": seconds / checkpoint.tensors * 1e6,
        "description_bytes_per_tensor": _description_bytes(told) / checkpoint.tensors,
        "gigabytes_per_second": checkpoint.tensor_bytes / seconds / 1e9,
        "peak_anonymous_bytes": worker.peak_bytes - base,
        "extra_anonymous_bytes": worker.peak_bytes - base - owned,
        "peaks": worker.peak_kinds,
    }


def _description_bytes(told: Run) -> int:
    memory = told.get("report", {}).get("host_memory", {})
    return int(told.get("description_bytes") or memory.get("description_bytes") or 0)


def cache_change(case: Case, before: Any) -> Run:
    """What has become of the files' residency since ``before``."""
    after = states.residency(case.checkpoint.files)
    resident = int(before.sum())
    return {
        "resident_before": float(before.mean()),
        "resident_after": float(after.mean()),
        "resident_added": float((after & ~before).mean()),
        "resident_kept": float((after & before).sum() / resident) if resident else None,
    }


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
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


class WorkerProcess:
    """The parent's end of the talk with one worker process.

    Args:
        command: the worker's command line.
        environment: environment variables it gets on top of the parent's.

    Attributes:
        peak_bytes: most anonymous memory seen in samples.
        peak_kinds: most memory of every kind seen in samples, by the kernel's name for it.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.peak_bytes = 0
        self.peak_kinds = dict.fromkeys(KINDS, 0)
        # A file, because nobody empties a pipe while the worker runs.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **environment},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def sample(self) -> None:
        """Look at the worker's memory once."""
        for kind, nbytes in self.memory().items():
            self.peak_kinds[kind] = max(self.peak_kinds[kind], nbytes)
        self.peak_bytes = self.peak_kinds["RssAnon"]

    def say(self, word: str) -> None:
        """One word to the worker."""
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def hear(self, event: str, *, sample: bool = False) -> Run:
        """Wait for ``event``, watching memory meanwhile, and return what came with it."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + TIMEOUT_SECONDS
        wait = SAMPLE_SECONDS if sample else 1.0
        while not select.select([self._process.stdout], [], [], wait)[0]:
            if sample:
                self.sample()
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {event!r} within {TIMEOUT_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words(event))
        values: Run = json.loads(line)
        if values.pop("event") != event:
            raise RuntimeError(f"expected {event!r}, got {line.strip()}")
        if sample:
            self.sample()
        return values

    def anonymous_bytes(self) -> int:
        """The worker's resident anonymous memory right now."""
        return self.memory().get("RssAnon", 0)

    def memory(self) -> dict[str, int]:
        """The worker's memory of every kind right now, in bytes."""
        with open(f"/proc/{self._process.pid}/status") as status:
            fields = (line.partition(":") for line in status)
            return {name: int(value.split()[0]) * 1024 for name, _, value in fields if name in KINDS}

    def _last_words(self, event: str) -> str:
        self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines() or ["no message"]
        return f"worker ended before {event!r}: {words[-1]}"
