"""Whether keeping files in the page cache is worth what it costs, found by trying: pure decisions, no I/O, no clock.

Reading through the page cache fills it for the next load, and copies every byte once more. On most drives that costs
nothing, since the drive is slower than the copy; on a very fast one it may halve the speed. No fact about the machine
tells beforehand, so a load that would keep a large cold file reads two parts of it first, one each way. They are
neighbours, or take turns where what is cold lies in pieces.
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

DIRECT_BYTES: Final = 32 * MIB
"""What a trial reads past the page cache: little, since it is read once more if files are kept."""

KEPT_BYTES: Final = 64 * MIB
"""What it reads through the page cache."""
_PIECE_BYTES_MIN: Final = 8 * MIB
_ALIGNMENT: Final = 2 * MIB
_COST_MAX: Final = 1.25
"""Keeping may cost this many times what reading directly does: the next load out of memory saves more than that."""

_COST_CLOSE: Final = 1.05
"""From here on keeping may have won by chance, and direct reads get a second part: the first of a process is slower."""


_Sides = tuple[list["Wanted"], list["Wanted"], list["Wanted"]]
"""What is read directly, through the page cache, and directly for a second time."""


class Trial(NamedTuple):
    """A load's wanted ranges, split for a trial; each keeps the tag of the range it was cut from.

    Attributes:
        direct: read past the page cache, and timed; :data:`DIRECT_BYTES` together.
        kept: read through it, and timed; :data:`KEPT_BYTES`. It goes first, since what comes first also wakes workers
            and memory up, and keeping is to be given up rather too early than too late.
        again: as much as ``direct`` for a second time, should it be close; empty where there is too little.
        rest: everything else, in file order.
    """

    direct: tuple[Wanted, ...]
    kept: tuple[Wanted, ...]
    again: tuple[Wanted, ...]
    rest: tuple[Wanted, ...]

    def without_second(self) -> Trial:
        """The same, with what a second time would have read among the rest."""
        rest = sorted((*self.again, *self.rest), key=lambda part: (part.tag, part.offset))
        return self._replace(again=(), rest=tuple(rest))


def find_trial(wanted: Sequence[Wanted], shards: Sequence[ShardFacts]) -> Trial | None:
    """Parts of what is not in the page cache, or ``None`` where there is too little to compare.

    Args:
        wanted: what will be read, in file order.
        shards: facts per shard.
    """
    sides: _Sides = ([], [], [])
    rest: list[Wanted] = []
    for index, want in enumerate(wanted):
        tagged, done = want._replace(tag=index), want.offset
        for side, begin, end in _pieces(tagged, shards[want.shard], sides):
            sides[side].append(_part(tagged, begin, end))
            if begin > done:
                rest.append(_part(tagged, done, begin))
            done = end
        if done < want.offset + want.length:
            rest.append(_part(tagged, done, want.offset + want.length))
    direct, kept, again = _missing(sides)
    if direct or kept:
        return None
    found = Trial(tuple(sides[0]), tuple(sides[1]), tuple(sides[2]), tuple(rest))
    return found.without_second() if again else found


def cold_bytes(wanted: Sequence[Wanted], shards: Sequence[ShardFacts]) -> int:
    """How much of what will be read is not in the page cache, and may be read directly."""
    return sum(
        stop - start
        for want in wanted
        if shards[want.shard].direct
        for start, stop, state in states(shards[want.shard].residency, want.offset, want.offset + want.length)
        if state is Residency.ABSENT
    )


def _missing(sides: _Sides) -> list[int]:
    lengths = (sum(part.length for part in side) for side in sides)
    return [wanted - length for wanted, length in zip((DIRECT_BYTES, KEPT_BYTES, DIRECT_BYTES), lengths, strict=True)]


def _pieces(want: Wanted, facts: ShardFacts, sides: _Sides) -> Iterator[tuple[int, int, int]]:
    """What a range has to give to the sides of a trial: index of the side that has the smaller part, begin and end.

    The second time comes once the others have all they need.
    """
    placed = want.sink is Sink.PLACE and want.mirrored
    if not facts.direct or not (placed or want.sink in {Sink.DEVICE, Sink.DISCARD}):
        return
    for start, stop, state in states(facts.residency, want.offset, want.offset + want.length):
        begin = align_up(start, _ALIGNMENT)
        while state is Residency.ABSENT and stop - begin >= _PIECE_BYTES_MIN:
            missing = _missing(sides)
            side = int(missing[1] / KEPT_BYTES > missing[0] / DIRECT_BYTES) if missing[0] or missing[1] else 2
            length = min(missing[side], align_down(stop - begin, _ALIGNMENT))
            if not length:
                return
            yield side, begin, begin + length
            begin += length


def _part(want: Wanted, begin: int, end: int) -> Wanted:
    address = want.address + begin - want.offset if want.sink is Sink.PLACE else want.address
    return want._replace(offset=begin, length=end - begin, address=address)


def is_close(direct: float, kept: float) -> bool:
    """Whether keeping costs so little less than it may that another look at direct reads could change the verdict.

    Args:
        direct: seconds per byte of what was read directly.
        kept: seconds per byte of what was read through the page cache.
    """
    return _COST_CLOSE * direct <= kept <= _COST_MAX * direct


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
