"""What the guard does about what it sees: a pure function from state and sample to state and verdict.

Has no clock and touches nothing, so that whole catastrophes can be played to it. In order of severity:

1. *calm*: nothing is done.
2. The machine has no free pages left and few that could be had, or the command's group is nearly full: page cache of
   files that the command has done with is dropped, before the kernel drops something that is needed.
3. There is little room, or others wait for memory: page cache of all its large files is dropped.
4. There is no room: the command is frozen, and either stopped (asked to end, killed after a grace period) or left
   frozen until there is room again.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from weightlift.health.guard.facts import WhenFull, room
from weightlift.units import GIB, format_bytes

if TYPE_CHECKING:
    from weightlift.health.guard.facts import Policy, Sample

_HISTORY_SECONDS: Final = 3.0
_GROWTH_SECONDS: Final = 0.5
_REACTION_SECONDS: Final = 0.25
_DROP_PAUSE_SECONDS: Final = 1.0
_RESUME_SECONDS: Final = 1.0
_NEARLY_FULL: Final = 0.9
_GETTING_SHORT: Final = 4
_OTHERS_WAIT: Final = 0.2
_OTHERS_SUFFER: Final = 0.5
_FASTEST_GROWTH: Final = 8 * GIB
_LOOK_SECONDS_MIN: Final = 0.02
_LOOK_SECONDS_MAX: Final = 0.25


class Phase(enum.Enum):
    """How things stand between the guard and the command."""

    RUNNING = "running"
    FROZEN = "frozen"
    STOPPING = "stopping"


class Action(enum.Enum):
    """What is to be done now."""

    NOTHING = "nothing"
    DROP_CONSUMED = "drop consumed"
    DROP_ALL = "drop all"
    FREEZE = "freeze"
    RESUME = "resume"
    STOP = "stop"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class Moment:
    """What is remembered of a sample."""

    seconds: float
    lasting_bytes: int
    others_stalled_seconds: float | None


@dataclass(frozen=True, slots=True)
class State:
    """What the next verdict depends on besides the sample.

    Attributes:
        phase: how things stand.
        since_seconds: since when.
        dropped_seconds: when page cache was last dropped.
        lasting_bytes: what the command held when the phase began.
        enough_bytes: room that a frozen command needs to run on.
        history: the last seconds.
    """

    phase: Phase = Phase.RUNNING
    since_seconds: float = 0.0
    dropped_seconds: float = float("-inf")
    lasting_bytes: int = 0
    enough_bytes: int = 0
    history: tuple[Moment, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done, and the figures behind it.

    Attributes:
        action: what is to be done now.
        reason: why, in words; empty if there is nothing to do.
        room_bytes: how much more the command may take.
        growth: bytes a second by which its lasting memory grows.
        others_stalled: fraction of the last seconds in which others waited for memory; ``None`` if unknown.
        tight: whether there is little room.
    """

    action: Action
    reason: str
    room_bytes: int
    growth: float
    others_stalled: float | None
    tight: bool


