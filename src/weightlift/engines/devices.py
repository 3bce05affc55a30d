"""The Python engine's calls to devices, one worker's at a time and never with the engine's lock held.

Copies out of a slot are queued on the worker's stream, and the slot's event is recorded behind them; once that has
happened the chunk has landed.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Final

from weightlift.device_operations import SlotState
from weightlift.engines.moving import runs_of
from weightlift.operations import Stage

if TYPE_CHECKING:
    from weightlift.device_operations import Devices, SlotMemory
    from weightlift.engines.moving import Chunk, Doing

_PAUSE_SECONDS_MIN: Final = 20e-6
_PAUSE_SECONDS_MAX: Final = 160e-6


class DeviceCallError(Exception):
    """A call to a device's runtime failed; internal to the engine.

    Args:
        code: the runtime's own code.
        stage: what the worker was at.
    """

    def __init__(self, code: int, stage: Stage) -> None:
        super().__init__(code, stage)
        self.code = code
        self.stage = stage


class DeviceWorker:
    """One worker's calls to devices.

    Args:
        devices: the devices.
        slots: the staging memory.
        index: the worker's number.
        doing: where it says what it is at.
    """

    def __init__(self, devices: Devices, slots: SlotMemory, index: int, doing: Doing) -> None:
        self._runtime = devices.runtime
        self._queues = devices.queues
        self._slots = slots
        self._index = index
        self._doing = doing
        self._current: int | None = None
        self._waited: dict[int, tuple[int, int]] = {}

    def first_calls(self) -> None:
        """Call every device: ROCm may hang when a thread's first call comes in the middle of a load.

        Raises:
            DeviceCallError: a call failed.
        """
        for device, queue in enumerate(self._queues):
            self._enter(device)
            if queue.events:
                code = self._runtime.query(queue.events[0])
                if code not in {0, self._runtime.not_ready}:
                    raise DeviceCallError(code, Stage.DEVICE_WAIT)

    def _enter(self, device: int) -> None:
        if self._current != device:
            self._current = None
            self._check(self._runtime.set_device(self._queues[device].ordinal))
            self._current = device

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise DeviceCallError(code, Stage.DEVICE_COPY)

    def register(self, slot: int) -> float:
        """Register a slot that is to be and was not yet; returns the seconds it took. A refusal is noted."""
        states = self._slots.states
        if states is None or states[slot] != SlotState.UNTRIED:
            return 0.0
        start = time.monotonic()
        self._doing.enter(Stage.REGISTERING)
        address = self._slots.address + slot * self._slots.slot_bytes
        # Touched ahead, memory comes in large pages, which are pinned faster.
        ctypes.memset(address, 0, self._slots.slot_bytes)
        refused = self._runtime.register(address, self._slots.slot_bytes)
        states[slot] = SlotState.REFUSED if refused else SlotState.REGISTERED
        return time.monotonic() - start

    def start_copies(self, chunk: Chunk, address: int) -> bool:
        """Queue the copies of a chunk that lies at ``address``, and record its event; false if there was none to queue.

        Raises:
            DeviceCallError: a call failed; what had been queued before has completed, unless not even an event can be
                recorded any more.
        """
        runtime, extent = self._runtime, chunk.extent
        queue = self._queues[extent.device]
        stream, event = queue.streams[self._index % len(queue.streams)], queue.events[chunk.slot]
        self._enter(extent.device)
        wanted = (extent.ready, chunk.submissions)
        if extent.ready and self._waited.get(extent.device) != wanted:
            # The number of an event may come back with another meaning in a later submission.
            self._check(runtime.stream_wait(stream, extent.ready))
            self._waited[extent.device] = wanted
        queued = False
        for begin, destination, nbytes in runs_of(chunk):
            code = runtime.copy_to_device(destination, address + begin - chunk.offset, nbytes, stream)
            if code:
                if queued:
                    self._settle_queued(event, stream)
                raise DeviceCallError(code, Stage.DEVICE_COPY)
            queued = True
        if queued:
            code = runtime.record(event, stream)
            if code:
                self._settle_queued(event, stream)
                raise DeviceCallError(code, Stage.DEVICE_COPY)
        return queued

    def _settle_queued(self, event: int, stream: int) -> None:
        """After a failure: wait for the copies that were queued; only an event can tell when they are done."""
        if self._runtime.record(event, stream) == 0:
            self._settle(event)

    def _settle(self, event: int) -> int:
        """Wait until the copies before an event have completed, even if the runtime refuses to tell; returns that code.

        Asked for with pauses, since events that wake somebody cost the link time (see ``GpuRuntime.create_event``).
        """
        runtime, pause = self._runtime, _PAUSE_SECONDS_MIN
        while (code := runtime.query(event)) == runtime.not_ready:
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_SECONDS_MAX)
        if code and runtime.wait(event):
            while runtime.query(event) == runtime.not_ready:
                time.sleep(pause)
        return code

    def has_landed(self, chunk: Chunk) -> bool:
        """Whether the copies of a chunk have completed.

        Raises:
            DeviceCallError: the runtime would not tell; they have all the same.
        """
        event = self._queues[chunk.extent.device].events[chunk.slot]
        code = self._runtime.query(event)
        if code == self._runtime.not_ready:
            return False
        if code:
            self._settle(event)
            raise DeviceCallError(code, Stage.DEVICE_WAIT)
        return True

    def wait(self, chunk: Chunk) -> None:
        """Wait for the copies of a chunk.

        Raises:
            DeviceCallError: the runtime would not tell; they have completed all the same.
        """
        code = self._settle(self._queues[chunk.extent.device].events[chunk.slot])
        if code:
            raise DeviceCallError(code, Stage.DEVICE_WAIT)
