"""The Python engine: the reference for the contract, and what runs where no compiled library is.

Workers are Python threads; a read releases the interpreter lock while it lasts. All shared state is guarded by one
lock, so nothing here relies on the interpreter lock for correctness. Reads go through a
:class:`~weightlift.engines.reader.Reader`, which tests replace by one that injects faults.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from weightlift.engines.devices import DeviceWorker
from weightlift.engines.ledger import Ledger
from weightlift.engines.moving import Doing, Mover
from weightlift.engines.reader import Reader, SystemReader
from weightlift.engines.watching import Standing, Watchdog
from weightlift.engines.workers import Worker
from weightlift.host import kernel
from weightlift.operations import Activity, Counters, Event, Extent, ShardSource, ShardUse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.device_operations import Devices, SlotMemory
    from weightlift.steps import Steps


class PythonEngine:
    """An :class:`~weightlift.operations.Engine` made of Python threads.

    Args:
        shards: the open shards that extents refer to.
        slots: memory to stage in, alive for as long as the engine is.
        worker_room: most workers that :meth:`set_limits` may ask for; with devices, that many are started at once.
        reader: how bytes are asked for; the operating system's own calls by default.
        devices: those that extents may name; their streams and events have to outlive the engine.
    """

    name = "python"

    def __init__(
        self,
        shards: Sequence[ShardSource],
        slots: SlotMemory,
        worker_room: int,
        reader: Reader | None = None,
        devices: Devices | None = None,
    ) -> None:
        self._slots = slots
        self._ledger = Ledger(len(shards), slots)
        self._mover = Mover(tuple(shards), slots, reader or SystemReader())
        self._devices = devices if devices is not None and devices.queues else None
        self._worker_room = worker_room
        self._workers: list[Worker] = []
        self._threads: list[threading.Thread] = []
        self._watchdog: Watchdog | None = None
        self._polled = time.monotonic()
        self._polling = 0

    def submit(self, extents: Sequence[Extent]) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        with self._ledger.lock:
            self._ledger.submit(extents)

    def set_limits(self, workers: int, chunk_bytes: int) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        ledger = self._ledger
        with ledger.lock:
            ledger.chunk_bytes, ledger.limit = chunk_bytes, workers
            if not ledger.stopping:
                self._start_threads(min(workers, self._worker_room))
            ledger.wake_all()

    def _start_threads(self, wanted: int) -> None:
        if self._devices is not None:
            # All at once: a thread's first call to a device must not come in the middle of a load.
            wanted = 0 if self._threads else self._worker_room
        for index in range(len(self._threads), wanted):
            doing = Doing()
            device = DeviceWorker(self._devices, self._slots, index, doing) if self._devices is not None else None
            worker = Worker(index, self._ledger, self._mover.for_worker(), device, doing)
            thread = threading.Thread(target=worker.run, name=f"weightlift-{index}", daemon=True)
            thread.start()
            self._workers.append(worker)
            self._threads.append(thread)
            self._ledger.running += 1
            self._ledger.uncalled += device is not None

    def poll(self, timeout_seconds: float) -> list[Event]:
        """See :class:`~weightlift.operations.Engine`."""
        events = self._ledger.events
        with self._ledger.lock:
            self._polling += 1
            self._ledger.news.wait_for(lambda: events, timeout_seconds)
            self._polling -= 1
            self._polled = time.monotonic()
            taken = list(events)
            events.clear()
            return taken

    def return_slot(self, slot: int) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        with self._ledger.lock:
            self._ledger.release_slot(slot)

    def counters(self) -> Counters:
        """See :class:`~weightlift.operations.Engine`."""
        ledger = self._ledger
        with ledger.lock:
            workers = min(ledger.limit, len(self._threads))
            return Counters(
                **asdict(ledger.totals),
                populate_seconds=0.0,
                busy_seconds=ledger.busy_seconds(),
                workers=workers,
                running=ledger.running,
            )

    def shard_use(self, shard: int) -> ShardUse:
        """See :class:`~weightlift.operations.Engine`."""
        with self._ledger.lock:
            return self._ledger.shard_use(shard)

    def activity(self) -> list[Activity]:
        """See :class:`~weightlift.operations.Engine`."""
        with self._ledger.lock:
            return list(self._busy().values())

    def _busy(self) -> dict[int, Activity]:
        now = time.monotonic()
        found = {worker.index: worker.activity(now) for worker in self._workers}
        return {index: activity for index, activity in found.items() if activity is not None}

    def watch(self, seconds: float, names: Sequence[str], fd: int = 2) -> None:
        """See :class:`~weightlift.operations.Engine`. Only once.

        The watchdog is a Python thread, and silent for as long as something keeps the interpreter lock: a call that
        hangs without having released it is what this cannot see. The native engine's can.

        Args:
            seconds: how long nothing may land.
            names: what to call each shard.
            fd: where to say it; lines are left out while nobody reads them.
        """
        assert self._watchdog is None, "an engine is watched once"
        self._watchdog = Watchdog(self._standing, seconds, names, fd)

    def _standing(self) -> Standing:
        ledger = self._ledger
        with ledger.lock:
            landed = ledger.totals.landed_bytes
            silence = 0.0 if self._polling else time.monotonic() - self._polled
            return Standing(landed, ledger.submitted_bytes - landed, ledger.running, self._busy(), silence)

    def allow(self, nbytes: int) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        with self._ledger.lock:
            self._ledger.allowed_bytes = nbytes
            self._ledger.wake_all()

    def trim(self) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        with self._ledger.lock:
            for slot in self._ledger.trimmable_slots():
                kernel.forget_memory(self._slots.address + slot * self._slots.slot_bytes, self._slots.slot_bytes)

    def trace(self, capacity: int) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        self._ledger.steps.begin(capacity)

    def steps(self) -> Steps:
        """See :class:`~weightlift.operations.Engine`."""
        return self._ledger.steps

    def cancel(self) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        with self._ledger.lock:
            self._ledger.stop()

    def join(self, timeout_seconds: float) -> int:
        """See :class:`~weightlift.operations.Engine`."""
        ledger = self._ledger
        with ledger.lock:
            ledger.news.wait_for(lambda: ledger.running == 0, timeout_seconds)
            running = ledger.running
        if running:
            return running
        for thread in self._threads:
            thread.join()
        if self._watchdog is not None:
            self._watchdog.end()
        return 0

    def close(self) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        self._ledger.forget()
