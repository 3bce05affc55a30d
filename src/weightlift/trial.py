"""Whether keeping files in the page cache is worth what it costs, found by trying: pure decisions, no I/O, no clock.

Reading through the page cache fills it for the next load, and copies every byte once more. On most drives that costs
nothing, since the drive is slower than the copy; on a very fast one it may halve the speed. No fact about the machine
tells beforehand, so a load that would keep a large cold file first reads parts of it one way and the other, in turns,
until that shows which way to go.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.host.residency import Residency
from weightlift.operations import Sink
from weightlift.plan import CacheDecision, Wanted, states
from weightlift.ranges import joined
from weightlift.units import GIB, MIB, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightlift.plan import ShardFacts

WORTH_BYTES: Final = 1 * GIB
"""Cold bytes from which on a trial is made."""

ROUNDS_MIN: Final = 2
"""How often a trial reads a part each way at least. The first does not count: it also wakes up workers and drive."""

ROUNDS_MAX: Final = 5
"""How often it does so where it is not clear what keeping costs: a part takes a few milliseconds on such storage."""

DIRECT_BYTES: Final = 16 * MIB
"""What it reads past the page cache each time: little, since it is read once more if files are kept."""

KEPT_BYTES: Final = 32 * MIB
"""What it reads through the page cache each time."""

_PIECE_BYTES_MIN: Final = 8 * MIB
_ALIGNMENT: Final = 2 * MIB
_COST_MAX: Final = 1.3
"""Keeping may seem to cost this many times what reading directly does: the next load saves more than that."""

_CLEAR: Final = (1.2, 1.12, 1.06)
"""A cost that many times above or below the limit needs no further round: less after each, as a median gets surer."""


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
        rounds: what may be compared, one after the other.
        others: everything else, in file order.
    """

    rounds: tuple[Round, ...]
    others: tuple[Wanted, ...]

    def direct(self, made: int) -> tuple[Wanted, ...]:
        """All that so many rounds read past the page cache."""
        return tuple(part for one in self.rounds[:made] for part in one.direct)

    def rest(self, made: int) -> list[Wanted]:
        """All that so many rounds leave to be read, in file order."""
        parts = [part for one in self.rounds[made:] for side in one for part in side]
        return list(joined(sorted((*parts, *self.others), key=lambda part: (part.tag, part.offset)), _both))


def find_trial(wanted: Sequence[Wanted], shards: Sequence[ShardFacts]) -> Trial | None:
    """Parts of what is not in the page cache, or ``None`` where there is too little to compare.

    Args:
        wanted: what will be read, in file order.
        shards: facts per shard.
    """
    parts = [_Part(nbytes) for nbytes in (KEPT_BYTES, DIRECT_BYTES) * ROUNDS_MAX]
    others: list[Wanted] = []
    for index, want in enumerate(wanted):
        tagged, done = want._replace(tag=index), want.offset
        for part, begin, end in _pieces(tagged, shards[want.shard], parts):
            part.ranges.append(_cut(tagged, begin, end))
            if begin > done:
                others.append(_cut(tagged, done, begin))
            done = end
        if done < want.offset + want.length:
            others.append(_cut(tagged, done, want.offset + want.length))
    whole = list(takewhile(lambda part: not part.missing, parts))
    if len(whole) < 2 * ROUNDS_MIN:
        return None
    ranges = [tuple(part.ranges) for part in whole[: len(whole) // 2 * 2]]
    others += [one for part in parts[len(ranges) :] for one in part.ranges]
    return Trial(tuple(map(Round, ranges[::2], ranges[1::2])), tuple(others))


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


def _both(one: Wanted, other: Wanted) -> Wanted | None:
    """Two parts of one range as one if they touch."""
    touch = (one.tag, one.offset + one.length) == (other.tag, other.offset)
    return one._replace(length=one.length + other.length) if touch else None


def judge_rounds(costs: Sequence[float], rounds: int) -> CacheDecision | None:
    """Whether to keep, from the rounds of a trial so far; ``None`` if one more is to show it.

    Args:
        costs: of each, how many times as long a byte took through the page cache as past it.
        rounds: how many there can be.
    """
    if len(costs) < ROUNDS_MIN:
        return None
    cost = _middle(costs[1:])
    if len(costs) < rounds:
        clear = _CLEAR[len(costs) - ROUNDS_MIN]
        if _COST_MAX / clear < cost < _COST_MAX * clear:
            return None
    return judge_cost(cost)


def _middle(values: Sequence[float]) -> float:
    """The median; importing ``statistics`` would take longer than many a load."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def judge_cost(cost: float) -> CacheDecision:
    """Whether to keep, from how many times as long a byte takes through the page cache as past it."""
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


def cost_of(direct: float, kept: float) -> float:
    """How many times as long a byte took through the page cache; 1 where neither took any time.

    Args:
        direct: seconds per byte of what was read directly.
        kept: seconds per byte of what was read through the page cache.
    """
    return kept / direct if direct else 1.0
