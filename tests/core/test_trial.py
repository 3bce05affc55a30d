"""The trial compares two neighbouring cold parts, leaves nothing out, and is judged by what they cost."""

from __future__ import annotations

import itertools

import pytest

from weightlift.host.residency import Residency, ResidencyMap, ResidencyRun
from weightlift.operations import Sink
from weightlift.plan import GRANULE_BYTES, ShardFacts, Wanted
from weightlift.trial import (
    DIRECT_BYTES,
    KEPT_BYTES,
    ROUNDS_MAX,
    ROUNDS_MIN,
    Trial,
    cold_bytes,
    cost_of,
    find_trial,
    judge_cost,
    judge_rounds,
)
from weightlift.units import GIB, MIB

SIZE = 3 * GIB
ROUND_BYTES = DIRECT_BYTES + KEPT_BYTES
COMPARED_BYTES = ROUNDS_MIN * ROUND_BYTES


def facts(*, direct: bool = True, cached: tuple[int, int] = (0, 0), known: bool = True) -> ShardFacts:
    begin, end = cached
    runs = tuple(
        ResidencyRun(start, stop - start, state)
        for start, stop, state in (
            (0, begin, Residency.ABSENT),
            (begin, end, Residency.RESIDENT),
            (end, SIZE, Residency.ABSENT),
        )
        if stop > start
    )
    residency = ResidencyMap(GRANULE_BYTES, SIZE, end - begin, runs) if known else None
    return ShardFacts("shard", SIZE, direct, "", True, residency)


def placed(shard: int, offset: int, length: int, *, mirrored: bool = True) -> Wanted:
    return Wanted(shard, offset, length, Sink.PLACE, (1 << 40) + offset % 4096, mirrored, True)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("offset", [0, 2824, 5 * MIB + 1])
def test_the_parts_are_the_whole(offset: int, known: bool) -> None:
    wanted = [placed(0, 100, 50), placed(0, offset + 8 * MIB, 2 * GIB), placed(1, 0, 77)]
    trial = find_trial(wanted, [facts(known=known), facts()])
    assert trial is not None
    assert [[sum(part.length for part in side) for side in one] for one in trial.rounds] == [
        [KEPT_BYTES, DIRECT_BYTES]
    ] * ROUNDS_MAX
    compared = compared_parts(trial)
    assert all(one.offset + one.length == two.offset for one, two in itertools.pairwise(compared))
    assert trial.direct(ROUNDS_MAX) == tuple(compared[1::2])
    parts = sorted([*compared, *trial.rest(ROUNDS_MAX)], key=lambda part: (part.tag, part.offset))
    for tag, group in itertools.groupby(parts, key=lambda part: part.tag):
        some = list(group)
        assert some[0].offset == wanted[tag].offset
        assert sum(part.length for part in some) == wanted[tag].length
        assert all(part.address - part.offset == wanted[tag].address - wanted[tag].offset for part in some)
        assert all(one.offset + one.length == two.offset for one, two in itertools.pairwise(some))


def compared_parts(trial: Trial) -> list[Wanted]:
    return [part for one in trial.rounds for side in one for part in side]


def test_only_what_is_absent_is_compared() -> None:
    trial = find_trial([placed(0, 0, 3 * GIB)], [facts(cached=(100 * MIB, 400 * MIB))])
    assert trial is not None
    compared = compared_parts(trial)
    assert all(part.offset >= 400 * MIB or part.offset + part.length <= 100 * MIB for part in compared)


