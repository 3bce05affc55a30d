"""The one place where plan, engine, buffers, targets and monitor meet: carries out one load from start to report.

A :class:`Transfer` owns everything a load has open. Whatever ends it (success, a failed read, Ctrl-C), the engine has
stopped before memory is released; a read that never returns keeps its buffers and descriptors alive and is named.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

from weightlift.buffers import SlotPool
from weightlift.device_staging import StagingLoan, borrow_staging
from weightlift.engines.choice import make_engine
from weightlift.engines.native import count_cached
from weightlift.engines.tuner import Setting, Tuner
from weightlift.failures import raise_failure
from weightlift.host.memory import available_processors, headroom
from weightlift.monitor import Monitor
from weightlift.operations import ChunkReady, Engine, Event, Extent, ExtentDone, Failure, Stage
from weightlift.plan import batches, decide_cache, plan_extents
from weightlift.shards import OpenShards
from weightlift.staging import plan_device_pool, plan_pool
from weightlift.trial import find_trial, judge_trial
from weightlift.types import Method, Staging
from weightlift.units import MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightlift.description import Description
    from weightlift.engines.reader import Reader
    from weightlift.monitor import MonitorResult
    from weightlift.operations import Counters
    from weightlift.options import LoadOptions
    from weightlift.plan import CacheDecision, Wanted
    from weightlift.staging import Pool
    from weightlift.targets.base import Target
    from weightlift.targets.device import DeviceAccess
    from weightlift.trial import Trial

_TICK_SECONDS: Final = 0.01
_SAMPLE_SECONDS: Final = 0.05
_PROGRESS_SECONDS: Final = 0.1
_STUCK_SECONDS: Final = 2.0
_WATCH_SECONDS: Final = 30.0
_MAKING_SECONDS: Final = 0.002
_FIRST_BATCH_BYTES: Final = 64 * MIB

_STAGES: Final = {
    Stage.READING: "reading",
    Stage.REGISTERING: "pinning memory for",
    Stage.DEVICE_COPY: "starting a copy to the device from",
    Stage.DEVICE_WAIT: "waiting for the device with",
}

_abandoned: list[object] = []
"""What reads that never returned may still write to; kept for the life of the process."""


class Transfer:
    """One load: opens shards, plans, runs an engine, and tells what happened.

    Args:
        description: the checkpoint.
        shards_used: indexes of the shards to read.
        options: the caller's options.
        destination_bytes: host memory that the tensors will take, for the decision about the page cache.
        look_at_cache: find out what the page cache holds; needless where nothing will be read.
        accesses: the GPUs that targets copy to, by the index that extents name them with.
        reader: how the Python engine asks for bytes; for fault injection.
    """

    def __init__(
        self,
        description: Description,
        shards_used: Sequence[int],
        options: LoadOptions,
        *,
        destination_bytes: int,
        look_at_cache: bool = True,
        accesses: Sequence[DeviceAccess] = (),
        reader: Reader | None = None,
    ) -> None:
        self.started = time.monotonic()
        self.phases: dict[str, float] = {}
        self._description = description
        self._used = shards_used
        self._options = options
        self._reader = reader
        self._engine: Engine | None = None
        self._accesses = accesses
        self._slots: SlotPool | StagingLoan | None = None
        self.pinned_bytes = self.refused_bytes = 0
        self._targets: list[Target] = []
        self._made: list[tuple[str, Any]] = []
        self._making: Iterator[tuple[str, Any]] = iter(())
        self._extents: list[Extent] = []
        self._total_bytes = self._outstanding = 0
        self._samples_due = self._progress_due = 0.0
        self.monitor = Monitor()
        self.shards = OpenShards(
            description,
            shards_used,
            want_direct=options.method in {Method.AUTO, Method.DIRECT},
            want_mapping=options.method is Method.MMAP,
            look_at_cache=look_at_cache,
            count_cached=count_cached,
        )
        available = headroom()
        self.cache: CacheDecision = decide_cache(
            options.cache,
            options.method,
            [self.shards.facts[index] for index in shards_used],
            destination_bytes=destination_bytes,
            available_bytes=available.available_bytes if available else None,
        )
        if not self.cache.keep:
            self.shards.probe_uncached()
        self._lap("open", self.started)

    def _lap(self, phase: str, since: float) -> float:
        now = time.monotonic()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - since
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
            if target.makes_ahead:
                self._making = target.finish()
            self._pump(target)
            self._lap("read", begin)

    def tensors(self, target: Target) -> list[tuple[str, Any]]:
        """The tensors of a target whose bytes have all landed, by name and in file order."""
        made, self._made = self._made, []
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
        trial = find_trial(wanted, self.shards.facts) if self.cache.on_trial else None
        extents = self._plan(wanted, target, keep=self.cache.keep and trial is None)
        self._total_bytes = sum(extent.length for extent in extents)
        self.pool = self._plan_pool(extents, open_ended=False)
        self._begin()
        if trial is not None:
            self._try(trial, target)
            extents = self._plan(trial.rest, target, keep=self.cache.keep)
        for batch in batches(extents, _FIRST_BATCH_BYTES if self._accesses else self._total_bytes):
            self._add(target.bind(batch))
        if trial is not None and self.cache.keep:
            self.shards.fetch(trial.direct.shard, trial.direct.offset, trial.direct.length)

    def _plan(self, wanted: Sequence[Wanted], target: Target, *, keep: bool) -> list[Extent]:
        facts, method = self.shards.facts, self._options.method
        return plan_extents(wanted, facts, method, keep=keep, in_order=target.in_order)

    def _try(self, trial: Trial, target: Target) -> None:
        """Read one part each way, and decide by what the workers spent on them."""
        spent = []
        for part, keep in ((trial.direct, False), (trial.kept, True)):
            before = self._busy_seconds()
            self._add(target.bind(self._plan([part], target, keep=keep)))
            self._serve(target)
            spent.append(self._busy_seconds() - before)
        self.cache = judge_trial(*spent)
        if not self.cache.keep:
            self.shards.probe_uncached()

    def _busy_seconds(self) -> float:
        assert self._engine is not None
        counters = self._engine.counters()
        reading = counters.storage_seconds + counters.cache_seconds + counters.populate_seconds
        return reading + counters.copy_seconds + counters.device_seconds

    def _add(self, extents: Sequence[Extent]) -> None:
        assert self._engine is not None
        self._engine.submit(extents)
        self._extents.extend(extents)
        self._outstanding += len(extents)

    def _plan_pool(self, extents: Sequence[Extent], *, open_ended: bool) -> Pool:
        options = self._options
        if self._accesses:
            stored = sum(extent.length for extent in extents if not extent.resident)
            if open_ended:
                stored = max(0, self._total_bytes - (self.shards.cached_before() or 0))
            return plan_device_pool(
                extents,
                budget_bytes=options.staging_memory,
                processors=available_processors(),
                workers=options.workers,
                chunk_bytes=options.chunk_bytes,
                total_bytes=self._total_bytes,
                stored_bytes=stored,
                pinned=options.staging is not Staging.PAGEABLE,
            )
        return plan_pool(
            extents,
            budget_bytes=options.staging_memory,
            processors=available_processors(),
            workers=options.workers,
            chunk_bytes=options.chunk_bytes,
            open_ended=open_ended,
        )

    # ---- for streams, which submit one target after the other

    def begin_stream(self, total_bytes: int) -> None:
        """Start an engine with nothing to do yet; targets follow by :meth:`submit`."""
        self._total_bytes = total_bytes
        self.pool = self._plan_pool((), open_ended=True)
        self._begin()

    def submit(self, target: Target) -> Sequence[Extent]:
        """Have the engine read what one more target wants; returns its extents."""
        self._targets.append(target)
        extents = target.bind(self._plan(target.prepare(), target, keep=self.cache.keep))
        self._add(extents)
        return extents

    def drop(self, target: Target) -> None:
        """Forget a target whose extents have all landed."""
        target.close()
        self._targets.remove(target)

    def events(self, *, wait: bool = True) -> list[Event]:
        """What the engine has to tell, waiting a moment for it or not; a failure is raised as its typed error."""
        assert self._engine is not None
        events = self._engine.poll(_TICK_SECONDS if wait else 0.0)
        for event in events:
            if isinstance(event, Failure):
                self._fail(event)
        return events

    def landed_bytes(self) -> int:
        """Bytes that have landed so far."""
        assert self._engine is not None
        return self._engine.counters().landed_bytes

    def release_slot(self, slot: int) -> None:
        """Give back the slot of a chunk that was handed over."""
        assert self._engine is not None
        self._engine.return_slot(slot)

    def tag(self, extent: int) -> int:
        """Which of its target's ranges an extent belongs to."""
        return self._extents[extent].tag

    # ---- the engine at work

    def _begin(self) -> None:
        pool = self.pool
        slots = self._slots = self._make_slots(pool)
        devices = slots.devices if isinstance(slots, StagingLoan) else None
        self._engine = make_engine(
            self._options.engine,
            self.shards.sources,
            slots.memory,
            pool.worker_room,
            reader=self._reader,
            devices=devices,
        )
        if devices is not None:
            self._engine.watch(_WATCH_SECONDS, [str(shard.path) for shard in self._description.shards])
        self._tuner = Tuner(
            Setting(pool.workers, pool.chunk_bytes),
            workers_max=pool.worker_room,
            chunk_bytes_max=pool.chunk_bytes_max,
            fixed_workers=self._options.workers is not None,
            fixed_chunk=self._options.chunk_bytes is not None,
            total_bytes=self._total_bytes,
        )
        self._engine.set_limits(pool.workers, pool.chunk_bytes)
        self._engine_started = time.monotonic()

    def _make_slots(self, pool: Pool) -> SlotPool | StagingLoan:
        if not self._accesses:
            return SlotPool(pool.slot_count, pool.slot_bytes)
        return borrow_staging(
            self._accesses[0].runtime,
            [access.ordinal for access in self._accesses],
            pool.slot_bytes,
            pool.slot_count,
            pinned=self._options.staging is not Staging.PAGEABLE,
            most_bytes=self._options.staging_memory,
        )

    def _pump(self, target: Target) -> None:
        """Have every extent land, and look at memory once more."""
        self._serve(target)
        self._sample(in_host_memory=target.host_bytes > 0)

    def _serve(self, target: Target) -> None:
        engine = self._engine
        assert engine is not None
        while self._outstanding:
            for event in self.events(wait=not self._make_some()):
                if isinstance(event, ExtentDone):
                    self._outstanding -= 1
                elif isinstance(event, ChunkReady):
                    target.receive(event, self.tag(event.extent), engine.return_slot)
            self.tick(in_host_memory=target.host_bytes > 0)

    def _make_some(self) -> bool:
        """Make tensors for a moment while bytes move; false once there are no more to be made."""
        until = time.monotonic() + _MAKING_SECONDS
        for item in self._making:
            self._made.append(item)
            if time.monotonic() > until:
                return True
        return False

    def _fail(self, failure: Failure) -> None:
        extent = self._extents[failure.extent]
        raise_failure(failure, extent, self._description, self.shards, self._accesses)

    def tick(self, *, in_host_memory: bool) -> None:
        """What has to happen now and then while bytes move: tuning, sampling, progress."""
        engine = self._engine
        assert engine is not None
        now = time.monotonic()
        counters = engine.counters()
        change = self._tuner.observe(now - self._engine_started, counters.landed_bytes)
        if change is not None:
            engine.set_limits(*change)
        if now >= self._samples_due:
            self._samples_due = now + _SAMPLE_SECONDS
            self._sample(in_host_memory=in_host_memory)
        if self._options.progress is not None and now >= self._progress_due:
            self._progress_due = now + _PROGRESS_SECONDS
            self._options.progress(counters.landed_bytes, self._total_bytes)

    def _sample(self, *, in_host_memory: bool) -> None:
        assert self._engine is not None
        self.monitor.sample(self._engine.counters().claimed_bytes if in_host_memory else 0)

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
            if self._options.progress is not None:
                self._options.progress(self._total_bytes, self._total_bytes)
        self.uses = {index: engine.shard_use(index) for index in self._used}
        self.engine_name, self.chunk_bytes = engine.name, self._tuner.setting.chunk_bytes
        counters = engine.counters()
        engine.cancel()
        engine.join(_STUCK_SECONDS)
        engine.close()
        if not self.cache.keep and any(use.buffered_bytes or use.mapped_bytes for use in self.uses.values()):
            self.shards.sweep()
        cached = self.shards.cached_now()
        assert self._slots is not None
        for target in self._targets:
            target.close()
        if isinstance(self._slots, StagingLoan):
            self.pinned_bytes, self.refused_bytes = self._slots.pinned_bytes, self._slots.refused_bytes
        self._slots.close()
        self.shards.__exit__(None, None, None)
        observed = self.monitor.finish()
        self._lap("finish", begin)
        return counters, observed, cached

    def abort(self, cause: BaseException) -> None:
        """Stop everything and release it; what a read still under way may touch is kept alive instead."""
        engine, self._engine = self._engine, None
        stuck = 0
        if engine is not None:
            engine.cancel()
            stuck = engine.join(_STUCK_SECONDS)
        if not (stuck and self._accesses):
            # Targets use slots until they are closed, and copies that hang on a device may still write to its tensors.
            self._made, self._making = [], iter(())
            for target in self._targets:
                target.close()
        if engine is not None:
            if stuck:
                self._abandon(engine, stuck, cause)
                return
            engine.close()
        if self._slots is not None:
            self._slots.close()
        if not self.cache.keep:
            self.shards.sweep()
        self.shards.__exit__(None, None, None)
        self._targets.clear()

    def _abandon(self, engine: Engine, stuck: int, cause: BaseException) -> None:
        named = "; ".join(
            f"{_STAGES[doing.stage]} {self._description.shards[doing.shard].path} at byte {doing.offset:,} "
            f"({format_bytes(doing.length)}, for {doing.seconds:.1f} s)"
            for doing in engine.activity()
        )
        cause.add_note(f"{stuck} workers have not returned and keep their buffers: {named}")
        _abandoned.append((engine, self._slots, self._targets, self.shards.detach()))
