"""Whether keeping files in the page cache is worth what it costs, found by trying: pure decisions, no I/O, no clock.

Reading through the page cache fills it for the next load, and copies every byte once more. On most drives that costs
nothing, since the drive is slower than the copy; on a very fast one it may halve the speed. No fact about the machine
tells beforehand, so a load that would keep a large cold file reads two neighbouring parts of it first, one each way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.host.residency import Residency
from weightlift.operations import Sink
from weightlift.plan import CacheDecision, Wanted, states
from weightlift.units import GIB, MIB, align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.plan import ShardFacts

WORTH_BYTES: Final = 1 * GIB
"""Cold bytes from which on a trial is made."""

PART_BYTES: Final = 64 * MIB
_ALIGNMENT: Final = 2 * MIB
_COST_MAX: Final = 1.1
"""Keeping may cost this many times what reading directly does."""


class Trial(NamedTuple):
    """A load's wanted ranges, split for a trial; each keeps the tag of the range it was cut from.

    Attributes:
        direct: read past the page cache, and timed.
        kept: read through it, and timed.
        rest: everything else, in file order.
    """

    direct: Wanted
    kept: Wanted
    rest: tuple[Wanted, ...]


def find_trial(wanted: Sequence[Wanted], shards: Sequence[ShardFacts]) -> Trial | None:
    """Two neighbouring parts of a range that is not in the page cache, or ``None`` where there is nothing to compare.

    Args:
        wanted: what will be read, in file order.
        shards: facts per shard.
    """
    cold = sum(
        stop - start
        for want in wanted
        if shards[want.shard].direct
        for start, stop, state in states(shards[want.shard].residency, want.offset, want.offset + want.length)
        if state is Residency.ABSENT
    )
    if cold < WORTH_BYTES:
        return None
    tagged = [want._replace(tag=index) for index, want in enumerate(wanted)]
    for index, want in enumerate(tagged):
        begin = _begin(want, shards[want.shard])
        if begin is not None:
            middle, end = begin + PART_BYTES, begin + 2 * PART_BYTES
            around = (_part(want, want.offset, begin), _part(want, end, want.offset + want.length))
            rest = (*tagged[:index], *(part for part in around if part.length), *tagged[index + 1 :])
            return Trial(_part(want, begin, middle), _part(want, middle, end), rest)
    return None


def _begin(want: Wanted, facts: ShardFacts) -> int | None:
    """Where a trial could begin inside a range."""
    placed = want.sink is Sink.PLACE and want.mirrored
    if not facts.direct or not (placed or want.sink in {Sink.DEVICE, Sink.DISCARD}):
        return None
    for start, stop, state in states(facts.residency, want.offset, want.offset + want.length):
        begin = align_up(start, _ALIGNMENT)
        if state is Residency.ABSENT and begin + 2 * PART_BYTES <= stop:
            return begin
    return None


def _part(want: Wanted, begin: int, end: int) -> Wanted:
    address = want.address + begin - want.offset if want.sink is Sink.PLACE else want.address
    return want._replace(offset=begin, length=end - begin, address=address)


def judge_trial(direct_seconds: float, kept_seconds: float) -> CacheDecision:
    """Whether to keep, from what the two parts took.

    Args:
        direct_seconds: time that all workers together spent on the part read directly.
        kept_seconds: the same on the part read through the page cache.
    """
    cost = kept_seconds / max(direct_seconds, 1e-9)
    if cost <= _COST_MAX:
        return CacheDecision(
            keep=True,
            reason="the files fit into free memory, and reading them through the page cache is about as fast as past "
            "it, so they stay cached for the next load",
        )
    return CacheDecision(
        keep=False,
        reason=f"the storage is so fast that filling the page cache takes {cost:.1f} times as long as reading past it, "
        "so the page cache is left as it was",
    )
