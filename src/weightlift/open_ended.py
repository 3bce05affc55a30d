"""A transfer whose targets come one after the other: for streams, and for programs that load a model part by part."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from weightlift.keeping import COLD_SHARE_MIN, StreamKeeping
from weightlift.pipeline import Transfer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.description import Description
    from weightlift.operations import Counters, Extent
    from weightlift.targets.base import Target


class OpenTransfer(Transfer):
    """A :class:`~weightlift.pipeline.Transfer` that is begun with nothing to do, and goes on until it is finished."""

    def begin_stream(self, total_bytes: int) -> None:
        """Start an engine with nothing to do yet; targets follow.

        Args:
            total_bytes: most bytes that they will be.
        """
        self._total_bytes = total_bytes
        self._stream: StreamKeeping | None = None
        self._busy_before = 0.0
        self.pool = self._size_staging((), open_ended=True)
        self._begin()

    def may_submit(self) -> bool:
        """Whether one more target may be submitted: a part of a trial is measured with nothing else under way."""
        stream = self._stream
        if stream is None or not stream.is_full:
            return True
        counters = self._counters()
        if counters.landed_bytes < self._submitted_bytes:
            return False
        stream.measured(counters.busy_seconds - self._busy_before)
        self._busy_before = counters.busy_seconds
        # What was decided since, for want of memory, stays.
        if not stream.under_way and self.cache.keep:
            self._decide(stream.decision)
            self.shards.fetch(stream.missed)
        return True

    def submit(self, target: Target) -> Sequence[Extent]:
        """Have the engine read what one more target wants; returns its extents."""
        self._targets.append(target)
        wanted = target.prepare()
        if self._stream is None:
            self._stream = StreamKeeping(self.cache, self._cold_bytes(), self._where(target))
            self._decide(self._stream.decision)
        keep = self._stream.take(wanted) and self.cache.keep
        return self._hand_in(wanted, target, keep=keep)

    def _cold_bytes(self) -> int:
        """How much of a stream tells what reading directly is worth; none of one that is partly cached."""
        cold = self._total_bytes - (self.shards.cached_before() or 0)
        direct = all(self.shards.facts[index].direct for index in self._used)
        return cold if direct and cold >= COLD_SHARE_MIN * self._total_bytes else 0

    def drop(self, target: Target) -> None:
        """Forget a target whose extents have all landed."""
        target.close()
        self._targets.remove(target)

    def landed_bytes(self) -> int:
        """Bytes that have landed so far."""
        assert self._engine is not None
        return self._engine.counters().landed_bytes

    def release_slot(self, slot: int) -> None:
        """Give back the slot of a chunk that was handed over."""
        assert self._engine is not None
        self._engine.return_slot(slot)

    def read_part(self, description: Description, target: Target) -> list[tuple[str, Any]]:
        """Have everything one more target wants land, with nothing else under way.

        Args:
            description: what the target was made for, of the same shards; errors take names from it.
            target: where it goes.

        Returns:
            Its tensors.

        Raises:
            WeightliftError: the first thing that went wrong, once everything has stopped; nothing more can be read.
        """
        begin = time.monotonic()
        self._description = description
        self._targets.append(target)
        with self.aborting():
            wanted = target.prepare()
            before = self._counters()
            keeping = self._keep(wanted, target)
            self._hand_in_rest(self._plan(wanted, target, keep=keeping.keeps), target, keeping)
            self._land(target)
            tensors = self.tensors(target)
            self.shards.check_unchanged()
            self.drop(target)
            now = self._lap("read", begin)
            after = self._counters()
            done = after._replace(
                landed_bytes=after.landed_bytes - before.landed_bytes,
                register_seconds=after.register_seconds - before.register_seconds,
            )
            self._learn(keeping, done, now - begin)
        return tensors

    def _counters(self) -> Counters:
        assert self._engine is not None
        return self._engine.counters()
