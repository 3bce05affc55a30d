"""The trial compares two neighbouring cold parts, leaves nothing out, and is judged by what they cost."""

from __future__ import annotations

import itertools

import pytest

from weightlift.host.residency import Residency, ResidencyMap, ResidencyRun
from weightlift.operations import Sink
from weightlift.plan import GRANULE_BYTES, ShardFacts, Wanted
from weightlift.trial import DIRECT_BYTES, KEPT_BYTES, cold_bytes, find_trial, is_close, judge_trial
from weightlift.units import GIB, MIB

SIZE = 3 * GIB


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
    (direct,), (kept,), (again,) = trial.direct, trial.kept, trial.again
    assert (direct.length, kept.length, again.length) == (DIRECT_BYTES, KEPT_BYTES, DIRECT_BYTES)
    assert direct.offset + DIRECT_BYTES == kept.offset == again.offset - KEPT_BYTES
    once = trial.without_second()
    assert not once.again
    assert list(once.rest) == in_file_order(*once.rest)
    for parts in (in_file_order(direct, kept, again, *trial.rest), in_file_order(direct, kept, *once.rest)):
        assert_the_whole(parts, wanted)


def in_file_order(*parts: Wanted) -> list[Wanted]:
    return sorted(parts, key=lambda part: (part.tag, part.offset))


def assert_the_whole(parts: list[Wanted], wanted: list[Wanted]) -> None:
    for tag, group in itertools.groupby(parts, key=lambda part: part.tag):
        some = list(group)
        assert some[0].offset == wanted[tag].offset
        assert sum(part.length for part in some) == wanted[tag].length
        assert all(part.address - part.offset == wanted[tag].address - wanted[tag].offset for part in some)
        assert all(one.offset + one.length == two.offset for one, two in itertools.pairwise(some))


def test_only_what_is_absent_is_compared() -> None:
    trial = find_trial([placed(0, 0, 3 * GIB)], [facts(cached=(100 * MIB, 400 * MIB))])
    assert trial is not None
    assert all(part.offset >= 400 * MIB or part.offset + part.length <= 100 * MIB for part in trial.direct + trial.kept)


def test_pieces_take_turns_where_what_is_cold_lies_in_stripes() -> None:
    stripe = 16 * MIB
    runs = tuple(
        ResidencyRun(start, stripe, Residency.ABSENT if start // stripe % 2 else Residency.RESIDENT)
        for start in range(0, SIZE, stripe)
    )
    shard = ShardFacts("shard", SIZE, True, "", True, ResidencyMap(GRANULE_BYTES, SIZE, SIZE // 2, runs))
    trial = find_trial([placed(0, 0, SIZE)], [shard])
    assert trial is not None
    assert [part.offset // stripe for part in trial.direct] == [1, 7]
    assert [part.offset // stripe for part in trial.kept] == [3, 5, 9, 11]
    assert [part.offset // stripe for part in trial.again] == [13, 15]
    parts = in_file_order(*trial.direct, *trial.kept, *trial.again, *trial.rest)
    assert parts[0].offset == 0
    assert sum(part.length for part in parts) == SIZE
    assert all(one.offset + one.length == two.offset for one, two in itertools.pairwise(parts))


def test_a_second_time_takes_as_much_or_nothing() -> None:
    wanted = [placed(0, 0, 3 * GIB)]
    most = DIRECT_BYTES + KEPT_BYTES + DIRECT_BYTES
    enough = find_trial(wanted, [facts(cached=(most, SIZE))])
    assert enough is not None
    assert sum(part.length for part in enough.again) == DIRECT_BYTES
    short = find_trial(wanted, [facts(cached=(most - 2 * MIB, SIZE))])
    assert short is not None
    assert not short.again
    assert_the_whole(in_file_order(*short.direct, *short.kept, *short.rest), wanted)


@pytest.mark.parametrize(
    ("kept", "close"), [(0.9, False), (1.0, False), (1.06, True), (1.25, True), (1.26, False), (2.0, False)]
)
def test_only_what_keeping_won_by_little_is_close(kept: float, close: bool) -> None:
    assert is_close(1.0, kept) is close


@pytest.mark.parametrize(
    ("shard", "cold"),
    [
        (facts(direct=False), 0),
        (facts(cached=(KEPT_BYTES - MIB, SIZE)), KEPT_BYTES - MIB),
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


@pytest.mark.parametrize(("kept", "keep"), [(0.5, True), (1.0, True), (1.2, True), (1.3, False), (2.0, False)])
def test_keeping_may_cost_a_little(kept: float, keep: bool) -> None:
    decision = judge_trial(1.0, kept)
    assert decision.keep is keep
    assert not decision.on_trial
    assert ("stay cached" in decision.reason) is keep


def test_parts_that_took_no_time_are_no_reason_to_give_up_keeping() -> None:
    assert judge_trial(0.0, 0.0).keep