def test_pieces_take_turns_where_what_is_cold_lies_in_stripes() -> None:
    stripe = 16 * MIB
    runs = tuple(
        ResidencyRun(start, stripe, Residency.ABSENT if start // stripe % 2 else Residency.RESIDENT)
        for start in range(0, SIZE, stripe)
    )
    shard = ShardFacts("shard", SIZE, True, "", True, ResidencyMap(GRANULE_BYTES, SIZE, SIZE // 2, runs))
    trial = find_trial([placed(0, 0, SIZE)], [shard])
    assert trial is not None
    assert [[part.offset // stripe for part in side] for one in trial.rounds[:2] for side in one] == [
        [1, 3],
        [5],
        [7, 9],
        [11],
    ]
    parts = sorted((*compared_parts(trial), *trial.rest(ROUNDS_MAX)), key=lambda part: part.offset)
    assert parts[0].offset == 0
    assert sum(part.length for part in parts) == SIZE
    assert all(one.offset + one.length == two.offset for one, two in itertools.pairwise(parts))


@pytest.mark.parametrize(
    ("shard", "cold"),
    [
        (facts(direct=False), 0),
        (facts(cached=(COMPARED_BYTES - MIB, SIZE)), COMPARED_BYTES - MIB),
        (facts(cached=(0, SIZE)), 0),
    ],
    ids=["no direct reads", "little is cold", "all is cached"],
)
def test_nothing_to_compare(shard: ShardFacts, cold: int) -> None:
    wanted = [placed(0, 0, 3 * GIB)]
    assert cold_bytes(wanted, [shard]) == cold
    assert find_trial(wanted, [shard]) is None


def test_staged_ranges_say_nothing_about_direct_reads() -> None:
    assert find_trial([placed(0, 0, 2 * GIB, mirrored=False)], [facts()]) is None


@pytest.mark.parametrize("made", range(ROUNDS_MAX + 1))
def test_rounds_that_are_not_made_are_part_of_the_rest(made: int) -> None:
    wanted = [placed(0, 100, 50), placed(0, 8 * MIB, 2 * GIB), placed(1, 0, 77)]
    trial = find_trial(wanted, [facts(), facts()])
    assert trial is not None
    rest = trial.rest(made)
    assert [(part.tag, part.length) for part in rest[:1] + rest[-1:]] == [(0, 50), (2, 77)]
    assert sum(part.length for part in rest) == 50 + 2 * GIB + 77 - made * ROUND_BYTES
    # What is left of a range is one stretch behind the rounds made.
    assert [(part.offset, part.address - part.offset) for part in rest[1:-1]] == [
        (8 * MIB + made * ROUND_BYTES, wanted[1].address - wanted[1].offset)
    ]
    assert len(trial.direct(made)) == made


def test_there_are_as_many_rounds_as_what_is_cold_allows() -> None:
    cold = 3 * ROUND_BYTES + KEPT_BYTES + 9 * MIB
    trial = find_trial([placed(0, 0, SIZE)], [facts(cached=(cold, SIZE))])
    assert trial is not None
    assert len(trial.rounds) == 3
    assert sum(part.length for part in trial.rest(3)) == SIZE - 3 * ROUND_BYTES


@pytest.mark.parametrize(("cost", "keep"), [(0.5, True), (1.0, True), (1.2, True), (1.4, False), (2.0, False)])
def test_keeping_may_cost_a_little(cost: float, keep: bool) -> None:
    decision = judge_cost(cost)
    assert decision.keep is keep
    assert not decision.on_trial
    assert ("stay cached" in decision.reason) is keep


def test_parts_that_took_no_time_are_no_reason_to_give_up_keeping() -> None:
    assert judge_cost(cost_of(0.0, 0.0)).keep
    assert cost_of(2.0, 3.0) == 1.5


@pytest.mark.parametrize(
    ("costs", "keep"),
    [
        ([9.0], None),
        ([9.0, 1.0], True),
        ([0.1, 2.0], False),
        ([1.0, 1.4], None),
        ([1.0, 1.2], None),
        ([1.0, 1.14], None),
        ([1.0, 1.14, 1.14], True),
        ([1.0, 1.5, 1.5], False),
        ([1.0, 1.2, 1.2], None),
        ([1.0, 1.2, 1.2, 1.2], True),
        ([1.0, 1.4, 1.4, 1.4], False),
        ([1.0, 1.25, 1.25, 1.25], None),
        ([1.0, 1.4, 1.0], None),
        ([1.0, 1.4, 0.9, 1.0], True),
        ([1.0, 1.4, 1.2, 1.3, 1.5], False),
        ([1.0, 1.4, 1.2, 1.3, 1.1], True),
    ],
)
def test_rounds_are_made_until_it_is_clear(costs: list[float], keep: bool | None) -> None:
    decision = judge_rounds(costs, ROUNDS_MAX)
    assert (decision and decision.keep) is keep


def test_the_last_round_that_can_be_made_decides() -> None:
    decision = judge_rounds([9.0, 1.4], ROUNDS_MIN)
    assert decision is not None
    assert not decision.keep
