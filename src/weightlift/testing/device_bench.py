"""Fake devices around a file of known contents, for the conformance tests of engines.

Owns a session with the fake GPU runtime, an arena on each device, staging slots, streams and events. Whatever a test
does, the session ends with nothing left on the devices or the test fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from array import array
from typing import TYPE_CHECKING, Any, Final, Self

from weightlift.device_operations import DeviceQueues, Devices, SlotMemory, SlotState
from weightlift.operations import COPY_FIELDS, CopyTable, Extent, ReadPath, Sink
from weightlift.testing.bench import Arena, Bench
from weightlift.testing.fake_gpu import UNWRITTEN, FakeGpu, build
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from weightlift.device_operations import Runtime

DEVICES: Final = 2
_ARENA_BYTES: Final = 12 * MIB
_INT: Final = ctypes.c_int
_POINTER: Final = ctypes.c_void_p

fake_library = functools.cache(build)
"""The fake runtime's library in a folder, compiled once."""


class DeviceBench:
    """A file, two devices to bring it to, and what is needed on the way.

    Args:
        folder: where the file is written.
        gpu: a session that is open.

    Attributes:
        files: the file and its descriptors.
        gpu: the session.
        runtime: what engines call; tests replace it by one that misbehaves.
    """

    def __init__(self, folder: Path, gpu: FakeGpu) -> None:
        self.files = Bench(folder)
        self.gpu = gpu
        self.runtime: Runtime = gpu.runtime
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.files)
        self._arenas = []
        for device in range(DEVICES):
            address = self.gpu.allocate(device, _ARENA_BYTES)
            self._stack.callback(self.gpu.free, address)
            self._arenas.append(Arena(address, _ARENA_BYTES, UNWRITTEN, self.files.contents))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def slots(self, count: int, chunk_bytes: int, *, registered: bool = True) -> SlotMemory:
        """Slots that chunks of a size fit in; what engines registered is given back in the end."""
        memory = self.files.pool(count, chunk_bytes)
        if not registered:
            return memory
        states = array("B", bytes(count))
        self._stack.callback(self._unregister, memory, states)
        return SlotMemory(memory.address, memory.slot_bytes, count, states)

    def _unregister(self, memory: SlotMemory, states: array[int]) -> None:
        for slot, state in enumerate(states):
            if state == SlotState.REGISTERED:
                self.gpu.runtime.unregister(memory.address + slot * memory.slot_bytes)

    def stream(self, device: int) -> int:
        """A stream, destroyed in the end."""
        stream = self.gpu.runtime.create_stream(device)
        self._stack.callback(self.gpu.runtime.destroy_stream, stream)
        return stream

    def event(self, device: int) -> int:
        """An event, destroyed in the end."""
        event = self.gpu.runtime.create_event(device)
        self._stack.callback(self.gpu.runtime.destroy_event, event)
        return event

    def devices(self, slots: int, *, streams: int = 1) -> Devices:
        """Queues of both devices; the order of the indexes is not that of the ordinals."""
        queues = tuple(
            DeviceQueues(
                ordinal,
                tuple(self.stream(ordinal) for _ in range(streams)),
                tuple(self.event(ordinal) for _ in range(slots)),
            )
            for ordinal in reversed(range(DEVICES))
        )
        return Devices(self.runtime, queues)

    @staticmethod
    def ordinal(device: int) -> int:
        """The ordinal of a device's index."""
        return DEVICES - 1 - device

    def extent(
        self, path: ReadPath, offset: int, length: int, device: int = 0, *, lane: bool = False, ready: int = 0
    ) -> Extent:
        """An extent whose parts come to lie all over a device's arena."""
        copies = self._arenas[self.ordinal(device)].scatter(offset, length)
        return Extent(0, path, Sink.DEVICE, offset, length, copies=copies, lane=lane, device=device, ready=ready)

    def whole(self, offset: int, length: int, device: int = 0, *, lane: bool = False, ready: int = 0) -> Extent:
        """An extent read through the page cache that comes to lie in one piece."""
        return self.table([(offset, length)], device)._replace(lane=lane, ready=ready)

    def table(self, parts: Sequence[tuple[int, int]], device: int = 0, *, packed: bool = False) -> Extent:
        """An extent read through the page cache, from the first part to the last.

        Args:
            parts: offset and length in the file of what is wanted.
            device: index of the device.
            packed: the parts come to lie one right behind the other, instead of at places of their own.
        """
        arena, numbers = self._arenas[self.ordinal(device)], array("Q")
        if packed:
            addresses = arena.pack(parts)
        else:
            addresses = [arena.place(offset, length, whole_pages=False) for offset, length in parts]
        for (offset, length), address in zip(parts, addresses, strict=True):
            numbers.extend((offset, length, address))
        first, end = parts[0][0], sum(parts[-1])
        return self._over(first, end - first, numbers, device)

    def divided(self, offset: int, length: int, parts: int) -> Extent:
        """An extent that comes to lie in one piece, though its table has many entries."""
        nbytes = length // parts
        ends = [(part + 1) * nbytes for part in range(parts - 1)] + [length]
        return self.table(
            [(offset + end - nbytes, nbytes) for end in ends[:-1]] + [(offset + ends[-2], length - ends[-2])],
            packed=True,
        )

    @staticmethod
    def _over(offset: int, length: int, numbers: array[int], device: int) -> Extent:
        copies = CopyTable(numbers, 0, len(numbers) // COPY_FIELDS)
        return Extent(0, ReadPath.BUFFERED, Sink.DEVICE, offset, length, copies=copies, device=device)

    def check_memory(self) -> None:
        """Check that every part lies at its place, that nothing else was touched and no copy went astray."""
        for arena in self._arenas:
            arena.check()
        self.check_idle()

    def check_untouched(self, extent: Extent) -> None:
        """Check that no byte of an extent has come to its device."""
        assert extent.copies is not None
        numbers = extent.copies.numbers
        for entry in range(extent.copies.first, extent.copies.first + extent.copies.count):
            _, length, address = numbers[entry * COPY_FIELDS : (entry + 1) * COPY_FIELDS]
            found = ctypes.string_at(address, length)
            assert found == bytes([UNWRITTEN]) * length, f"entry {entry} of the table has been written"

    def check_idle(self) -> None:
        """Check that no copy is under way, and that none had its memory taken away."""
        counters = self.gpu.counters()
        assert (counters.queued_operations, counters.stray_copies) == (0, 0)


class HookedRuntime:
    """A runtime of which two functions go through Python first, on the thread that calls them.

    Args:
        inner: the runtime.
        before_set_device: called before every ``set_device``.
        before_copy: called before every ``copy_to_device``.
    """

    def __init__(
        self,
        inner: Runtime,
        *,
        before_set_device: Callable[[], object] = bool,
        before_copy: Callable[[], object] = bool,
    ) -> None:
        self.not_ready = inner.not_ready
        self._inner = inner
        self._before_set_device = before_set_device
        self._before_copy = before_copy
        self._functions = (
            ctypes.CFUNCTYPE(_INT, _INT)(self.set_device),
            ctypes.CFUNCTYPE(_INT, _POINTER, _POINTER, ctypes.c_size_t, _INT, _POINTER)(self._copy),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def set_device(self, ordinal: int) -> int:
        """See :class:`weightlift.device_operations.Runtime`."""
        self._before_set_device()
        return self._inner.set_device(ordinal)

    def copy_to_device(self, destination: int, source: int, nbytes: int, stream: int) -> int:
        """See :class:`weightlift.device_operations.Runtime`."""
        self._before_copy()
        return self._inner.copy_to_device(destination, source, nbytes, stream)

    def _copy(self, destination: int, source: int, nbytes: int, _: int, stream: int) -> int:
        return self.copy_to_device(destination, source, nbytes, stream)

    def function_table(self) -> array[int]:
        """See :class:`weightlift.device_operations.Runtime`."""
        table = self._inner.function_table()
        for index, function in enumerate(self._functions):
            table[index] = ctypes.cast(function, _POINTER).value or 0
        return table
