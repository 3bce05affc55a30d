"""The one place where plan, engine, buffers, targets and monitor meet: carries out one load from start to report.

A :class:`Transfer` owns everything a load has open. Whatever ends it (success, a failed read, Ctrl-C), the engine has
stopped before memory is released; a read that never returns keeps its buffers and descriptors alive and is named.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

from weightlift.collector import collector_resting
from weightlift.device_staging import StagingLoan
from weightlift.engines.choice import make_engine
from weightlift.engines.probing import run_probes
from weightlift.failures import abandon, raise_failure
from weightlift.host.memory import headroom
from weightlift.keeping import Keeping, Where
from weightlift.load_staging import size_staging, take_staging
from weightlift.operations import ChunkReady, Engine, Event, Extent, ExtentDone, Failure
from weightlift.plan import CacheDecision, batches, decide_cache, extents_of, in_turns
from weightlift.shards import OpenShards
from weightlift.supervision import Supervisor
from weightlift.types import Method
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightlift.buffers import SlotPool
    from weightlift.description import Description
    from weightlift.engines.reader import Reader
    from weightlift.host.memory import Headroom
    from weightlift.monitor import MonitorResult
    from weightlift.operations import Counters
    from weightlift.options import LoadOptions
    from weightlift.plan import Wanted
    from weightlift.reach import Reach
    from weightlift.staging import Pool
    from weightlift.targets.base import Target
    from weightlift.targets.device import DeviceAccess

_TICK_SECONDS: Final = 0.01
_STUCK_SECONDS: Final = 2.0
_MAKING_SECONDS: Final = 0.002
_FIRST_BATCH_BYTES: Final = 64 * MIB
_MOST_BATCH_BYTES: Final = 512 * MIB


class Transfer:
    """One load: opens shards, plans, runs an engine, and tells what happened.

    Args:
        description: the checkpoint.
        reach: the shards to read, and how far.
        options: the caller's options.
        destination_bytes: host memory that the tensors will take, for the decision about the page cache.
        look_at_cache: find out what the page cache holds; needless where nothing will be read.
        accesses: the GPUs that targets copy to, by the index that extents name them with.
        reader: how the Python engine asks for bytes; for fault injection.
        room: memory left for this process, if that was just looked at.
    """

    def __init__(
        self,
        description: Description,
        reach: Reach,
        options: LoadOptions,
        *,
        destination_bytes: int,
        look_at_cache: bool = True,
        accesses: Sequence[DeviceAccess] = (),
        reader: Reader | None = None,
        room: Headroom | None = None,
    ) -> None:
        self.started = time.monotonic()
        self.phases: dict[str, float] = {}
        self._description, self._used, self._options = description, reach.shards, options
        self._reader = reader
        self._engine: Engine | None = None
        self._accesses = accesses
        self._slots: SlotPool | StagingLoan | None = None
        self.pinned_bytes = self.refused_bytes = 0
        self._targets: list[Target] = []
        self._made: list[tuple[str, Any]] = []
        self._making: Iterator[tuple[str, Any]] = iter(())
        self._extents: list[Extent] = []
        self._keeping: Keeping | None = None
        self._total_bytes = self._submitted_bytes = self._outstanding = 0
        self.consumer_seconds = self.waiting_seconds = 0.0
        self.supervisor = Supervisor(options, self.started, self._drop_cache, self._device_used if accesses else None)
        self.shards = OpenShards(
            description,
            *reach,
            want_direct=options.method in {Method.AUTO, Method.DIRECT},
            want_mapping=options.method is Method.MMAP,
            look_at_cache=look_at_cache,
            ask=run_probes,
        )
        room = room or headroom()
        self.cache: CacheDecision = decide_cache(
            options.cache,
            options.method,
            [self.shards.facts[index] for index in reach.shards],
            destination_bytes=destination_bytes,
            available_bytes=room.available_bytes if room else None,
        )
        if not self.cache.keep:
            self.shards.probe_uncached()
        self._lap("open", self.started)

    def _lap(self, phase: str, since: float) -> float:
        now = time.monotonic()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - since
        if self._options.recording is not None:
            self._options.recording.phases.append((phase, since - self.started, now - self.started))
        return now

    def run(self, target: Target) -> None:
        """Read everything ``target`` wants and have it land.

        Raises:
            WeightliftError: the first thing that went wrong, once everything has stopped.
        """
        begin = time.monotonic()
        self._targets.append(target)
        with self.aborting():
            self._start(target)
            begin = self._lap("plan", begin)
            self._land(target)
            self.supervisor.sample(target.host_bytes)
            self._lap("read", begin)

    def tensors(self, target: Target) -> list[tuple[str, Any]]:
        """The tensors of a target whose bytes have all landed, by name and in file order."""
        made, self._made = self._made, []
        with collector_resting(len(self._description)):
            return made + list(self._making if target.makes_ahead else target.finish())

    @contextlib.contextmanager
    def aborting(self) -> Iterator[None]:
        """Whatever is raised inside ends the load: everything stops and is released first."""
        try:
            yield
        except BaseException as err:
            self.abort(err)
            raise

    def _start(self, target: Target) -> None:
        wanted = target.prepare()
        self._keeping = keeping = self._keep(wanted, target)
        extents = self._plan(wanted, target, keep=keeping.keeps)
        self._total_bytes = sum(extent.length for extent in extents)
        self.pool = self._size_staging(extents, open_ended=False)
        self._begin()
        self._hand_in_rest(extents, target, keeping)

    def _keep(self, wanted: Sequence[Wanted], target: Target) -> Keeping:
        """Decide whether what a target wants is kept, as far as that is known before it is read."""
        keeping = Keeping(self.cache, wanted, self.shards.facts, self._where(target))
        self._decide(keeping.decision)
        return keeping

    def _where(self, target: Target) -> Where:
        return Where(frozenset(self._description.shards[index].identity.device for index in self._used), target.device)

    def _learn(self, keeping: Keeping, counters: Counters, seconds: float) -> None:
        """Remember what was seen of keeping, and have what was read past the page cache for comparison follow."""
        if self.cache.keep:
            self._decide(keeping.learn(counters, seconds))
            self.shards.fetch(keeping.missed)

    def _hand_in_rest(self, extents: Sequence[Extent], target: Target, keeping: Keeping) -> None:
        """Give the engine what a target wants, after the trial if there is one to be made."""
        if keeping.trial is not None:
            self._try(keeping, target)
            extents = self._plan(keeping.rest, target, keep=keeping.keeps and self.cache.keep)
        first = _FIRST_BATCH_BYTES if self._accesses else self._total_bytes
        for batch in batches(in_turns(extents, in_order=target.in_order), first, _MOST_BATCH_BYTES):
            self._add(target.bind(batch))

    def _plan(self, wanted: Sequence[Wanted], target: Target, *, keep: bool) -> list[Extent]:
        return extents_of(wanted, self.shards.facts, self._options.method, keep=keep, in_order=target.in_order)

    def _decide(self, decision: CacheDecision) -> None:
        if self.cache.keep and not decision.keep:
            self.shards.probe_uncached()
        self.cache = decision

    def _try(self, keeping: Keeping, target: Target) -> None:
        """Read parts one way and the other, and decide by how long that took, whatever holds this thread up."""
        assert keeping.trial is not None
        for kept, direct in keeping.trial.rounds:
            decided = keeping.judge(self._spend(kept, target, keep=True), self._spend(direct, target, keep=False))
            if decided or not self.cache.keep:  # memory may have got short on the way
                break
        if self.cache.keep:
            self._decide(keeping.decision)
        self.supervisor.tune_anew()

    def _spend(self, parts: Sequence[Wanted], target: Target, *, keep: bool) -> float:
        assert self._engine is not None
        # Time in which workers were busy, however many: of several that wait for one drive each waits the longer.
        before = self._engine.counters().busy_seconds
        self._hand_in(parts, target, keep=keep)
        self._serve(target)
        return self._engine.counters().busy_seconds - before

    def _add(self, extents: Sequence[Extent]) -> None:
        assert self._engine is not None
        self._engine.submit(extents)
        self._extents.extend(extents)
        self._outstanding += len(extents)
        self._submitted_bytes += sum(extent.length for extent in extents)

    def _hand_in(self, wanted: Sequence[Wanted], target: Target, *, keep: bool) -> Sequence[Extent]:
        planned = self._plan(wanted, target, keep=keep)
        extents = target.bind(list(in_turns(planned, in_order=target.in_order)))
        self._add(extents)
        return extents

    def _size_staging(self, extents: Sequence[Extent], *, open_ended: bool) -> Pool:
        return size_staging(
            extents,
            self._options,
            devices=len(self._accesses),
            total_bytes=self._total_bytes,
            cached_bytes=self.shards.cached_before() or 0,
            open_ended=open_ended,
        )

    def events(self, *, wait: bool = True) -> list[Event]:
        """What the engine has to tell, waiting a moment for it or not; a failure is raised as its typed error."""
        assert self._engine is not None
        events = self._engine.poll(_TICK_SECONDS if wait else 0.0)
        for event in events:
            if isinstance(event, Failure):
                self._fail(event)
        return events

    def tag(self, extent: int) -> int:
        """Which of its target's ranges an extent belongs to."""
        return self._extents[extent].tag

    # ---- the engine at work

    def _begin(self) -> None:
        pool = self.pool
        runtime = self._accesses[0].runtime if self._accesses else None
        slots = take_staging(pool, self._options, runtime, [access.ordinal for access in self._accesses])
        self._slots = slots
        devices = slots.devices if isinstance(slots, StagingLoan) else None
        self._engine = make_engine(
            self._options.engine,
            self.shards.sources,
            slots.memory,
            pool.worker_room,
            reader=self._reader,
            devices=devices,
        )
        if isinstance(slots, StagingLoan):
            loan = slots
            self.supervisor.pinned = lambda: loan.pinned_bytes
        if self._options.watch_seconds and self._total_bytes:
            self._engine.watch(self._options.watch_seconds, [str(shard.path) for shard in self._description.shards])
        recording = self._options.recording
        if recording is not None and recording.steps_max:
            recording.steps_begin = time.monotonic() - self.started
            self._engine.trace(recording.steps_max)
        self.supervisor.begin(self._engine, pool, self._total_bytes)

    def _land(self, target: Target) -> None:
        """Have all of a target land, and make its tensors meanwhile where that can be done."""
        if target.makes_ahead:
            self._making = target.finish()
        self._serve(target)

    def _serve(self, target: Target) -> None:
        """Have everything that was submitted land."""
        engine = self._engine
        assert engine is not None
        while self._outstanding:
            for event in self.events(wait=not self._make_some()):
                if isinstance(event, ExtentDone):
                    self._outstanding -= 1
                elif isinstance(event, ChunkReady):
                    target.receive(event, self.tag(event.extent), engine.return_slot)
            self.tick(host_bytes=target.host_bytes)

    def _make_some(self) -> bool:
        """Make tensors for a moment while bytes move; false once there are no more to be made."""
        until = time.monotonic() + _MAKING_SECONDS
        with collector_resting(len(self._description)):
            for item in self._making:
                self._made.append(item)
                if time.monotonic() > until:
                    return True
        return False

    def _fail(self, failure: Failure) -> None:
        raise_failure(failure, self._extents[failure.extent], self._description, self.shards, self._accesses)

    def tick(self, *, host_bytes: int | None) -> None:
        """What has to happen now and then while bytes move.

        Args:
            host_bytes: how much of what was submitted ends in tensors in host memory; ``None`` for all.

        Raises:
            InsufficientMemoryError: memory is so short that the load has to end.
        """
        self.supervisor.tick(self._submitted_bytes, host_bytes)

    def _drop_cache(self) -> None:
        self.shards.drop_caused()
        if self.cache.keep:
            self.cache = CacheDecision(
                keep=False, reason="memory got short on the way, so the page cache was emptied again"
            )

    def _device_used(self) -> int:
        return sum(total - free for free, total in (a.runtime.memory_info(a.ordinal) for a in self._accesses))

    def _stop_recording(self, engine: Engine) -> None:
        """Keep the steps of an engine whose workers have left."""
        recording = self._options.recording
        if recording is not None and recording.steps_max:
            recording.steps = engine.steps()
            recording.shards = [str(shard.path) for shard in self._description.shards]

    def finish(self) -> tuple[Counters, MonitorResult, int | None]:
        """Stop the engine, leave the page cache as decided, check the shards, close everything.

        Returns:
            The engine's counters, what the monitor saw, and how much of the shards is cached now.

        Raises:
            FileChangedError: a shard was changed while it was read.
        """
        begin = time.monotonic()
        engine = self._engine
        assert engine is not None
        with self.aborting():
            self.shards.check_unchanged()
            observed = self.supervisor.finish()
            self.uses = {index: engine.shard_use(index) for index in self._used}
            self.engine_name, self.chunk_bytes = engine.name, self.supervisor.chunk_bytes
            counters = engine.counters()
            engine.cancel()
            engine.join(_STUCK_SECONDS)
            self._stop_recording(engine)
            self._engine = None
            engine.close()
            if self._keeping is not None:
                self._learn(self._keeping, counters, self.phases["read"])
            if not self.cache.keep:
                self.shards.sweep(self.uses)
            cached = self.shards.cached_now()
            if isinstance(self._slots, StagingLoan):
                self.pinned_bytes, self.refused_bytes = self._slots.pinned_bytes, self._slots.refused_bytes
            self._release()
        self._lap("finish", begin)
        return counters, observed, cached

    def abort(self, cause: BaseException) -> None:
        """Stop everything and release it, once; what a read still under way may touch is kept alive instead."""
        engine, self._engine = self._engine, None
        stuck = 0
        if engine is not None:
            engine.cancel()
            stuck = engine.join(_STUCK_SECONDS)
        held = (engine, self._slots, tuple(self._targets))
        if not (stuck and self._accesses):
            # Targets use slots until they are closed, and copies that hang on a device may still write to its tensors.
            self._made, self._making = [], iter(())
            self._close_targets()
        if engine is not None:
            if stuck:
                self._slots, self._targets = None, []
                abandon(engine, stuck, cause, self._description, (*held, self.shards.detach()))
                return
            self._stop_recording(engine)
            engine.close()
        if not self.cache.keep:
            self.shards.sweep()
        self._release()

    def _close_targets(self) -> None:
        while self._targets:
            self._targets.pop().close()

    def _release(self) -> None:
        """Let go of targets, slots and shards, whatever of them is still held; nothing may be using them any more."""
        self._close_targets()
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.close()
        self.shards.__exit__(None, None, None)
