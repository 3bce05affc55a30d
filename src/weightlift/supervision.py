"""What has to happen now and then while bytes move: tuning, sampling, care for the machine, progress.

Joins the pure parts (tuner, care) and the monitor with a running engine. Called from the load's own thread; knows
neither plans nor targets.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from weightlift.care import Care, MemoryView, allowance
from weightlift.engines.tuner import Setting, Tuner
from weightlift.errors import DeviceError, InsufficientMemoryError
from weightlift.monitor import Monitor, MonitorResult, Progress
from weightlift.operations import UNBOUNDED
from weightlift.samples import Intervention
from weightlift.units import KIB, PAGE_BYTES, align_down

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.care import Decision
    from weightlift.operations import Engine
    from weightlift.options import LoadOptions
    from weightlift.staging import Pool

SAMPLE_SECONDS: Final = 0.05
"""How often memory is looked at, where it is not short."""

_SAMPLE_SECONDS_NEAR: Final = 0.01
_FIRST_SECONDS: Final = 0.005
"""When memory is looked at first, which was looked at just before too: many loads have ended by then."""

_DEVICE_SECONDS: Final = 0.25
_PROGRESS_SECONDS: Final = 0.1
_CHUNK_BYTES_MIN: Final = 256 * KIB
_INTERVENTIONS_MAX: Final = 100


class Supervisor:
    """Looks after one load.

    Args:
        options: the caller's options.
        started: when the load began, by the monotonic clock.
        drop_cache: drops what the load has brought into the page cache so far, and has it bring in no more.
        device_used: memory in use on all devices of the load; ``None`` where it has none.

    Attributes:
        monitor: what memory looked like.
        interventions: what was done because memory got short.
        floor_bytes: the memory that is to be left; ``None`` where nobody knows how much there is.
        pinned: bytes registered with a device's runtime now.
    """

    def __init__(
        self,
        options: LoadOptions,
        started: float,
        drop_cache: Callable[[], None],
        device_used: Callable[[], int] | None = None,
    ) -> None:
        self.monitor = Monitor()
        self.interventions: list[Intervention] = []
        self.pinned: Callable[[], int] = int
        self._options = options
        self._started = started
        self._drop_cache = drop_cache
        self._device_used = device_used
        self._device_start = self._ask_device()
        self._device_bytes = None if self._device_start is None else 0
        self._engine: Engine | None = None
        self._sample_seconds = SAMPLE_SECONDS if options.recording is None else options.recording.sample_seconds
        self._samples_due = self._progress_due = self._device_due = 0.0
        total = self.monitor.latest.total_bytes
        self._care = None if total is None else Care(total)
        self.floor_bytes = None if self._care is None else self._care.floor_bytes

    def begin(self, engine: Engine, pool: Pool, total_bytes: int) -> None:
        """Let an engine go that was given nothing to do yet."""
        self._total_bytes, self._pool = total_bytes, pool
        self._tuner = self._new_tuner()
        self._engine = engine
        self._engine_started = time.monotonic()
        seen = self.monitor.latest
        if seen.available_bytes is not None and self._care is not None and not self._care.is_near(seen.available_bytes):
            self._samples_due = self._engine_started + min(_FIRST_SECONDS, self._sample_seconds)
        if seen.last_resort_bytes is not None:
            # Where nothing ends in host memory, the first look will lift the bound.
            engine.allow(allowance(seen.last_resort_bytes, seen.swap_free_bytes))
        if total_bytes:
            # Where all tensors are views of mapped files there is no work, and no threads need be started for it.
            self._limit(1.0)

    def _new_tuner(self, *, fixed: bool = False) -> Tuner:
        pool = self._pool
        return Tuner(
            Setting(pool.workers, pool.chunk_bytes),
            workers_max=pool.worker_room,
            chunk_bytes_max=pool.chunk_bytes_max,
            fixed_workers=fixed or self._options.workers is not None,
            fixed_chunk=fixed or self._options.chunk_bytes is not None,
            total_bytes=self._total_bytes,
        )

    def tune_anew(self) -> None:
        """Forget what was found about concurrency: what was read so far was no sample of what follows."""
        self._tuner = self._new_tuner()
        if self._care is None or self._care.share == 1.0:
            self._limit(1.0)

    def leave_concurrency(self) -> None:
        """Look for no better concurrency: what is read in parts, with pauses in between, tells nothing about it."""
        self._tuner = self._new_tuner(fixed=True)

    @property
    def chunk_bytes(self) -> int:
        """The chunk size found best."""
        return self._tuner.setting.chunk_bytes

    def tick(self, submitted_bytes: int, host_bytes: int | None) -> None:
        """Do what is due.

        Args:
            submitted_bytes: what the engine has been given so far.
            host_bytes: how much of it ends in tensors in host memory; ``None`` for all.

        Raises:
            InsufficientMemoryError: memory is so short that the load has to end.
        """
        engine = self._engine
        assert engine is not None
        now = time.monotonic()
        if self._care is None or self._care.share == 1.0:
            change = self._tuner.observe(now - self._engine_started, engine.counters().landed_bytes)
            if change is not None:
                engine.set_limits(*change)
        if now >= self._samples_due:
            self._look(now, submitted_bytes, host_bytes)
        if self._options.progress is not None and now >= self._progress_due:
            self._progress_due = now + _PROGRESS_SECONDS
            self._options.progress(engine.counters().landed_bytes, self._total_bytes)

    def sample(self, host_bytes: int | None) -> None:
        """Look at memory once more, devices and pressure too, whether that is due or not."""
        self._device_due = 0.0
        self.monitor.sample(lambda: self._progress(time.monotonic(), host_bytes), fresh=True)

    def finish(self) -> MonitorResult:
        """What was seen; tensors may have been made of the memory meanwhile, so it is not looked at once more."""
        if self._options.progress is not None:
            self._options.progress(self._total_bytes, self._total_bytes)
        return self.monitor.finish()

    def _look(self, now: float, submitted_bytes: int, host_bytes: int | None) -> None:
        engine = self._engine
        assert engine is not None
        sample, seen = self.monitor.sample(lambda: self._progress(now, host_bytes)), self.monitor.latest
        self._samples_due = now + self._sample_seconds
        if self._care is None or sample.available_bytes is None or seen.last_resort_bytes is None:
            engine.allow(UNBOUNDED)
            return
        remaining = max(0, submitted_bytes - sample.tensor_bytes)
        if host_bytes is not None:
            remaining = min(remaining, host_bytes - sample.tensor_bytes)
        view = MemoryView(
            sample.seconds, sample.available_bytes, seen.last_resort_bytes, seen.swap_free_bytes, remaining
        )
        bound = engine.counters().claimed_bytes + allowance(seen.last_resort_bytes, seen.swap_free_bytes)
        engine.allow(UNBOUNDED if host_bytes == 0 else bound)
        share = self._care.share
        decision = self._care.decide(view)
        if self._care.is_near(sample.available_bytes):
            self._samples_due = now + _SAMPLE_SECONDS_NEAR
        self._act(decision, share, sample.seconds)

    def _progress(self, now: float, host_bytes: int | None) -> Progress:
        engine = self._engine
        assert engine is not None
        counters = engine.counters()
        claimed = counters.claimed_bytes
        if now >= self._device_due:
            self._device_due = now + _DEVICE_SECONDS
            used = self._ask_device()
            self._device_bytes = None if used is None else used - (self._device_start or 0)
        return Progress(
            seconds=now - self._started,
            read_bytes=counters.read_bytes,
            landed_bytes=counters.landed_bytes,
            tensor_bytes=claimed if host_bytes is None else min(claimed, host_bytes),
            pinned_bytes=self.pinned(),
            device_bytes=self._device_bytes,
            workers=counters.workers,
            chunk_bytes=self._tuner.setting.chunk_bytes,
        )

    def _ask_device(self) -> int | None:
        try:
            return None if self._device_used is None else self._device_used()
        except DeviceError:
            # A device that does not tell is no reason to end a load that works.
            return None

    def _act(self, decision: Decision, before: float, seconds: float) -> None:
        if decision.give_up:
            raise InsufficientMemoryError(
                f"memory ran out, so the load was ended before the system would have killed it: {decision.reason}",
                hint='end other programs, load part of the tensors (names=…), use method="direct" or cache="drop", '
                "or add swap",
            )
        if decision.drop_cache:
            self._drop_cache()
        if decision.share != before:
            self._limit(decision.share)
        if decision.drop_cache and self._engine is not None:
            self._engine.trim()
        if decision.reason and len(self.interventions) < _INTERVENTIONS_MAX:
            self.interventions.append(Intervention(seconds, self._words(decision, before), decision.reason))

    def _words(self, decision: Decision, before: float) -> str:
        parts = ["dropped the page cache of what was read"] if decision.drop_cache else []
        if decision.share != before:
            workers, chunk = limited(self._tuner.setting, decision.share)
            parts.append(f"{workers} workers × {chunk // KIB} KiB" if workers else "stopped reading for a moment")
        return " and ".join(parts)

    def _limit(self, share: float) -> None:
        assert self._engine is not None
        self._engine.set_limits(*limited(self._tuner.setting, share))


def limited(setting: Setting, share: float) -> Setting:
    """A part of a concurrency: fewer workers first, then smaller chunks; no worker at all for 0."""
    if share >= 1.0:
        return setting
    workers = setting.workers * share
    if workers >= 1 or share == 0:
        return Setting(int(workers), setting.chunk_bytes)
    chunk = align_down(int(setting.chunk_bytes * workers), PAGE_BYTES)
    return Setting(1, min(setting.chunk_bytes, max(chunk, _CHUNK_BYTES_MIN)))
