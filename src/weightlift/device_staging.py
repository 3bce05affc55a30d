"""Staging for devices: slots, streams and events, kept by the process from one load to the next.

Slots are anonymous memory in large pages; each is populated and registered (pinned) by the worker that first uses it,
so that the first bytes travel while the last slots are still being pinned, and stays registered for later loads. One
stream a device carries all copies: measured, more streams make small chunks slower, since the device then pays for
changing between them, and large ones no faster.
"""

from __future__ import annotations

import os
import threading
import weakref
from array import array
from typing import TYPE_CHECKING, Final, Protocol

from weightlift.buffers import SlotPool
from weightlift.device_operations import DeviceQueues, Devices, SlotMemory, SlotState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.host.gpu import GpuRuntime

_STREAMS: Final = 1

_lock = threading.Lock()
_kept: list[DeviceStaging] = []
"""At most one pool that no load is using."""


class Holder(Protocol):
    """Holds a pool between loads of its own."""

    def give_back(self) -> None:
        """Let go of the pool, unless it is in use."""
        ...


_holders: dict[int, weakref.ref[Holder]] = {}
"""By their ids. No set of weak references, which cannot be gone through while another thread adds to it."""


def hold(holder: Holder) -> None:
    """Have a holder asked for its pool when somebody else needs one, as long as it lives."""
    number = id(holder)
    _holders[number] = weakref.ref(holder, lambda _: _holders.pop(number, None))


def _pop_kept() -> DeviceStaging | None:
    with _lock:
        return _kept.pop() if _kept else None


def _take_kept() -> DeviceStaging | None:
    """The pool that is kept, or one that is given back now."""
    kept = _pop_kept()
    for found in list(_holders.values()):
        if kept is not None:
            break
        holder = found()
        if holder is not None:
            holder.give_back()
            kept = _pop_kept()
    return kept


class DeviceStaging:
    """Slots that one load at a time copies to devices from.

    Args:
        runtime: the devices' runtime.
        slot_bytes: bytes of each slot.
        count: how many.
        pinned: have them registered; otherwise they stay ordinary memory.
    """

    def __init__(self, runtime: GpuRuntime, slot_bytes: int, count: int, *, pinned: bool) -> None:
        self._runtime = runtime
        self._process = os.getpid()
        self._slots = SlotPool(count, slot_bytes)
        self._states = array("B", bytes(count)) if pinned else None
        self._streams: dict[int, tuple[int, ...]] = {}
        self._events: dict[int, tuple[int, ...]] = {}
        self.count = count
        self.slot_bytes = slot_bytes

    def serves(self, runtime: GpuRuntime, slot_bytes: int, count: int, most_bytes: int) -> bool:
        """Whether a load of this shape can use it: this process made it, it is pinned, and not beyond the budget."""
        return (
            self._process == os.getpid()
            and self._states is not None
            and self._runtime is runtime
            and self.slot_bytes >= slot_bytes
            and self.count >= count
            and self.slot_bytes * self.count <= most_bytes
        )

    def memory(self, count: int) -> SlotMemory:
        """The first ``count`` slots, for an engine."""
        return SlotMemory(self._slots.memory.address, self.slot_bytes, count, self._states)

    def devices(self, ordinals: Sequence[int]) -> Devices:
        """Streams and events for some devices; those not used before are made."""
        runtime = self._runtime
        for ordinal in ordinals:
            if ordinal not in self._events:
                self._streams[ordinal] = tuple(runtime.create_stream(ordinal) for _ in range(_STREAMS))
                self._events[ordinal] = tuple(runtime.create_event(ordinal) for _ in range(self.count))
        queues = (DeviceQueues(ordinal, self._streams[ordinal], self._events[ordinal]) for ordinal in ordinals)
        return Devices(runtime, tuple(queues))

    @property
    def pinned_bytes(self) -> int:
        """Bytes registered now."""
        return self._count(SlotState.REGISTERED) * self.slot_bytes

    @property
    def refused_bytes(self) -> int:
        """Bytes whose registration the runtime refused."""
        return self._count(SlotState.REFUSED) * self.slot_bytes

    def _count(self, state: SlotState) -> int:
        return 0 if self._states is None else self._states.count(state)

    def destroy(self) -> None:
        """Unpin and free everything; nothing may be using it any more."""
        if self._process != os.getpid():
            # A forked child has only the parent's numbers, neither its registrations nor the runtime's objects.
            return
        for number, state in enumerate(self._states or ()):
            if state == SlotState.REGISTERED:
                self._runtime.unregister(self._slots.memory.address + number * self.slot_bytes)
        for ordinal, events in self._events.items():
            for event in events:
                self._runtime.destroy_event(event)
            for stream in self._streams[ordinal]:
                self._runtime.destroy_stream(stream)
        self._states, self._events, self._streams = None, {}, {}
        self._slots.close()


class StagingLoan:
    """Staging lent to one load; the engine's slots, queues and what was pinned.

    Args:
        staging: the slots.
        ordinals: the devices they are copied to.
        count: how many of the slots the load uses.

    Attributes:
        memory: the slots, for the engine.
        devices: runtime, streams and events, for the engine.
    """

    def __init__(self, staging: DeviceStaging, ordinals: Sequence[int], count: int) -> None:
        self._staging = staging
        self.memory = staging.memory(count)
        self.devices = staging.devices(ordinals)

    @property
    def pinned_bytes(self) -> int:
        """Bytes registered now, those of earlier loads included."""
        return self._staging.pinned_bytes

    @property
    def refused_bytes(self) -> int:
        """Bytes whose registration the runtime refused."""
        return self._staging.refused_bytes

    def close(self) -> None:
        """Keep the staging for the next load, or free it; no engine may be using it any more."""
        with _lock:
            keep = not _kept and self._staging.pinned_bytes > 0
            if keep:
                _kept.append(self._staging)
        if not keep:
            self._staging.destroy()


def borrow_staging(
    runtime: GpuRuntime, ordinals: Sequence[int], slot_bytes: int, count: int, *, pinned: bool, most_bytes: int
) -> StagingLoan:
    """Staging for one load: what an earlier one left if it fits, else new.

    Args:
        runtime: the devices' runtime.
        ordinals: the devices' numbers.
        slot_bytes: bytes of each slot.
        count: how many slots are needed.
        pinned: have them registered.
        most_bytes: the budget, which what an earlier load left must not exceed either.
    """
    kept = _take_kept()
    if kept is not None and not (pinned and kept.serves(runtime, slot_bytes, count, most_bytes)):
        # Two pools at once would be more pinned memory than the budget says.
        kept.destroy()
        kept = None
    staging = kept or DeviceStaging(runtime, slot_bytes, count, pinned=pinned)
    return StagingLoan(staging, ordinals, count)


def release_pinned_memory() -> int:
    """Unpin and free the staging memory that is kept between loads.

    Returns:
        How many bytes were pinned; 0 if nothing was kept, or a load is using it.
    """
    kept = _take_kept()
    if kept is None:
        return 0
    nbytes = kept.pinned_bytes
    kept.destroy()
    return nbytes
