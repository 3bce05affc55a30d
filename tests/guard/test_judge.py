"""Catastrophes played to the judge."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from weightlift.health.guard.facts import Policy, Sample, WhenFull, default_reserve, room
from weightlift.health.guard.judge import Action, Phase, State, Verdict, judge, next_look_seconds
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterable

POLICY = Policy(total_bytes=32 * GIB, reserve_bytes=2 * GIB)
IDLE = Sample(
    seconds=0.0,
    anonymous_bytes=1 * GIB,
    file_bytes=4 * GIB,
    shared_bytes=0,
    swapped_bytes=0,
    ceiling_bytes=24 * GIB,
    charged_bytes=5 * GIB,
    available_bytes=26 * GIB,
    free_bytes=12 * GIB,
    swap_free_bytes=8 * GIB,
)


def play(samples: Iterable[Sample], policy: Policy = POLICY, state: State | None = None) -> list[tuple[float, Verdict]]:
    """Every verdict other than to do nothing, with its time."""
    state, acted = state or State(), []
    for sample in samples:
        state, verdict = judge(state, sample, policy)
        if verdict.action is not Action.NOTHING:
            acted.append((sample.seconds, verdict))
    return acted


def actions(samples: Iterable[Sample], policy: Policy = POLICY) -> list[Action]:
    return [verdict.action for _, verdict in play(samples, policy)]


def growing(rate: float, *, start: Sample = IDLE, steps: int = 400, every: float = 0.05) -> list[Sample]:
    """A command whose private memory grows evenly until nothing stops it."""
    return [
        replace(
            start,
            seconds=step * every,
            anonymous_bytes=start.anonymous_bytes + int(rate * step * every),
            available_bytes=max(0, start.available_bytes - int(rate * step * every)),
            file_bytes=0,
        )
        for step in range(steps)
    ]


def test_a_quiet_command_is_left_alone() -> None:
    assert actions(replace(IDLE, seconds=second / 4) for second in range(400)) == []


def test_growth_to_the_limit_freezes_then_stops_then_kills() -> None:
    acted = play(growing(2 * GIB))
    assert [verdict.action for _, verdict in acted[:3]] == [Action.FREEZE, Action.STOP, Action.KILL]
    (seconds, first), *_ = acted
    holding = IDLE.anonymous_bytes + int(2 * GIB * seconds)
    assert 22 * GIB < holding < 24 * GIB
    assert "growing by 2.00 GiB a second, of 24.0 GiB" in first.reason
    assert "grew on" in acted[2][1].reason


@pytest.mark.parametrize("gibibytes_per_second", [0.25, 1, 4])
def test_the_faster_it_grows_the_earlier_it_is_frozen(gibibytes_per_second: float) -> None:
    rate = gibibytes_per_second * GIB
    seconds, verdict = next(
        (seconds, verdict) for seconds, verdict in play(growing(rate, steps=4000)) if verdict.action is Action.FREEZE
    )
    # What it would add in a quarter of a second is still free.
    assert verdict.room_bytes + rate * 0.05 >= min(rate * 0.25, 3 * GIB)
    assert verdict.growth == pytest.approx(rate, rel=0.01)
    assert seconds > 0


def test_without_a_group_the_machine_is_what_counts() -> None:
    acted = play(growing(1 * GIB, start=replace(IDLE, ceiling_bytes=None, charged_bytes=None), steps=600))
    assert acted[0][1].action is Action.FREEZE
    assert "are left for everything" in acted[0][1].reason
    assert acted[0][1].room_bytes >= 0


def test_a_command_that_holds_nothing_is_not_blamed_for_others() -> None:
    small = replace(IDLE, anonymous_bytes=100 * MIB, ceiling_bytes=None, charged_bytes=None, file_bytes=0)
    assert actions(replace(small, seconds=second, available_bytes=100 * MIB) for second in range(20)) == []


def test_one_that_the_kernel_holds_is_frozen_at_once() -> None:
    acted = play([IDLE, replace(IDLE, seconds=0.1, held=True)])
    assert [verdict.action for _, verdict in acted] == [Action.FREEZE]
    assert "reached its limit of 24.0 GiB" in acted[0][1].reason


def test_swap_counts_as_room_only_if_it_was_granted() -> None:
    full = replace(IDLE, anonymous_bytes=23 * GIB + 900 * MIB, swapped_bytes=1 * GIB)
    assert room(full, POLICY) == 124 * MIB
    assert room(full, replace(POLICY, swap_bytes=4 * GIB)) == 124 * MIB + 3 * GIB
    assert room(replace(full, swap_free_bytes=1 * GIB), replace(POLICY, swap_bytes=4 * GIB)) == 124 * MIB + 1 * GIB


class TestPageCache:
    def test_consumed_files_go_when_memory_gets_short(self) -> None:
        short = replace(IDLE, free_bytes=500 * MIB, available_bytes=7 * GIB)
        acted = play(replace(short, seconds=second / 4) for second in range(12))
        assert {verdict.action for _, verdict in acted} == {Action.DROP_CONSUMED}
        assert [seconds for seconds, _ in acted] == [0, 1, 2]
        assert "7.00 GiB of memory are available" in acted[0][1].reason

    def test_few_free_pages_alone_are_no_reason(self) -> None:
        assert actions([replace(IDLE, free_bytes=0)]) == []

    def test_consumed_files_go_when_they_fill_the_group(self) -> None:
        full = replace(IDLE, charged_bytes=22 * GIB, file_bytes=20 * GIB)
        assert actions([full]) == [Action.DROP_CONSUMED]

    def test_all_files_go_when_there_is_little_room(self) -> None:
        tight = replace(IDLE, anonymous_bytes=22 * GIB, charged_bytes=23 * GIB, file_bytes=1 * GIB)
        assert actions([tight]) == [Action.DROP_ALL]

    def test_all_files_go_when_others_wait(self) -> None:
        samples = [replace(IDLE, seconds=second / 4, others_stalled_seconds=second / 10) for second in range(9)]
        assert set(actions(samples)) == {Action.DROP_ALL}

    def test_without_page_cache_there_is_nothing_to_drop(self) -> None:
        assert actions([replace(IDLE, file_bytes=0, free_bytes=0, available_bytes=7 * GIB)]) == []


def test_others_that_suffer_while_room_is_little_end_it() -> None:
    tight = replace(IDLE, anonymous_bytes=22 * GIB, available_bytes=4 * GIB, file_bytes=0)
    samples = [replace(tight, seconds=second / 4, others_stalled_seconds=second * 0.2) for second in range(20)]
    acted = play(samples)
    assert acted[0][1].action is Action.FREEZE
    assert "other programs waited for memory" in acted[0][1].reason
    calm = [replace(tight, seconds=second / 4, others_stalled_seconds=second * 0.01) for second in range(20)]
    assert actions(calm) == []


def test_others_that_wait_for_other_reasons_do_not() -> None:
    samples = [replace(IDLE, seconds=second / 4, others_stalled_seconds=second / 4) for second in range(20)]
    assert Action.FREEZE not in actions(samples)


class TestFrozen:
    policy = replace(POLICY, when_full=WhenFull.FREEZE)
    full = replace(IDLE, anonymous_bytes=23 * GIB + 900 * MIB, file_bytes=0)

    def frozen(self, policy: Policy) -> State:
        state, verdict = judge(State(), self.full, policy)
        assert verdict.action is Action.FREEZE
        assert state.phase is Phase.FROZEN
        return state

    def test_it_stays_frozen_while_there_is_no_room(self) -> None:
        later = [replace(self.full, seconds=second) for second in range(1, 600)]
        assert play(later, self.policy, self.frozen(self.policy)) == []

    def test_it_runs_on_once_there_is_room(self) -> None:
        later = [replace(self.full, seconds=second / 2, anonymous_bytes=20 * GIB) for second in range(1, 5)]
        acted = play(later, self.policy, self.frozen(self.policy))
        assert [(seconds, verdict.action) for seconds, verdict in acted] == [(1.0, Action.RESUME)]

    def test_a_command_that_only_pauses_its_growth_does_not_run_on(self) -> None:
        # Frozen, it no longer grows: what was too little room a moment ago must not look like enough.
        samples = growing(16 * GIB, every=0.01)
        state = State()
        for sample in samples:
            state, verdict = judge(state, sample, self.policy)
            if verdict.action is Action.FREEZE:
                break
        assert state.phase is Phase.FROZEN
        still = [replace(sample, seconds=sample.seconds + second) for second in range(1, 30)]
        assert play(still, self.policy, state) == []

    def test_it_is_stopped_if_others_take_what_is_left(self) -> None:
        later = [replace(self.full, seconds=9.0, available_bytes=900 * MIB)]
        acted = play(later, self.policy, self.frozen(self.policy))
        assert [verdict.action for _, verdict in acted] == [Action.STOP]

    def test_the_other_policy_stops_at_once(self) -> None:
        acted = play([replace(self.full, seconds=0.02)], POLICY, self.frozen(POLICY))
        assert [verdict.action for _, verdict in acted] == [Action.STOP]


class TestStopping:
    state = State(phase=Phase.STOPPING, since_seconds=10.0, lasting_bytes=20 * GIB)
    holding = replace(IDLE, anonymous_bytes=20 * GIB)

    def test_it_gets_its_time(self) -> None:
        samples = [replace(self.holding, seconds=10 + second / 10) for second in range(1, 60)]
        seconds, verdict = play(samples, POLICY, self.state)[0]
        assert (seconds, verdict.action) == (15.0, Action.KILL)
        assert "within 5 s" in verdict.reason

    def test_unless_it_grows(self) -> None:
        sample = replace(self.holding, seconds=10.1, anonymous_bytes=21 * GIB)
        assert [verdict.action for _, verdict in play([sample], POLICY, self.state)] == [Action.KILL]

    def test_or_is_held_again(self) -> None:
        sample = replace(self.holding, seconds=10.1, held=True)
        assert [verdict.action for _, verdict in play([sample], POLICY, self.state)] == [Action.KILL]


def test_the_guard_looks_more_often_the_less_room_there_is() -> None:
    assert next_look_seconds(100 * GIB) == 0.25
    assert next_look_seconds(1 * GIB) == 0.125
    assert next_look_seconds(0) == next_look_seconds(-5 * GIB) == 0.02
    assert next_look_seconds(0, Phase.FROZEN) == 0.25


def test_the_reserve_grows_with_the_machine_within_bounds() -> None:
    assert [default_reserve(total) for total in (512 * MIB, 20 * GIB, 512 * GIB)] == [64 * MIB, 1 * GIB, 2 * GIB]
