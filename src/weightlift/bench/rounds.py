"""The rounds of a benchmark: fresh processes, one load each, with the page cache prepared and verified before.

In every round the ceilings of a state of the page cache come first, then the loads out of it, each round beginning with
another contestant, so that a slow minute of the machine hits all. Starting torch and a device takes a process longer
than most loads, so a few start side by side; then they wait, without computing, and load one after the other. An
interrupt ends the workers under way and leaves what was found so far.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from weightlift.bench.backed_memory import back_memory
from weightlift.bench.cache_states import StateNotReached
from weightlift.bench.ceilings import CeilingProbe, Ceilings
from weightlift.bench.memory import MemoryWatch
from weightlift.bench.process import (
    CHECK_SECONDS,
    SAMPLE_SECONDS,
    Worker,
    WorkerFailure,
    load_seconds,
    start_together,
)
from weightlift.bench.results import Run
from weightlift.bench.samples import sample_parts
from weightlift.errors import printable
from weightlift.units import MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weightlift.bench.cache_states import ModelFiles
    from weightlift.bench.contestants import Contestant
    from weightlift.description import Description
    from weightlift.health.cache.files import FoundFile

Item = TypeVar("Item")

SPARE_BYTES: Final = 256 * MIB
"""Memory that is backed for a load beside its tensors and its page cache."""

_REPORTED: Final = ("method", "cache", "engine", "workers", "chunk_bytes", "bottleneck", "phases", "staging")


class Step(NamedTuple):
    """Where a benchmark is.

    Attributes:
        done: loads that are finished.
        total: loads in all.
        round: the round, from 1.
        what: is being measured.
    """

    done: int
    total: int
    round: int
    what: str


@dataclass(slots=True)
class Model:
    """What is loaded.

    Attributes:
        path: as it was named.
        description: what its headers say.
        rows: the tensors wanted.
        files: the files they are in.
        cache: the page cache of those.
    """

    path: str
    description: Description
    rows: Sequence[int]
    files: Sequence[FoundFile]
    cache: ModelFiles

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.description.bytes_of(self.rows)


@dataclass(slots=True)
class Rounds:
    """The rounds of one benchmark.

    Attributes:
        model: what is loaded.
        device: where to.
        contestants: what loads it.
        rounds: how often.
        progress: called before every load.
        virtual: the machine is virtual, so that memory has to be backed before each load.
        ahead: workers that are started side by side, while nothing is measured.
        runs: what was found, by state and contestant.
        ceilings: what bounds loads, round by round.
        not_measured: what was left out, and why.
        notes: what a reader has to know.
        rounds_done: finished rounds.
        interrupted: it was ended by an interrupt.
    """

    model: Model
    device: str
    contestants: Sequence[Contestant]
    rounds: int
    progress: Callable[[Step], None]
    virtual: bool = False
    ahead: int = 1
    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)
    ceilings: list[Ceilings] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rounds_done: int = 0
    interrupted: bool = False
    _done: int = 0

    def run(self) -> None:
        """All rounds, or as many as there were before an interrupt.

        Raises:
            KeyboardInterrupt: nothing had been measured yet.
        """
        try:
            states = self._states()
            self._note_method(states)
            probe = CeilingProbe(self.model.files, self.device)
            for number in range(self.rounds):
                self._round(number, states, probe)
                self.rounds_done = number + 1
                if all(self._given_up(state, each) for state in states for each in self.contestants):
                    break
        except KeyboardInterrupt:
            self.interrupted = True
            if not self.runs:
                raise

    def _states(self) -> list[str]:
        reason = self.model.cache.why_not_cold()
        if not reason:
            return ["cold", "warm"]
        self.not_measured["cold"] = reason
        return ["warm"]

    def _note_method(self, states: Sequence[str]) -> None:
        if self.virtual:
            self.notes.append(
                "this is a virtual machine: before each load, memory that it will need is touched and freed, so that "
                "the host backs it"
            )
        self.notes.append(f"memory is looked at from outside every {SAMPLE_SECONDS * 1000:.0f} ms")
        if any(one.mapped for one in self.contestants):
            self.notes.append(
                "mapped tensors count until one byte of every page was read, and are compared with mmap alone"
            )
        if "cold" not in states and self.model.cache.cached_bytes() is None:
            self.notes.append("warm means that the files were read just before; the system does not confirm it")

    def _round(self, number: int, states: Sequence[str], probe: CeilingProbe) -> None:
        self._tell(number, states, "ceilings")
        found = probe.link()
        self.ceilings.append(found)
        for state in states:
            found = self._prepared_ceilings(state, states, probe) | found
            self.ceilings[-1] = found
            order = list(turns(self.contestants, number, self.rounds))
            for begin in range(0, len(order), self.ahead):
                self._side_by_side(number, states, state, order[begin : begin + self.ahead])

    def _side_by_side(self, number: int, states: Sequence[str], state: str, some: Sequence[Contestant]) -> None:
        """Start the workers of some contestants together, then measure one after the other."""
        due = [each for each in some if not self._given_up(state, each)]
        with contextlib.ExitStack() as stack:
            started: dict[str, Worker | Exception] = {}
            for contestant in due:
                self._tell(number, states, f"{state}, {contestant.name}")
                started = started or self._start(due, stack)
                run = self._measure(number, state, contestant, started[contestant.name], self.ceilings[-1])
                self.runs.setdefault((state, contestant.name), []).append(run)
                self._done += 1
        self._done += len(some) - len(due)

    def _prepared_ceilings(self, state: str, states: Sequence[str], probe: CeilingProbe) -> Ceilings:
        """Bring the files into a state and measure what bounds loads out of it; loads prepare it again."""
        try:
            if state == "cold":
                self.model.cache.make_cold()
                return probe.storage(cached=False)
            self.model.cache.make_warm()
            found = probe.storage(cached=True)
            return found if "cold" in states else probe.storage(cached=False) | found
        except StateNotReached as err:
            return Ceilings(notes={state: str(err)})
        except OSError as err:
            return Ceilings(notes={state: f"the files could not be read: {err}"})

    def _given_up(self, state: str, contestant: Contestant) -> bool:
        """Whether it failed by itself before; a state that could not be reached may be reached next time."""
        return any(run.error and not run.unready for run in self.runs.get((state, contestant.name), ()))

    def _tell(self, number: int, states: Sequence[str], what: str) -> None:
        total = self.rounds * len(states) * len(self.contestants)
        self.progress(Step(self._done, total, number + 1, what))

    def _start(self, contestants: Sequence[Contestant], stack: contextlib.ExitStack) -> dict[str, Worker | Exception]:
        """Workers that wait for their load, by contestant, or what went wrong with them."""
        makers = {one.name: partial(Worker, self._request(one), one.environment) for one in contestants}
        return start_together(makers, stack, (OSError, WorkerFailure))

    def _request(self, contestant: Contestant) -> dict[str, Any]:
        return {
            "loader": contestant.loader,
            "path": os.path.abspath(self.model.path),
            "files": [os.path.abspath(file.path) for file in self.model.files],
            "device": self.device,
            "options": dict(contestant.options),
            "touch": "tensors" if contestant.mapped else "",
        }

    def _measure(
        self, number: int, state: str, contestant: Contestant, worker: Worker | Exception, ceilings: Ceilings
    ) -> Run:
        """One load in a process of its own, which ends with it; whatever goes wrong becomes part of the run."""
        try:
            if isinstance(worker, Exception):
                raise worker
            with worker:
                return self._measured(number, state, contestant, worker, ceilings)
        except StateNotReached as err:
            return Run(round=number, error=str(err), unready=True)
        except WorkerFailure as err:
            return Run(round=number, error=str(err), kind=err.kind, hint=err.hint, ours=err.ours)
        except OSError as err:
            return Run(round=number, error=f"it could not be measured: {err}")

    def _measured(self, number: int, state: str, contestant: Contestant, worker: Worker, ceilings: Ceilings) -> Run:
        model, cache = self.model, self.model.cache
        self._prepare(state, contestant)
        before = cache.cached_bytes()
        memory = MemoryWatch(worker.process_id)
        worker.say("go")
        told = worker.hear("loaded", load_seconds(model.nbytes), memory.look)
        peaks, after = memory.peaks(), cache.cached_bytes()
        compared = 0
        if self.device != "null":
            compared = self._checked(worker, thorough=number == 0)
        seconds = told["touched_seconds"] if contestant.mapped else told["seconds"]
        owned = model.nbytes if self.device == "cpu" and not contestant.mapped else 0
        return Run(
            round=number,
            seconds=seconds,
            returned_seconds=told["seconds"],
            gigabytes_per_second=model.nbytes / seconds / 1e9,
            peaks=peaks,
            beyond_tensors_bytes=None if peaks.anonymous_bytes is None else max(0, peaks.anonymous_bytes - owned),
            cached_before_bytes=before,
            cached_after_bytes=after,
            ceiling=ceilings.of(state, self.device, mapped=contestant.mapped),
            compared=compared,
            report=_reported(told.get("report")),
        )

    def _prepare(self, state: str, contestant: Contestant) -> None:
        """Page cache and memory as they have to be, right before the load.

        Raises:
            StateNotReached: the state could not be reached, or did not last.
        """
        cache = self.model.cache
        if state == "cold":
            cache.make_cold()
        else:
            cache.make_warm()
        if self.virtual:
            owned = self.model.nbytes if self.device == "cpu" and not contestant.mapped else 0
            back_memory(owned + (cache.total_bytes if state == "cold" else 0) + SPARE_BYTES)
        if state == "cold":
            cache.check_cold()
        else:
            cache.check_warm()

    def _checked(self, worker: Worker, *, thorough: bool) -> int:
        """Have tensors compared with the files; returns how many parts were.

        Raises:
            WorkerFailure: they differ.
        """
        model = self.model
        worker.say(sample_parts(model.description, model.rows, thorough=thorough))
        told = worker.hear("checked", CHECK_SECONDS)
        # Tensors that share bytes or are strided have other sizes than their ranges of the file.
        plain = not model.description.strides and not model.description.shared
        if told["tensors"] != len(model.rows) or (plain and told["bytes"] != model.nbytes):
            raise WorkerFailure(
                f"it returned {told['tensors']} tensors of {format_bytes(told['bytes'])}, where {len(model.rows)} of "
                f"{format_bytes(model.nbytes)} are in the files"
            )
        if told["wrong"] is not None:
            raise WorkerFailure(f"tensor '{printable(told['wrong'])}' has other bytes than the file")
        return int(told["compared"])


def _reported(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What is kept of weightlift's own report, which also lists every file."""
    if report is None:
        return None
    memory = {key: value for key, value in report["host_memory"].items() if key != "terms"}
    return {key: report[key] for key in _REPORTED} | {"host_memory": memory}


def turns(contestants: Sequence[Item], number: int, count: int) -> Iterator[Item]:
    """All contestants in the order of one round; each round begins with another, and every second goes backwards.

    So none always follows the same one, which may leave memory or a drive in a state of its own.

    Args:
        contestants: in any order.
        number: of the round, from 0.
        count: of all rounds.
    """
    shift = number * max(1, len(contestants) // count) % len(contestants)
    first, *others = [*contestants[shift:], *contestants[:shift]]
    yield first
    yield from reversed(others) if number % 2 else others
