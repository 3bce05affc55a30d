"""What is claimed of measurements, and the arithmetic that decides: medians, and ratios taken within rounds.

Knows nothing of how runs were made: a run is a dictionary of figures, or one with an ``error`` in their place. One that
was never started, for want of time, says ``left_out``.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A claim about throughputs: the best of some cases over the best of others, round by round.

    Attributes:
        name: the claim in words.
        over: cases whose best is the numerator.
        under: cases whose best is the denominator.
        at_least: what the median should reach; ``None`` for a figure without a target.
        slowest: the slowest of ``under`` is the denominator, as where each is a limit.
    """

    name: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    at_least: float | None = None
    slowest: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A claim about one figure of one case, which the worst of its runs must keep.

    Attributes:
        case: the case's name.
        figure: one of :data:`harness.FIGURES`.
        at_most: upper bound, or ``None``.
        at_least: lower bound, or ``None``.
    """

    case: str
    figure: str
    at_most: float | None = None
    at_least: float | None = None


def evaluate(ratio: Ratio, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """The ratio round by round: pick each side's best case by its median, then divide within rounds."""
    over, under = _best(ratio.over, runs), _best(ratio.under, runs, slowest=ratio.slowest)
    head = {"name": ratio.name, "over": over, "under": under, "at_least": ratio.at_least}
    if over is None or under is None:
        return head | {"value": None, "reached": None}
    pairs = zip(runs[over], runs[under], strict=True)
    values = [speed(a) / speed(b) for a, b in pairs if speed(a) > 0 and speed(b) > 0]
    value = spread(values)
    reached = None if value is None or ratio.at_least is None else value["median"] >= ratio.at_least
    return head | {"value": value, "reached": reached}


def judge(limit: Limit, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """The figure's spread over the runs, and whether the worst run keeps the limit."""
    values = spread([run[limit.figure] for run in runs.get(limit.case, ()) if run.get(limit.figure) is not None])
    low = limit.at_least is None or values is None or values["min"] >= limit.at_least
    high = limit.at_most is None or values is None or values["max"] <= limit.at_most
    return dataclasses.asdict(limit) | {"value": values, "reached": None if values is None else low and high}


def speed(run: Run) -> float:
    """Throughput of a run in GB/s, 0 of one that failed."""
    return float(run.get("gigabytes_per_second") or 0.0)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, minimum and maximum, or ``None`` of nothing."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _best(names: Sequence[str], runs: Mapping[str, Sequence[Run]], *, slowest: bool = False) -> str | None:
    tried = {name: [run for run in runs.get(name, ()) if not run.get("left_out")] for name in names}
    medians = {name: statistics.median(map(speed, made)) for name, made in tried.items() if made}
    best = (min if slowest else max)(medians, key=lambda name: medians[name], default=None)
    return best if best is not None and medians[best] > 0 else None
