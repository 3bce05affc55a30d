"""What a benchmark found, as frozen values, and the arithmetic: medians, spreads, ratios taken within rounds.

A single run is never a result: below three runs of a case there are no medians, no fractions and no ratios, only runs.
Nothing here measures or prints.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from weightlift.bench.memory import Peaks
from weightlift.bench.options import ROUNDS_OF_A_RESULT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from weightlift.bench.cache_states import Restored
    from weightlift.bench.ceilings import Ceilings
    from weightlift.bench.contestants import Contestant
    from weightlift.health.facts import Facts
    from weightlift.health.recommend import Recommendation


class Spread(NamedTuple):
    """The middle and the ends of several figures."""

    median: float
    smallest: float
    largest: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median, smallest and largest of what is known; ``None`` below the number of runs that makes a result."""
    known = [value for value in values if value is not None]
    if len(known) < ROUNDS_OF_A_RESULT:
        return None
    return Spread(statistics.median(known), min(known), max(known))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load in one process, or why there was none.

    Attributes:
        round: which round, from 0.
        seconds: until every tensor was there; of mapped tensors, until every page was touched.
        returned_seconds: until the call returned.
        gigabytes_per_second: bytes of the tensors over ``seconds``; 0 if it failed.
        peaks: growth of the process's memory over the moment before the load, as sampled from outside.
        beyond_tensors_bytes: the anonymous part of it without tensors that are the caller's own.
        cached_before_bytes: what the page cache held of the files right before; ``None`` where unknown.
        cached_after_bytes: the same right after.
        ceiling: what bounded it in this round, and how fast that is in GB/s; ``None`` where unknown.
        compared: parts of tensors that were compared with the files.
        report: what weightlift says of its load.
        error: why there are no figures; empty otherwise.
        kind: the class of that error.
        hint: what came with it.
        ours: it is one of :mod:`weightlift.errors`.
        unready: it was never started, because the page cache could not be prepared.
    """

    round: int
    seconds: float = 0.0
    returned_seconds: float = 0.0
    gigabytes_per_second: float = 0.0
    peaks: Peaks = field(default_factory=Peaks)
    beyond_tensors_bytes: int | None = None
    cached_before_bytes: int | None = None
    cached_after_bytes: int | None = None
    ceiling: tuple[str, float] | None = None
    compared: int = 0
    report: Mapping[str, Any] | None = None
    error: str = ""
    kind: str = ""
    hint: str = ""
    ours: bool = False
    unready: bool = False

    @property
    def fraction(self) -> float | None:
        """Of its ceiling."""
        return self.gigabytes_per_second / self.ceiling[1] if self.ceiling and not self.error else None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        head: dict[str, Any] = {"round": self.round + 1}
        if self.error:
            return head | {"error": self.error, "hint": self.hint or None}
        return head | {
            "seconds": self.seconds,
            "returned_seconds": self.returned_seconds,
            "gigabytes_per_second": self.gigabytes_per_second,
            "peak_memory": {**self.peaks._asdict(), "beyond_tensors_bytes": self.beyond_tensors_bytes},
            "page_cache": {"before_bytes": self.cached_before_bytes, "after_bytes": self.cached_after_bytes},
            "ceiling": {"kind": self.ceiling[0], "gigabytes_per_second": self.ceiling[1]} if self.ceiling else None,
            "parts_compared": self.compared,
            "report": self.report,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """One contestant in one state of the page cache.

    Attributes:
        contestant: what ran.
        state: ``cold`` or ``warm``.
        runs: what it gave, round by round, failed ones included.
        baseline: the path of weightlift's that it is compared with; empty if that is itself or was not run.
        ratio: its speed over the baseline's, taken within rounds.
    """

    contestant: Contestant
    state: str
    runs: Sequence[Run]
    baseline: str = ""
    ratio: Spread | None = None

    @property
    def good(self) -> list[Run]:
        """Runs with figures."""
        return [run for run in self.runs if not run.error]

    @property
    def errors(self) -> list[str]:
        """What went wrong, each once."""
        return list(dict.fromkeys(run.error for run in self.runs if run.error))

    def spread(self, figure: Callable[[Run], float | None]) -> Spread | None:
        """One figure over the runs."""
        return spread(figure(run) for run in self.good)

    @property
    def speed(self) -> Spread | None:
        """Throughput in GB/s."""
        return self.spread(lambda run: run.gigabytes_per_second)

    @property
    def fraction(self) -> Spread | None:
        """Of the ceiling of the same round."""
        return self.spread(lambda run: run.fraction)

    def most(self, figure: Callable[[Run], int | None]) -> int | None:
        """The largest of a figure over the runs; ``None`` where it is unknown."""
        return max((value for run in self.good if (value := figure(run)) is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        contestant = self.contestant
        return {
            "name": contestant.name,
            "state": self.state,
            "package": contestant.package,
            "version": contestant.version or None,
            "options": dict(contestant.options),
            "environment": dict(contestant.environment),
            "mapped": contestant.mapped,
            "seconds": _json(self.spread(lambda run: run.seconds)),
            "gigabytes_per_second": _json(self.speed),
            "fraction_of_ceiling": _json(self.fraction),
            "baseline": self.baseline or None,
            "ratio_to_baseline": _json(self.ratio),
            "peak_memory": {
                "anonymous_bytes": self.most(lambda run: run.peaks.anonymous_bytes),
                "file_bytes": self.most(lambda run: run.peaks.file_bytes),
                "shared_bytes": self.most(lambda run: run.peaks.shared_bytes),
                "beyond_tensors_bytes": self.most(lambda run: run.beyond_tensors_bytes),
            },
            "cached_after_bytes": self.most(lambda run: run.cached_after_bytes),
            "errors": self.errors,
            "runs": [run.to_json() for run in self.runs],
        }


def case_results(contestants: Sequence[Contestant], runs: Mapping[tuple[str, str], Sequence[Run]]) -> list[CaseResult]:
    """Join runs to cases and compare them: mapped tensors with ``mmap``, owned ones with ``auto``.

    Args:
        contestants: everything that was to run.
        runs: by state and name.
    """
    found = []
    for state in dict.fromkeys(state for state, _ in runs):
        for contestant in contestants:
            own = runs.get((state, contestant.name), ())
            if not own:
                continue
            baseline = "mmap" if contestant.mapped else "auto"
            other = runs.get((state, baseline), ())
            compared = baseline != contestant.name and bool(other)
            found.append(
                CaseResult(
                    contestant=contestant,
                    state=state,
                    runs=tuple(own),
                    baseline=baseline if compared else "",
                    ratio=_ratio(own, other) if compared else None,
                )
            )
    return found


def _ratio(over: Sequence[Run], under: Sequence[Run]) -> Spread | None:
    speeds = {run.round: run.gigabytes_per_second for run in under if not run.error}
    return spread(
        run.gigabytes_per_second / speeds[run.round] for run in over if not run.error and speeds.get(run.round)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Everything one benchmark found.

    Attributes:
        path: the model, as it was named.
        file_format: of its files.
        tensors: how many were loaded.
        nbytes: their bytes.
        file_bytes: bytes of the files they are in.
        files: how many those are.
        device: where to.
        rounds: how many were asked for.
        rounds_done: how many were finished.
        partial: it was interrupted.
        ceilings: round by round.
        cases: every contestant in every state, as far as it ran.
        not_measured: what was left out, and why.
        notes: what a reader has to know to judge the figures.
        page_cache: what became of the page cache of the files.
        facts: the machine.
        recommendation: what to do on it.
        seconds: how long the whole benchmark took.
    """

    path: str
    file_format: str
    tensors: int
    nbytes: int
    file_bytes: int
    files: int
    device: str
    rounds: int
    rounds_done: int
    partial: bool
    ceilings: Sequence[Ceilings]
    cases: Sequence[CaseResult]
    not_measured: Mapping[str, str]
    notes: Sequence[str]
    page_cache: Restored
    facts: Facts
    recommendation: Recommendation
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def conclusive(self) -> bool:
        """Whether there were rounds enough to speak of results."""
        return self.rounds_done >= ROUNDS_OF_A_RESULT

    def ceiling_speeds(self, kind: str) -> list[float]:
        """What the rounds found of a ceiling, in GB/s."""
        return [found.speeds[kind] for found in self.ceilings if kind in found.speeds]

    def fastest(self, state: str) -> CaseResult | None:
        """The path of weightlift's with the best median in a state."""
        own = (case for case in self.cases if case.contestant.own and case.state == state)
        known = [(case.speed.median, case) for case in own if case.speed is not None]
        return max(known, key=lambda item: item[0])[1] if known else None

    def to_json(self) -> dict[str, Any]:
        """The one JSON object of ``weightlift bench --json``."""
        kinds = dict.fromkeys(kind for found in self.ceilings for kind in (*found.speeds, *found.notes))
        notes = {kind: why for found in self.ceilings for kind, why in found.notes.items()}
        best = {state: self.fastest(state) for state in ("cold", "warm")}
        return {
            "schema": 1,
            "partial": self.partial,
            "conclusive": self.conclusive,
            "rounds": self.rounds,
            "rounds_done": self.rounds_done,
            "seconds": self.seconds,
            "path": self.path,
            "format": self.file_format,
            "device": self.device,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "file_bytes": self.file_bytes,
            "files": self.files,
            "versions": dict(self.versions),
            "ceilings": {
                kind: {
                    "gigabytes_per_second": _json(spread(self.ceiling_speeds(kind))),
                    "rounds": self.ceiling_speeds(kind),
                    "not_measured": notes.get(kind) if not self.ceiling_speeds(kind) else None,
                }
                for kind in kinds
            },
            "cases": [case.to_json() for case in self.cases],
            "fastest": {state: case.contestant.name if case else None for state, case in best.items()},
            "not_measured": dict(self.not_measured),
            "notes": list(self.notes),
            "page_cache": asdict(self.page_cache),
            "facts": self.facts.to_json(),
            "recommendation": asdict(self.recommendation),
        }


def _json(value: Spread | None) -> dict[str, float] | None:
    return value._asdict() if value is not None else None
