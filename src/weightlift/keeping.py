"""Whether what a load reads stays in the page cache, where only trying tells what that costs; and what was found out.

A large load makes a trial of its own (:mod:`weightlift.trial`). Of loads too small for that, as those of programs that
load a model module by module, one is read directly for comparison once they have come to as much. What was found out
holds for the drives and the kind of device as long as the process lives. No I/O, no clock.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.trial import (
    DIRECT_BYTES,
    KEPT_BYTES,
    ROUNDS_MAX,
    WORTH_BYTES,
    cold_bytes,
    cost_of,
    find_trial,
    judge_cost,
    judge_rounds,
)
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.operations import Counters
    from weightlift.plan import CacheDecision, ShardFacts, Wanted
    from weightlift.trial import Trial

_SAMPLE_BYTES_MIN: Final = 8 * MIB
"""Smaller loads say more about starting and ending than about reading."""

COLD_SHARE_MIN: Final = 0.9
"""Of a load that tells something; the header of a shard is in the page cache always."""

SAMPLES_BYTES: Final = 64 * MIB
"""What small loads read directly for comparison, in all."""

_SAMPLE_BYTES_MAX: Final = 2 * SAMPLES_BYTES
"""Of one load: what is read past the page cache may have to be read into it once more. Larger ones make a trial."""


_STREAM_SHARE_MIN: Final = 32
"""A stream's units are read whole. One that is read directly may be so small a part of what is cold, or it would take
too long to read once more."""


class Where(NamedTuple):
    """What a finding holds for.

    Attributes:
        drives: the numbers of the shards' file systems.
        device: where the tensors go.
    """

    drives: frozenset[int]
    device: str


class _Record:
    """What loads of one kind have shown so far: bytes and seconds, by whether they were kept."""

    def __init__(self) -> None:
        self.decision: CacheDecision | None = None
        self._bytes = {True: 0, False: 0}
        self._seconds = {True: 0.0, False: 0.0}

    @property
    def lacks_direct(self) -> bool:
        return self._bytes[True] >= WORTH_BYTES

    def add(self, nbytes: int, seconds: float, *, kept: bool) -> None:
        self._bytes[kept] += nbytes
        self._seconds[kept] += seconds
        if self._bytes[False] >= SAMPLES_BYTES:
            direct, through = (self._seconds[kept] / self._bytes[kept] for kept in (False, True))
            self.decision = judge_cost(cost_of(direct, through))


_records: dict[Where, _Record] = {}
_lock = threading.Lock()


def _record_of(where: Where) -> _Record:
    with _lock:
        return _records.setdefault(where, _Record())


def forget() -> None:
    """Forget what loads of this process have shown, as if it had just begun."""
    with _lock:
        _records.clear()


class Keeping:
    """One load's part in finding out.

    Args:
        decision: what was decided from facts alone.
        wanted: what will be read, in file order.
        facts: facts per shard.
        where: what a finding will hold for.

    Attributes:
        decision: what is decided now.
        trial: the trial that this load is to make first, if any.
        keeps: whether what is read outside a trial goes through the page cache to stay there, for now.
        missed: ranges that are to stay in the page cache and were read past it.
    """

    def __init__(
        self, decision: CacheDecision, wanted: Sequence[Wanted], facts: Sequence[ShardFacts], where: Where
    ) -> None:
        self.decision, self.keeps = decision, decision.keep
        self.trial: Trial | None = None
        self.missed: Sequence[Wanted] = ()
        self._costs: list[float] = []
        self._record: _Record | None = None
        if not decision.on_trial:
            return
        record = _record_of(where)
        if record.decision is not None:
            self.decision, self.keeps = record.decision, record.decision.keep
            return
        self._record = record
        total, cold = sum(want.length for want in wanted), cold_bytes(wanted, facts)
        if cold >= WORTH_BYTES or (record.lacks_direct and cold > _SAMPLE_BYTES_MAX):
            self.trial = find_trial(wanted, facts)
        if self.trial is not None:
            self.keeps = False
        elif total < _SAMPLE_BYTES_MIN or cold < COLD_SHARE_MIN * total:
            self._record = None
        elif record.lacks_direct and total <= _SAMPLE_BYTES_MAX:
            self.keeps, self.missed = False, wanted

    @property
    def rest(self) -> list[Wanted]:
        """What the trial has not read."""
        assert self.trial is not None
        return self.trial.rest(len(self._costs))

    def judge(self, kept_seconds: float, direct_seconds: float) -> bool:
        """Decide by how long the parts of the rounds so far took.

        Args:
            kept_seconds: of the latest, what was read through the page cache.
            direct_seconds: of the latest, what was read past it.

        Returns:
            Whether it is decided; if not, one more round is to be made.
        """
        assert self.trial is not None
        assert self._record is not None
        self._costs.append(cost_of(direct_seconds / DIRECT_BYTES, kept_seconds / KEPT_BYTES))
        decision = judge_rounds(self._costs, len(self.trial.rounds))
        if decision is None:
            return False
        self.decision = self._record.decision = decision
        self.missed = self.trial.direct(len(self._costs)) if decision.keep else ()
        self.keeps, self._record = decision.keep, None
        return True

    def learn(self, counters: Counters, seconds: float) -> CacheDecision:
        """Remember how long a load that made no trial took for its bytes; returns the decision, now that it ends.

        Args:
            counters: what the engine did. A load that pinned memory on the way tells nothing of reading.
            seconds: how long it took.
        """
        if self._record is not None and not counters.register_seconds:
            with _lock:
                self._record.add(counters.landed_bytes, seconds, kept=self.keeps)
            found = self._record.decision
            if found is not None and not self.keeps:
                self.decision, self.missed = found, self.missed if found.keep else ()
        return self.decision


class StreamKeeping:
    """A stream's part in finding out: some of its first units are read one way, and some the other.

    Args:
        decision: what was decided from facts alone.
        cold_bytes: how much will be read that is not in the page cache and could be read directly.
        where: what a finding will hold for.

    Attributes:
        decision: what is decided now.
        missed: ranges that are to stay in the page cache and were read past it.
    """

    def __init__(self, decision: CacheDecision, cold_bytes: int, where: Where) -> None:
        self.decision = decision
        self.missed: list[Wanted] = []
        self._parts: deque[bool] = deque()
        self._taken_bytes = 0
        self._kept_per_byte = 0.0
        self._costs: list[float] = []
        self._direct_bytes_max = cold_bytes // _STREAM_SHARE_MIN
        if not decision.on_trial:
            return
        self._record = _record_of(where)
        if self._record.decision is not None:
            self.decision = self._record.decision
        elif cold_bytes >= WORTH_BYTES:
            self._parts.extend((True, False) * ROUNDS_MAX)

    @property
    def under_way(self) -> bool:
        """Whether there is still something to find out."""
        return bool(self._parts)

    @property
    def is_full(self) -> bool:
        """Whether the units taken make up a part of the trial, which is measured with nothing else under way."""
        return self.under_way and self._taken_bytes >= (KEPT_BYTES if self._parts[0] else DIRECT_BYTES)

    def take(self, wanted: Sequence[Wanted]) -> bool:
        """Whether the next unit is read through the page cache."""
        if not self._parts:
            return self.decision.keep
        nbytes = sum(want.length for want in wanted)
        if not self._parts[0] and nbytes > self._direct_bytes_max:
            self._parts.clear()
            return self.decision.keep
        self._taken_bytes += nbytes
        if not self._parts[0]:
            self.missed += wanted
        return self._parts[0]

    def measured(self, seconds: float) -> None:
        """Everything taken since the part before has landed.

        Args:
            seconds: for how long any worker was busy with it.
        """
        per_byte = seconds / self._taken_bytes
        self._taken_bytes = 0
        if self._parts.popleft():
            self._kept_per_byte = per_byte
            return
        self._costs.append(cost_of(per_byte, self._kept_per_byte))
        decision = judge_rounds(self._costs, ROUNDS_MAX)
        if decision is not None:
            self._parts.clear()
            self.decision = self._record.decision = decision
            self.missed = self.missed if decision.keep else []
