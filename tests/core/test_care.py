"""What is done when memory gets short, on made-up sequences of what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlift.care import (
    FLOOR_BYTES_MAX,
    FLOOR_BYTES_MIN,
    PATIENCE_SECONDS,
    SHARES,
    Care,
    Decision,
    MemoryView,
    floor_bytes,
)
from weightlift.engines.tuner import Setting
from weightlift.supervision import limited
from weightlift.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterable

GROUP = 512 * MIB
FLOOR = 32 * MIB
TICK = 0.01


def decisions(
    care: Care, lefts: Iterable[int], *, swap: int = 0, remaining: int = 0, last_resort: int | None = None
) -> list[Decision]:
    """What is decided on one look after the other, a tick apart."""
    return [
        care.decide(MemoryView(index * TICK, left, left if last_resort is None else last_resort, swap, remaining))
        for index, left in enumerate(lefts)
    ]


def test_with_enough_memory_nothing_happens() -> None:
    care = Care(24 * GIB)
    assert decisions(care, [8 * GIB] * 100, remaining=6 * GIB) == [Decision(1.0)] * 100
    assert not care.is_near(8 * GIB)


@pytest.mark.parametrize(
    ("total", "floor"),
    [(256 * MIB, FLOOR_BYTES_MIN), (GROUP, FLOOR), (8 * GIB, 128 * MIB), (1 << 42, FLOOR_BYTES_MAX)],
)
def test_the_floor_goes_with_the_machine(total: int, floor: int) -> None:
    assert floor_bytes(total) == floor


def test_under_the_floor_the_cache_is_dropped_and_less_is_in_flight_step_by_step() -> None:
    care = Care(GROUP)
    made = decisions(care, [FLOOR - 1] * 100, last_resort=GROUP)
    assert made[0].drop_cache
    shares = [decision.share for decision in made]
    assert sorted(set(shares), reverse=True) == list(SHARES[1:-1]), "one step after the other, and not down to nothing"
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == shares[4] == 0.5, "a step takes time to show"
    drops = [index for index, decision in enumerate(made) if decision.drop_cache]
    assert drops == [0, 25, 50, 75], "what comes in again is dropped again, but not all the time"
    assert not any(decision.give_up for decision in made)
    told = [decision.reason for decision in made if decision.reason]
    assert "of memory are left, with a floor of 32.0 MiB" in told[0]


def test_memory_that_comes_back_lets_the_load_go_again() -> None:
    care = Care(GROUP)
    decisions(care, [FLOOR - 1] * 12, last_resort=GROUP)
    throttled = care.share
    assert throttled == 0.125
    made = [care.decide(MemoryView(1 + index * TICK, 3 * FLOOR, GROUP, 0, 0)) for index in range(400)]
    shares = [decision.share for decision in made]
    assert shares[0] == 0.25
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert 40 <= shares.count(0.5) <= 60, "slowly"


def test_between_the_floor_and_twice_the_floor_everything_stays() -> None:
    care = Care(GROUP)
    decisions(care, [FLOOR - 1] * 6, last_resort=GROUP)
    before = care.share
    made = [care.decide(MemoryView(1 + index, FLOOR + MIB, GROUP, 0, 0)) for index in range(10)]
    assert {decision.share for decision in made} == {before}


def test_at_the_end_of_memory_everything_is_held_and_then_given_up() -> None:
    made = decisions(Care(GROUP), [FLOOR // 4 - 1] * 300)
    assert made[0].share == 0
    assert made[0].drop_cache
    held = int(PATIENCE_SECONDS / TICK)
    assert not any(decision.give_up for decision in made[:held])
    assert made[held].give_up
    assert "of memory are left" in made[held].reason


def test_tensors_that_can_no_longer_fit_are_not_begun() -> None:
    assert decisions(Care(GROUP), [3 * FLOOR], remaining=GIB)[0].share == 1
    made = decisions(Care(GROUP), [3 * FLOOR - 1] * 300, remaining=GIB)
    assert made[0].share == 0
    assert made[-1].give_up
    assert "the tensors still need 1.00 GiB" in made[-1].reason


def test_a_moment_without_memory_is_waited_out() -> None:
    care = Care(GROUP)
    assert decisions(care, [MIB] * 100)[-1] == Decision(0.0)
    after = care.decide(MemoryView(1.5, 100 * MIB, 100 * MIB, 0, 0))
    assert after.share > 0
    assert not after.give_up


def test_file_pages_in_use_are_no_reason_to_give_up() -> None:
    # Some kernels count the pages of a mapping that was just read as in use; they go before anything is killed.
    made = decisions(Care(GROUP), [0] * 400, last_resort=200 * MIB)
    assert all(decision.share > 0 for decision in made)
    assert not any(decision.give_up for decision in made)


def test_with_swap_left_the_load_goes_on_slowly() -> None:
    care = Care(GROUP)
    made = decisions(care, [0] * 1000, swap=GIB, remaining=100 * MIB)
    assert not any(decision.give_up for decision in made)
    assert made[-1].share == SHARES[-2]
    assert sum(decision.share == 0 for decision in made) <= PATIENCE_SECONDS / TICK + 1, "held once and no more"


@given(
    st.lists(
        st.tuples(st.integers(0, 200 * MIB), st.integers(0, 50 * MIB), st.integers(0, GIB), st.floats(0, 1)),
        max_size=200,
    ),
    st.integers(0, GIB),
)
def test_whatever_is_seen_decisions_are_sane(looks: list[tuple[int, int, int, float]], swap: int) -> None:
    care, now = Care(GROUP), 0.0
    for left, more, remaining, step in looks:
        now += step
        decision = care.decide(MemoryView(now, left, left + more, swap, remaining))
        assert decision.share in SHARES
        assert decision.share == care.share
        if decision.give_up:
            assert left + more < 3 * FLOOR
            assert decision.reason
            return
        if left >= 3 * FLOOR:
            assert decision.share > 0


def test_fewer_workers_come_before_smaller_chunks() -> None:
    setting = Setting(8, 4 * MIB)
    assert [limited(setting, share) for share in SHARES] == [
        Setting(8, 4 * MIB),
        Setting(4, 4 * MIB),
        Setting(2, 4 * MIB),
        Setting(1, 4 * MIB),
        Setting(1, 2 * MIB),
        Setting(0, 4 * MIB),
    ]
    assert limited(Setting(1, 300 * KIB), 0.0625) == Setting(1, 256 * KIB)
    assert limited(Setting(1, 64 * KIB), 0.0625) == Setting(1, 64 * KIB)
