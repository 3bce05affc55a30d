"""A thread of the Python engine: claims chunks, has them moved, sees to copies under way.

The order of things is that of the native engine, and so is the argument why a consumer that takes chunks in order
cannot deadlock; both are written at the head of ``_engine.c``. Any call to a device's runtime may hang, so none is made
with the lock held.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from weightlift.engines.devices import DeviceCallError
from weightlift.engines.ledger import CopyUnderWay
from weightlift.engines.moving import Outcome
from weightlift.operations import Activity, Failure, FailureKind, Sink, Stage
from weightlift.steps import StepKind

if TYPE_CHECKING:
    import threading

    from weightlift.engines.devices import DeviceWorker
    from weightlift.engines.ledger import Ledger
    from weightlift.engines.moving import Chunk, Doing, Mover


class _Unlocked:
    """Gives up a lock that is held for the length of a ``with`` block."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.release()

    def __exit__(self, *_: object) -> None:
        self._lock.acquire()


class Worker:
    """One worker of an engine; :meth:`run` is what its thread does.

    Args:
        index: its number.
        ledger: what it shares with the others.
        mover: reads for it.
        device: makes its calls to devices, if there are any.
        doing: where both say what they are at.
    """

    def __init__(self, index: int, ledger: Ledger, mover: Mover, device: DeviceWorker | None, doing: Doing) -> None:
        self.index = index
        self._ledger = ledger
        self._unlocked = _Unlocked(ledger.lock)
        self._mover = mover
        self._device = device
        self._doing = doing
        self._chunk: Chunk | None = None
        self._calling_first = False
        self._last_age = 0

    def activity(self, now: float) -> Activity | None:
        """What it is doing, if anything; called with the lock held."""
        (stage, since), chunk = self._doing.now, self._chunk
        if chunk is not None:
            return Activity(chunk.extent.shard, chunk.offset, chunk.length, now - since, stage)
        if self._calling_first:
            # These calls belong to no chunk; the next one waits for them.
            return Activity(*self._ledger.cursor, 0, now - since, stage)
        return None

    def run(self) -> None:
        """Work until the engine stops, and leave once every copy has completed."""
        ledger = self._ledger
        with ledger.lock:
            if self._device is not None:
                self._call_devices_first(self._device)
            while True:
                if ledger.can_claim(self.index):
                    self._reap()
                if ledger.can_claim(self.index):
                    self._carry_out(ledger.claim())
                elif (copy := ledger.take_copy_for(self.index, self._last_age)) is not None:
                    self._settle(copy, patient=True)
                elif ledger.stopping:
                    break
                else:
                    ledger.rest(self.index)
            self._mover.close()
            ledger.running -= 1
            ledger.news.notify_all()

    def _call_devices_first(self, device: DeviceWorker) -> None:
        self._calling_first = True
        self._doing.enter(Stage.DEVICE_COPY)
        failure: DeviceCallError | None = None
        with self._unlocked:
            try:
                device.first_calls()
            except DeviceCallError as err:
                failure = err
        self._calling_first = False
        self._ledger.called(failure)

    def _carry_out(self, chunk: Chunk) -> None:
        """Carry out a claimed chunk, and the rest of the lane that it begins."""
        following: Chunk | None = chunk
        while following is not None:
            chunk, copy = following, None
            self._chunk = chunk
            self._doing.enter(Stage.READING)
            self._ledger.begin_work()
            with self._unlocked:
                outcome = self._move(chunk)
            self._ledger.end_work()
            self._chunk = None
            if outcome.copying:
                self._ledger.under_way(chunk)
                self._last_age = self._ledger.next_age()
                copy = CopyUnderWay(self._last_age, chunk, outcome)
            else:
                self._ledger.finish(chunk, outcome)
            following = self._next_in_lane(chunk, copy)

    def _move(self, chunk: Chunk) -> Outcome:
        outcome = Outcome()
        try:
            self._move_into(chunk, outcome)
        except DeviceCallError as err:
            outcome.failure = _device_failure(chunk, err)
        except BaseException as err:  # noqa: BLE001 # a worker that dies silently would leave the caller waiting
            kind = FailureKind.MEMORY if isinstance(err, MemoryError) else FailureKind.INTERNAL
            stage, _ = self._doing.now
            outcome.failure = Failure(chunk.index, kind, errno.ENOMEM, chunk.offset, chunk.length, err, stage)
        self._note_read(chunk, outcome)
        return outcome

    def _note_read(self, chunk: Chunk, outcome: Outcome) -> None:
        steps = self._ledger.steps
        read = outcome.begun + outcome.storage_seconds + outcome.cache_seconds
        if read > outcome.begun:
            refused = outcome.refused_bytes > 0
            steps.note(StepKind.READ, self.index, chunk, start=outcome.begun, end=read, refused=refused)
        if outcome.copy_seconds:
            steps.note(StepKind.COPY, self.index, chunk, start=read, end=read + outcome.copy_seconds)

    def _move_into(self, chunk: Chunk, outcome: Outcome) -> None:
        device, to_device = self._device, chunk.extent.sink is Sink.DEVICE
        if to_device and self._ledger.device_failure is not None:
            outcome.failure = _device_failure(chunk, self._ledger.device_failure)
            return
        if device is not None and chunk.slot >= 0:
            start = time.monotonic()
            outcome.register_seconds = device.register(chunk.slot)
            if outcome.register_seconds:
                self._ledger.steps.note(StepKind.REGISTER, self.index, chunk, start=start, end=time.monotonic())
            self._doing.enter(Stage.READING)
        self._mover.move(chunk, outcome)
        if to_device and outcome.failure is None:
            assert device is not None, "an extent names a device, and the engine has none"
            start = outcome.copies_begun = time.monotonic()
            self._doing.enter(Stage.DEVICE_COPY)
            outcome.copying = device.start_copies(chunk, self._mover.address_of(chunk, outcome))
            end = time.monotonic()
            outcome.device_seconds = end - start
            self._ledger.steps.note(StepKind.DEVICE_COPY, self.index, chunk, start=start, end=end)

    def _next_in_lane(self, last: Chunk, copy: CopyUnderWay | None) -> Chunk | None:
        """The next chunk of the lane that a chunk belongs to; the copy out of the chunk's slot is listed, or landed."""
        ledger = self._ledger
        if not last.extent.lane or last.ends_extent:
            if copy is not None:
                ledger.list_copy(copy)
            return None
        ledger.wait_while_held()
        slot = self._next_slot(copy) if last.extent.sink is Sink.DEVICE else last.slot
        if not ledger.stopping:
            return ledger.follow(last, slot)
        if slot >= 0:
            ledger.release_slot(slot)
        return None

    def _next_slot(self, copy: CopyUnderWay | None) -> int:
        """A slot for the next chunk of a lane, -1 if the engine stopped.

        The lane keeps the copy out of its last slot to itself until it has the next, so it needs nobody's help: where
        no slot is free it waits for the oldest copy listed, or else for its own, and takes the slot that comes free.
        """
        ledger, slot = self._ledger, -1
        while not ledger.stopping and (slot := ledger.take_slot()) < 0:
            oldest = ledger.take_oldest_copy() or copy
            assert oldest is not None, "a lane has a slot until it has the next"
            if oldest is copy:
                copy = None
            self._settle(oldest, patient=True)
        if copy is not None:
            ledger.list_copy(copy)
        if slot >= 0:
            self._reap()
        return slot

    # ---- copies under way, with the lock held

    def _settle(self, copy: CopyUnderWay, *, patient: bool) -> bool:
        """Ask for a copy that is not on the list, or wait for it, without the lock meanwhile; it has landed if true."""
        assert self._device is not None
        chunk, outcome, landed = copy.chunk, copy.outcome, True
        self._chunk = chunk
        self._doing.enter(Stage.DEVICE_WAIT)
        with self._unlocked:
            start = time.monotonic()
            try:
                if patient:
                    self._device.wait(chunk)
                else:
                    landed = self._device.has_landed(chunk)
            except DeviceCallError as err:
                outcome.failure = _device_failure(chunk, err)
            end = time.monotonic()
            outcome.device_seconds += end - start
            if patient:
                self._ledger.steps.note(StepKind.DEVICE_WAIT, self.index, chunk, start=start, end=end)
        self._chunk = None
        if landed:
            self._ledger.steps.note(StepKind.UNDER_WAY, self.index, chunk, start=outcome.copies_begun, end=end)
            self._ledger.finish(chunk, outcome)
        return landed

    def _reap(self) -> None:
        """Tell of the oldest copies that have completed."""
        while (copy := self._ledger.take_oldest_copy()) is not None:
            if not self._settle(copy, patient=False):
                self._ledger.list_copy(copy)
                return


def _device_failure(chunk: Chunk, error: DeviceCallError) -> Failure:
    return Failure(chunk.index, FailureKind.DEVICE, error.code, chunk.offset, chunk.length, stage=error.stage)
