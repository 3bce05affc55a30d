"""The arithmetic of results: what counts as one, ratios within rounds, fractions of what bounds a load."""

from __future__ import annotations

import pytest

from weightlift.bench.ceilings import Ceilings
from weightlift.bench.contestants import Contestant
from weightlift.bench.results import Run, case_results, spread

OWN = Contestant(name="auto", loader="weightlift")
MAPPED = Contestant(name="mmap", loader="weightlift", mapped=True)
PEER = Contestant(name="peer 1.0", loader="peer", package="peer")
MAPPED_PEER = Contestant(name="mapper 1.0", loader="mapper", package="mapper", mapped=True)


def runs(*speeds: float, ceiling: float = 0.0) -> list[Run]:
    """One run per speed; 0 stands for one that failed."""
    return [
        Run(
            round=number,
            gigabytes_per_second=speed,
            seconds=1.0,
            error="" if speed else "broken",
            ceiling=("direct", ceiling) if ceiling else None,
        )
        for number, speed in enumerate(speeds)
    ]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([], None),
        ([1.0, 2.0], None),
        ([1.0, None, 2.0], None),
        ([3.0, 1.0, 2.0], (2.0, 1.0, 3.0)),
        ([3.0, 1.0, None, 2.0, 9.0], (2.5, 1.0, 9.0)),
    ],
)
def test_below_three_runs_there_is_no_result(
    values: list[float | None], found: tuple[float, float, float] | None
) -> None:
    assert spread(values) == found


def test_ratios_are_taken_within_rounds() -> None:
    """The machine is ten times as slow in the second round, for both."""
    own, peer = case_results([OWN, PEER], {("cold", "auto"): runs(4, 0.4, 8), ("cold", "peer 1.0"): runs(2, 0.2, 2)})
    assert (own.baseline, own.ratio) == ("", None)
    assert peer.baseline == "auto"
    assert peer.ratio == (0.5, 0.25, 0.5)


def test_a_round_in_which_one_of_both_failed_gives_no_ratio() -> None:
    _, peer = case_results([OWN, PEER], {("cold", "auto"): runs(4, 0, 4, 4), ("cold", "peer 1.0"): runs(2, 9, 2, 2)})
    assert peer.ratio == (0.5, 0.5, 0.5)
    _, peer = case_results([OWN, PEER], {("cold", "auto"): runs(4, 0, 4), ("cold", "peer 1.0"): runs(2, 9, 2)})
    assert peer.ratio is None
    assert peer.speed == (2, 2, 9)


def test_mapped_tensors_are_compared_with_mapped_ones_and_within_their_state() -> None:
    contestants = [OWN, MAPPED, PEER, MAPPED_PEER]
    speeds = {"auto": 2.0, "mmap": 4.0, "peer 1.0": 1.0, "mapper 1.0": 1.0}
    cases = case_results(
        contestants,
        {("cold", name): runs(*[speed] * 3) for name, speed in speeds.items()}
        | {("warm", name): runs(*[10 * speed] * 3) for name, speed in speeds.items()},
    )
    ratios = {(case.state, case.contestant.name): (case.baseline, case.ratio and case.ratio.median) for case in cases}
    for state in ("cold", "warm"):
        assert ratios[state, "peer 1.0"] == ("auto", 0.5)
        assert ratios[state, "mapper 1.0"] == ("mmap", 0.25)


def test_fractions_are_of_the_rounds_own_ceiling() -> None:
    (case,) = case_results([OWN], {("cold", "auto"): [*runs(1, 1, ceiling=2), *runs(0, 0, 4, ceiling=4)]})
    assert case.fraction == (0.5, 0.5, 1.0)
    assert case.errors == ["broken"]


SPEEDS = {"direct": 5.0, "uncached": 4.0, "buffered": 3.0, "cached": 12.0}


@pytest.mark.parametrize(
    ("speeds", "state", "device", "mapped", "found"),
    [
        (SPEEDS, "cold", "cpu", False, ("direct", 5.0)),
        ({"buffered": 3.0}, "cold", "null", False, ("buffered", 3.0)),
        (SPEEDS, "cold", "cpu", True, ("direct", 5.0)),
        (SPEEDS, "warm", "cpu", False, ("cached", 12.0)),
        (SPEEDS, "warm", "cpu", True, None),
        (SPEEDS | {"link": 9.0}, "warm", "cuda:0", False, ("link", 9.0)),
        (SPEEDS | {"link": 9.0}, "cold", "cuda:0", False, ("direct", 5.0)),
        (SPEEDS, "warm", "cuda:0", False, None),
        ({}, "cold", "cpu", False, None),
    ],
)
def test_what_bounds_a_load(
    speeds: dict[str, float], state: str, device: str, mapped: bool, found: tuple[str, float] | None
) -> None:
    assert Ceilings(speeds).of(state, device, mapped=mapped) == found


def test_a_kind_that_was_measured_later_is_no_longer_missing() -> None:
    joined = Ceilings({"direct": 1.0}, {"cached": "not yet", "buffered": "no"}) | Ceilings({"cached": 2.0})
    assert joined.speeds == {"direct": 1.0, "cached": 2.0}
    assert joined.notes == {"buffered": "no"}
