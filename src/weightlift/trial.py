"""Whether keeping files in the page cache is worth what it costs, found by trying: pure decisions, no I/O, no clock.

Reading through the page cache fills it for the next load, and copies every byte once more. On most drives that costs
nothing, since the drive is slower than the copy; on a very fast one it may halve the speed. No fact about the machine
tells beforehand, so a load that would keep a large cold file first reads parts of it one way and the other, in turns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.host.residency import Residency
from weightlift.operations import Sink
from weightlift.plan import CacheDecision, Wanted, states
from weightlift.units import GIB, MIB, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightlift.plan import ShardFacts

WORTH_BYTES: Final = 1 * GIB
"""Cold bytes from which on a trial is made."""

ROUNDS: Final = 2
"""How often a trial reads a part each way. The last counts: the first also wakes up workers, memory and drive."""

DIRECT_BYTES: Final = 16 * MIB
"""What it reads past the page cache each time: little, since it is read once more if files are kept."""

KEPT_BYTES: Final = 32 * MIB
"""What it reads through the page cache each time."""

_PIECE_BYTES_MIN: Final = 8 * MIB
_ALIGNMENT: Final = 2 * MIB
_COST_MAX: Final = 1.4
"""Keeping may seem to cost this many times what reading directly does: the next load saves more than that.

A trial says more than whole loads show, since its lanes are short and each begins slowly.
"""


class Round(NamedTuple):
    """One part each way.

    Attributes:
        kept: read through the page cache, and timed; :data:`KEPT_BYTES`.
        direct: read past it, and timed; :data:`DIRECT_BYTES`.
    """

    kept: tuple[Wanted, ...]
    direct: tuple[Wanted, ...]


class Trial(NamedTuple):
    """A load's wanted ranges, split for a trial; each keeps the tag of the range it was cut from.

    Attributes:
        rounds: what is compared, one after the other.
        rest: everything else, in file order.
    """

    rounds: tuple[Round, ...]
    rest: tuple[Wanted, ...]

    @property
    def direct(self) -> tuple[Wanted, ...]:
        """All that is read past the page cache."""
        return tuple(part for one in self.rounds for part in one.direct)


def find_trial(wanted: Sequence[Wanted], shards: Sequence[ShardFacts]) -> Trial | None:
    """Parts of what is not in the page cache, or ``None`` where there is too little to compare.

    Args:
        wanted: what will be read, in file order.
        shards: facts per shard.
    """
    parts = [_Part(nbytes) for nbytes in (KEPT_BYTES, DIRECT_BYTES) * ROUNDS]
    rest: list[Wanted] = []
    for index, want in enumerate(wanted):
        tagged, done = want._replace(tag=index), want.offset
        for part, begin, end in _pieces(tagged, shards[want.shard], parts):
            part.ranges.append(_cut(tagged, begin, end))
            if begin > done:
                rest.append(_cut(tagged, done, begin))
            done = end
        if done < want.offset + want.length:
            rest.append(_cut(tagged, done, want.offset + want.length))
    if any(part.missing for part in parts):
        return None
    ranges = [tuple(part.ranges) for part in parts]
    return Trial(tuple(map(Round, ranges[::2], ranges[1::2])), tuple(rest))


def cold_bytes(wanted: Sequence[Wanted], shards: Sequence[ShardFacts]) -> int:
    """How much of what will be read is not in the page cache, and may be read directly."""
    return sum(
        stop - start
        for want in wanted
        if shards[want.shard].direct
        for start, stop, state in states(shards[want.shard].residency, want.offset, want.offset + want.length)
        if state is Residency.ABSENT
    )


class _Part:
    """A part that is being put together.

    Args:
        nbytes: how long it is to be.

    Attributes:
        ranges: what it has so far.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self.ranges: list[Wanted] = []

    @property
    def missing(self) -> int:
        """Bytes that it lacks."""
        return self._nbytes - sum(one.length for one in self.ranges)


def _pieces(want: Wanted, facts: ShardFacts, parts: Sequence[_Part]) -> Iterator[tuple[_Part, int, int]]:
    """What a range has to give to the parts of a trial, one after the other: the part, begin and end."""
    placed = want.sink is Sink.PLACE and want.mirrored
    if not facts.direct or not (placed or want.sink in {Sink.DEVICE, Sink.DISCARD}):
        return
    for start, stop, state in states(facts.residency, want.offset, want.offset + want.length):
        begin = align_up(start, _ALIGNMENT)
        while state is Residency.ABSENT and stop - begin >= _PIECE_BYTES_MIN:
            part = next((part for part in parts if part.missing), None)
            if part is None:
                return
            length = min(part.missing, align_down(stop - begin, _ALIGNMENT))
            yield part, begin, begin + length
            begin += length


def _cut(want: Wanted, begin: int, end: int) -> Wanted:
    address = want.address + begin - want.offset if want.sink is Sink.PLACE else want.address
    return want._replace(offset=begin, length=end - begin, address=address)


def judge_trial(direct: float, kept: float) -> CacheDecision:
    """Whether to keep, from what the two parts took.

    Args:
        direct: seconds per byte of what was read directly.
        kept: seconds per byte of what was read through the page cache.
    """
    cost = kept / direct if direct else 1.0
    if cost <= _COST_MAX:
        return CacheDecision(
            keep=True,
            reason="the files fit into free memory, and reading them through the page cache is nearly as fast as "
            "past it, so they stay cached for the next load",
        )
    return CacheDecision(
        keep=False,
        reason=f"the storage is so fast that filling the page cache takes {cost:.1f} times as long as reading past it, "
        "so the page cache is left as it was",
    )
