"""What to do when memory gets short during a load: figures in, a decision out; no system, no clock, no engine.

Escalation, from what costs nothing to what ends the load:

1. Under the *floor*, drop the page cache that the load has caused, give back staging memory that is not in use, and
   halve what is in flight, step by step down to one worker.
2. Under a quarter of the floor, counting all that the kernel could still take back, hold every worker: from then on the
   load takes no more memory. The same under three times the floor when what the tensors still need is more than there
   is: what workers have begun must still fit.
3. If that has not helped after a while, give up, with the numbers, before the kernel picks a victim. Where there is
   swap enough, go on with one worker instead.

Above twice the floor the load is let go again, as slowly as it was throttled.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from weightlift.units import MIB, format_bytes

FLOOR_BYTES_MIN: Final = 32 * MIB
FLOOR_BYTES_MAX: Final = 512 * MIB
_FLOOR_SHARE: Final = 64
_CRITICAL_SHARE: Final = 4
_DOOMED: Final = 3
_AMPLE: Final = 2
PATIENCE_SECONDS: Final = 2.0
"""How long everything is held before the load is given up."""

_STEP_SECONDS: Final = 0.05
_RECOVERY_SECONDS: Final = 0.5
_DROP_SECONDS: Final = 0.25
SHARES: Final = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.0)
"""Parts of the concurrency that a load may be allowed; the last one holds it."""
_HELD: Final = len(SHARES) - 1
_SLOWEST: Final = _HELD - 1


class MemoryView(NamedTuple):
    """What a decision is made from.

    Attributes:
        seconds: since the start of the load.
        available_bytes: memory left without taking anything from anybody.
        last_resort_bytes: the same with what the kernel can still take back before it kills.
        swap_free_bytes: swap left.
        remaining_bytes: host memory that the tensors will still take.
    """

    seconds: float
    available_bytes: int
    last_resort_bytes: int
    swap_free_bytes: int
    remaining_bytes: int


class Decision(NamedTuple):
    """What to do now.

    Attributes:
        share: part of the concurrency that may be used; 0 holds everything.
        drop_cache: drop the page cache that the load has caused, and cause no more.
        give_up: end the load with an error.
        reason: what was seen, in a sentence; empty where nothing changed.
    """

    share: float
    drop_cache: bool = False
    give_up: bool = False
    reason: str = ""


def floor_bytes(total_bytes: int) -> int:
    """The floor for a machine or control group of some size."""
    return min(max(total_bytes // _FLOOR_SHARE, FLOOR_BYTES_MIN), FLOOR_BYTES_MAX)


class Care:
    """Decides, from one look at memory after the other.

    Args:
        total_bytes: memory of the machine, or the limit of the control group.
    """

    def __init__(self, total_bytes: int) -> None:
        self.floor_bytes = floor_bytes(total_bytes)
        self._level = 0
        self._changed = self._held_since = float("-inf")
        self._dropped = float("-inf")
        self._carries_on = False

    @property
    def share(self) -> float:
        """The part of the concurrency that is allowed now."""
        return SHARES[self._level]

    def is_near(self, available_bytes: int) -> bool:
        """Whether memory is so short that it should be looked at more often."""
        return available_bytes < 2 * _AMPLE * self.floor_bytes or self._level > 0

    def decide(self, view: MemoryView) -> Decision:
        """What to do, now that memory looks like this."""
        if self._is_critical(view):
            return self._hold(view)
        self._carries_on = self._carries_on and view.last_resort_bytes < self.floor_bytes
        if self._level == _HELD:
            return self._change(view, _SLOWEST, "memory is there again")
        if view.available_bytes < self.floor_bytes:
            return self._throttle(view)
        ample = view.available_bytes >= _AMPLE * self.floor_bytes
        if self._level and ample and view.seconds - self._changed >= _RECOVERY_SECONDS:
            return self._change(view, self._level - 1, "memory is there again")
        return Decision(self.share)

    def _is_critical(self, view: MemoryView) -> bool:
        if self._carries_on:
            return False
        left = view.last_resort_bytes
        doomed = view.remaining_bytes > left + view.swap_free_bytes and left < _DOOMED * self.floor_bytes
        return doomed or left < self.floor_bytes // _CRITICAL_SHARE

    def _throttle(self, view: MemoryView) -> Decision:
        drop = view.seconds - self._dropped >= _DROP_SECONDS
        if drop:
            self._dropped = view.seconds
        if self._level == _SLOWEST or view.seconds - self._changed < _STEP_SECONDS:
            return Decision(self.share, drop_cache=drop, reason=self._seen(view) if drop else "")
        return self._change(view, self._level + 1, "", drop_cache=drop)

    def _hold(self, view: MemoryView) -> Decision:
        if self._level != _HELD:
            self._held_since = self._dropped = view.seconds
            return self._change(view, _HELD, "", drop_cache=True)
        if view.seconds - self._held_since < PATIENCE_SECONDS:
            return Decision(0.0)
        critical = self.floor_bytes // _CRITICAL_SHARE
        if view.swap_free_bytes > critical and view.remaining_bytes <= view.last_resort_bytes + view.swap_free_bytes:
            self._carries_on = True
            return self._change(view, _SLOWEST, "there is swap for the rest, and nothing else helped")
        return Decision(0.0, give_up=True, reason=self._seen(view))

    def _change(self, view: MemoryView, level: int, why: str, *, drop_cache: bool = False) -> Decision:
        self._level, self._changed = level, view.seconds
        reason = f"{self._seen(view)}: {why}" if why else self._seen(view)
        return Decision(self.share, drop_cache=drop_cache, reason=reason)

    def _seen(self, view: MemoryView) -> str:
        parts = [
            f"{format_bytes(view.available_bytes)} of memory are left, with a floor of {format_bytes(self.floor_bytes)}"
        ]
        if view.remaining_bytes:
            parts.append(f"the tensors still need {format_bytes(view.remaining_bytes)}")
        return ", and ".join(parts)