def judge(state: State, sample: Sample, policy: Policy) -> tuple[State, Verdict]:
    """Decide what to do now.

    Args:
        state: what the previous call returned, ``State()`` at first.
        sample: what is known now; time only goes on.
        policy: the rules.
    """
    history = (*(moment for moment in state.history if sample.seconds - moment.seconds <= _HISTORY_SECONDS),)
    history += (Moment(sample.seconds, sample.lasting_bytes, sample.others_stalled_seconds),)
    state = replace(state, history=history)
    growth, stalled = _growth(history), _stalled(history)
    left, scope = room(sample, policy), _scope(sample, policy)
    floor = min(max(int(growth * _REACTION_SECONDS), scope // 64), scope // 8)
    enough = max(2 * floor, scope // 10)
    figures = _Figures(left, floor, enough, growth, stalled)
    action, reason = _action(state, sample, policy, figures)
    return _next(state, sample, action, enough), Verdict(action, reason, left, growth, stalled, figures.tight)


def next_look_seconds(room_bytes: int, phase: Phase = Phase.RUNNING) -> float:
    """How long the guard may sleep: so short that even a very fast program cannot use up the room meanwhile."""
    if phase is Phase.FROZEN:
        return _LOOK_SECONDS_MAX
    return min(max(room_bytes / _FASTEST_GROWTH, _LOOK_SECONDS_MIN), _LOOK_SECONDS_MAX)


@dataclass(frozen=True, slots=True)
class _Figures:
    """Room, the room below which there is none, the room below which it is little, growth, suffering of others."""

    room: int
    floor: int
    enough: int
    growth: float
    stalled: float | None

    @property
    def tight(self) -> bool:
        return self.room < self.enough


def _scope(sample: Sample, policy: Policy) -> int:
    """What room is measured against: the command's own limit or the machine."""
    return policy.total_bytes if sample.ceiling_bytes is None else min(policy.total_bytes, sample.ceiling_bytes)


def _growth(history: tuple[Moment, ...]) -> float:
    last = history[-1]
    recent = [moment for moment in history[:-1] if last.seconds - moment.seconds <= _GROWTH_SECONDS] or history[-2:-1]
    if not recent or last.seconds <= recent[0].seconds:
        return 0.0
    return max(0.0, (last.lasting_bytes - recent[0].lasting_bytes) / (last.seconds - recent[0].seconds))


def _stalled(history: tuple[Moment, ...]) -> float | None:
    first, last = history[0], history[-1]
    if first.others_stalled_seconds is None or last.others_stalled_seconds is None or last.seconds <= first.seconds:
        return None
    # A moment says little: the machine has to have suffered for a while.
    share = (last.others_stalled_seconds - first.others_stalled_seconds) / max(last.seconds - first.seconds, 1.0)
    return min(max(share, 0.0), 1.0)


def _action(state: State, sample: Sample, policy: Policy, figures: _Figures) -> tuple[Action, str]:
    if state.phase is Phase.STOPPING:
        return _while_stopping(state, sample, policy)
    if state.phase is Phase.FROZEN:
        return _while_frozen(state, sample, policy, figures)
    full = _why_full(sample, policy, figures)
    if full:
        return Action.FREEZE, full
    if sample.seconds - state.dropped_seconds < _DROP_PAUSE_SECONDS or not sample.file_bytes:
        return Action.NOTHING, ""
    if figures.tight:
        return Action.DROP_ALL, f"room for {format_bytes(max(0, figures.room))} more is left"
    if (figures.stalled or 0.0) >= _OTHERS_WAIT:
        return Action.DROP_ALL, f"other programs waited for memory {figures.stalled:.0%} of the time"
    # A machine that has been up for a while has few free pages and is well all the same, as long as many can be had.
    if sample.free_bytes < policy.reserve_bytes and sample.available_bytes < policy.total_bytes // _GETTING_SHORT:
        return Action.DROP_CONSUMED, f"only {format_bytes(sample.available_bytes)} of memory are available"
    ceiling = sample.ceiling_bytes
    if ceiling is not None and (sample.charged_bytes or 0) >= _NEARLY_FULL * ceiling:
        return Action.DROP_CONSUMED, f"page cache fills the {format_bytes(ceiling)} allowed"
    return Action.NOTHING, ""


def _why_full(sample: Sample, policy: Policy, figures: _Figures) -> str:
    """Why the command must not run on; empty if it may."""
    grows = f", growing by {format_bytes(int(figures.growth))} a second" if figures.growth else ""
    holds = f"it holds {format_bytes(sample.lasting_bytes)} that cannot be dropped{grows}"
    ceiling = sample.ceiling_bytes
    if sample.held:
        return f"{holds}, and has reached its limit of {format_bytes(ceiling or 0)}"
    if (
        ceiling is not None
        and figures.room <= figures.floor
        and ceiling - sample.lasting_bytes <= sample.available_bytes
    ):
        return f"{holds}, of {format_bytes(ceiling)} that it may have"
    # Ending a program that holds next to nothing would help nobody.
    if sample.lasting_bytes < policy.reserve_bytes // 2:
        return ""
    if figures.room <= figures.floor:
        return f"{holds}, and {format_bytes(sample.available_bytes)} are left for everything"
    if figures.tight and (figures.stalled or 0.0) >= _OTHERS_SUFFER:
        return f"{holds}, and other programs waited for memory {figures.stalled:.0%} of the time"
    return ""


def _while_frozen(state: State, sample: Sample, policy: Policy, figures: _Figures) -> tuple[Action, str]:
    # A frozen command does not grow, so what is enough for it is what was so while it ran.
    full = figures.room < state.enough_bytes or sample.held
    if not full and sample.seconds - state.since_seconds >= _RESUME_SECONDS:
        return Action.RESUME, f"room for {format_bytes(figures.room)} is there again"
    if full and policy.when_full is WhenFull.STOP:
        return Action.STOP, "there is still no room for it"
    if sample.available_bytes < policy.reserve_bytes // 2 and sample.lasting_bytes >= policy.reserve_bytes // 2:
        return Action.STOP, f"only {format_bytes(sample.available_bytes)} are left for everything"
    return Action.NOTHING, ""


def _while_stopping(state: State, sample: Sample, policy: Policy) -> tuple[Action, str]:
    if sample.held:
        return Action.KILL, "it reached its limit again instead of ending"
    if sample.lasting_bytes - state.lasting_bytes > policy.reserve_bytes // 4:
        return Action.KILL, "it grew on instead of ending"
    if sample.seconds - state.since_seconds >= policy.grace_seconds:
        return Action.KILL, f"it did not end within {policy.grace_seconds:g} s"
    return Action.NOTHING, ""


def _next(state: State, sample: Sample, action: Action, enough_bytes: int) -> State:
    phases = {Action.FREEZE: Phase.FROZEN, Action.RESUME: Phase.RUNNING, Action.STOP: Phase.STOPPING}
    if action in phases:
        return replace(
            state,
            phase=phases[action],
            since_seconds=sample.seconds,
            lasting_bytes=sample.lasting_bytes,
            enough_bytes=enough_bytes,
            history=state.history[-1:],
        )
    if action in {Action.DROP_CONSUMED, Action.DROP_ALL}:
        return replace(state, dropped_seconds=sample.seconds)
    return state
