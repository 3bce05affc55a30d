"""What engines are handed to stage in and to reach devices with: slot memory, the calls of a GPU runtime, queues.

Values and protocols only, beside :mod:`weightlift.operations`. Handles and addresses are plain integers, so that both
engines take the same.
"""

from __future__ import annotations

import enum
from array import array
from typing import Protocol

from msgspec import Struct


class SlotState(enum.IntEnum):
    """Whether a slot is registered with (pinned for) a device's runtime. The numbers are those of the native engine."""

    UNTRIED = 0
    REGISTERED = 1
    REFUSED = 2


class SlotMemory(Struct, frozen=True):
    """The fixed pool an engine stages in: ``count`` slots of ``slot_bytes`` each, from ``address`` on.

    Attributes:
        address: first byte, on a page boundary.
        slot_bytes: bytes of each slot, a multiple of the page size.
        count: how many.
        states: one :class:`SlotState` per slot (type code ``B``) where slots are to be registered with the runtime of
            the devices: a worker populates and registers an untried slot before its first use and notes the result
            here; a refused one is used as it is. The array outlives the engine, so that the next one finds its slots
            registered. ``None`` where nothing is registered.
    """

    address: int
    slot_bytes: int
    count: int
    states: array[int] | None = None


class Runtime(Protocol):
    """The few calls of a GPU runtime (CUDA or HIP) that engines make; handles and addresses are plain integers.

    Every method returns the runtime's error code, 0 for success, and never raises. None but :meth:`wait` and
    :meth:`register` may wait long.
    """

    not_ready: int
    """The code with which :meth:`query` says that work is still under way."""

    def set_device(self, ordinal: int) -> int:
        """Make a device the calling thread's current one."""
        ...

    def copy_to_device(self, destination: int, source: int, nbytes: int, stream: int) -> int:
        """Queue a copy from host memory to a device."""
        ...

    def record(self, event: int, stream: int) -> int:
        """Let ``event`` happen once everything queued on ``stream`` so far is done."""
        ...

    def query(self, event: int) -> int:
        """0 if ``event`` has happened, :attr:`not_ready` if not yet."""
        ...

    def wait(self, event: int) -> int:
        """Wait until ``event`` has happened, keeping a processor busy; for when :meth:`query` refuses to tell."""
        ...

    def stream_wait(self, stream: int, event: int) -> int:
        """Let what is queued on ``stream`` from now on wait for ``event``."""
        ...

    def register(self, address: int, nbytes: int) -> int:
        """Pin host memory for every device of the process; a failure leaves no error behind in the runtime."""
        ...

    def function_table(self) -> array[int]:
        """Addresses of the seven C functions behind the methods above, in their order, for the native engine.

        ``int set_device(int)``, ``int memcpy_async(void *, const void *, size_t, int kind, void *stream)`` (kind 1),
        ``int event_record(void *, void *)``, ``int event_query(void *)``, ``int event_synchronize(void *)``,
        ``int stream_wait_event(void *stream, void *event, unsigned flags)``, ``int host_register(void *, size_t,
        unsigned flags)`` (flags 1: for every context), and, as an eighth, ``int get_last_error(void)``.
        """
        ...


class DeviceQueues(Struct, frozen=True):
    """How an engine reaches one device; made and kept by the caller, for longer than the engine lives.

    Attributes:
        ordinal: the device's number.
        streams: what copies are queued on, in any order.
        events: an event per slot, recorded behind the copies out of it. Copies are complete when it has happened.
    """

    ordinal: int
    streams: tuple[int, ...]
    events: tuple[int, ...]


class Devices(Struct, frozen=True):
    """The devices an engine copies to, and the runtime that does it; ``queues`` is indexed by ``Extent.device``."""

    runtime: Runtime
    queues: tuple[DeviceQueues, ...]
