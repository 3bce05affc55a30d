"""The native engine, loaded through ctypes: the same contract as the Python one, without the interpreter lock.

Owns the layout of the C structures and the search for the compiled library; knows no policy. Where the library was
not built, :func:`native_library` says so and the Python engine is used instead.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weightlift.engines.native_steps import NativeSteps
from weightlift.errors import EngineError, UnsupportedError, printable
from weightlift.operations import (
    COPY_FIELDS,
    Activity,
    ChunkReady,
    Counters,
    Event,
    Extent,
    ExtentDone,
    Failure,
    FailureKind,
    ReadPath,
    ShardSource,
    ShardUse,
    Stage,
)
from weightlift.options import from_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.device_operations import Devices, SlotMemory

_ABI: Final = 9
_EVENTS_PER_POLL: Final = 64
_ACTIVITY_ROOM: Final = 64
_NANOSECONDS: Final = 1e-9
_LEAVING_MILLISECONDS: Final = 1


class _Shard(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("mapping", ctypes.c_uint64),
        ("fd", ctypes.c_int32),
        ("direct_fd", ctypes.c_int32),
        ("offset_alignment", ctypes.c_uint32),
        ("refused_errno", ctypes.c_int32),
        ("bytes", ctypes.c_uint64 * len(ReadPath)),
        ("refused_bytes", ctypes.c_uint64),
    )


class _Extent(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("copies", ctypes.c_uint64),
        ("ready", ctypes.c_uint64),
        ("copy_count", ctypes.c_uint32),
        ("shard", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("path", ctypes.c_uint8),
        ("sink", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("resident", ctypes.c_uint8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("extent", ctypes.c_uint32),
        ("slot", ctypes.c_uint32),
        ("error", ctypes.c_int32),
        ("failure", ctypes.c_uint32),
        ("stage", ctypes.c_uint32),
        ("slot_delta", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
    )


class _Counters(ctypes.Structure):
    _fields_ = (
        ("claimed_bytes", ctypes.c_uint64),
        ("read_bytes", ctypes.c_uint64),
        ("landed_bytes", ctypes.c_uint64),
        ("reads", ctypes.c_uint64),
        ("fallbacks", ctypes.c_uint64),
        ("nanoseconds", ctypes.c_uint64 * 8),
        ("workers", ctypes.c_uint32),
        ("running", ctypes.c_uint32),
    )


class _Activity(ctypes.Structure):
    _fields_ = (
        ("shard", ctypes.c_uint32),
        ("worker", ctypes.c_uint32),
        ("busy", ctypes.c_uint32),
        ("stage", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("nanoseconds", ctypes.c_uint64),
    )


class _Queue(ctypes.Structure):
    _fields_ = (
        ("ordinal", ctypes.c_int32),
        ("stream_count", ctypes.c_uint32),
        ("event_count", ctypes.c_uint32),
        ("streams", ctypes.POINTER(ctypes.c_uint64)),
        ("events", ctypes.POINTER(ctypes.c_uint64)),
    )


_WAITING: Final = frozenset(("wl_poll", "wl_join", "wl_probe"))
"""Functions that wait, and so release the interpreter lock. All others return at once and keep it: getting it back from
a busy Python thread takes a whole switch interval, several times over for every chunk. For calls of these that will not
wait long either there is a second one, with ``_now`` behind its name, that keeps the lock."""

_SIGNATURES: Final[dict[str, tuple[object, tuple[object, ...]]]] = {
    "wl_abi": (ctypes.c_uint32, ()),
    "wl_new": (
        ctypes.c_void_p,
        (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32),
    ),
    "wl_set_devices": (
        ctypes.c_int,
        (*(ctypes.c_void_p,) * 2, ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p),
    ),
    "wl_submit": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)),
    "wl_set_limits": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64)),
    "wl_poll": (ctypes.c_uint32, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32)),
    "wl_return_slot": (None, (ctypes.c_void_p, ctypes.c_uint32)),
    "wl_read_counters": (None, (ctypes.c_void_p, ctypes.c_void_p)),
    "wl_read_shard": (None, (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)),
    "wl_read_activity": (ctypes.c_uint32, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)),
    "wl_watch": (
        ctypes.c_int,
        (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int32, ctypes.c_char_p, ctypes.c_uint64),
    ),
    "wl_allow": (None, (ctypes.c_void_p, ctypes.c_uint64)),
    "wl_trim": (None, (ctypes.c_void_p,)),
    "wl_trace": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_uint64)),
    "wl_read_steps": (ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)),
    "wl_cancel": (None, (ctypes.c_void_p,)),
    "wl_join": (ctypes.c_uint32, (ctypes.c_void_p, ctypes.c_uint32)),
    "wl_free": (None, (ctypes.c_void_p,)),
    "wl_probe": (None, (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32)),
}


def library_path() -> Path:
    """Where the compiled engine is looked for: ``WEIGHTLIFT_ENGINE_LIBRARY``, or beside this module."""
    named = from_environment("WEIGHTLIFT_ENGINE_LIBRARY")
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return Path(named) if named else Path(__file__).with_name(f"libweightlift_engine{suffix}")


class Library:
    """The functions of the compiled engine, as attributes."""

    def __init__(self, path: Path) -> None:
        waiting, quick = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(waiting if name in _WAITING else quick, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        for name in _WAITING:
            function = getattr(quick, name)
            function.restype, function.argtypes = _SIGNATURES[name]
            setattr(self, f"{name}_now", function)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


@functools.cache
def native_library() -> Library | str:
    """The compiled engine, or a sentence that says why there is none."""
    path = library_path()
    if not path.exists():
        return f"the native engine was not built ({path.name} is not there)"
    try:
        library = Library(path)
    except (OSError, AttributeError) as err:
        return f"the native engine could not be loaded: {err}"
    found = library.wl_abi()
    if found != _ABI:
        return f"the native engine is of another version (interface {found}, wanted {_ABI}); reinstall weightlift"
    return library


class NativeEngine:
    """An :class:`~weightlift.operations.Engine` whose workers are threads of the compiled library.

    Args:
        shards: the open shards that extents refer to.
        slots: memory to stage in, alive for as long as the engine is.
        worker_room: most workers that :meth:`set_limits` may ask for; with devices, that many are started at once.
        devices: those that extents may name; their streams and events have to outlive the engine.

    Raises:
        UnsupportedError: the library was not built or does not load.
        EngineError: the machine is out of memory.
    """

    name = "native"

    def __init__(
        self, shards: Sequence[ShardSource], slots: SlotMemory, worker_room: int, devices: Devices | None = None
    ) -> None:
        library = native_library()
        if isinstance(library, str):
            raise UnsupportedError(library, hint='use engine="python", or reinstall where a C compiler is found')
        self._library = library
        self._slots = slots
        self._extents: list[Extent] = []
        self._traced = 0
        table = (_Shard * max(1, len(shards)))()
        for entry, shard in zip(table, shards, strict=False):
            entry.size, entry.mapping = shard.size_bytes, shard.mapping_address
            entry.fd, entry.direct_fd = shard.descriptor, shard.direct_descriptor
            entry.offset_alignment = shard.offset_alignment
        self._engine = library.wl_new(table, len(shards), slots.address, slots.slot_bytes, slots.count, worker_room)
        if not self._engine:
            raise EngineError("the native engine could not allocate its tables", hint="the machine is out of memory")
        self._events = (_Event * _EVENTS_PER_POLL)()
        if devices is not None and devices.queues:
            self._set_devices(devices)

    def _set_devices(self, devices: Devices) -> None:
        queues = (_Queue * len(devices.queues))()
        for entry, queue in zip(queues, devices.queues, strict=True):
            assert len(queue.events) >= self._slots.count, "every slot needs an event on every device"
            entry.ordinal = queue.ordinal
            entry.stream_count, entry.event_count = len(queue.streams), len(queue.events)
            entry.streams = (ctypes.c_uint64 * len(queue.streams))(*queue.streams)
            entry.events = (ctypes.c_uint64 * len(queue.events))(*queue.events)
        functions, states = devices.runtime.function_table(), self._slots.states
        error = self._library.wl_set_devices(
            self._engine,
            functions.buffer_info()[0],
            devices.runtime.not_ready,
            queues,
            len(queues),
            states.buffer_info()[0] if states is not None else None,
        )
        self._check(error, "take devices")

    def submit(self, extents: Sequence[Extent]) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        table = (_Extent * max(1, len(extents)))()
        for entry, extent in zip(table, extents, strict=False):
            entry.offset, entry.length, entry.address = extent.offset, extent.length, extent.address
            entry.shard, entry.path, entry.sink = extent.shard, extent.path, extent.sink
            entry.flags = extent.fresh | extent.drop_behind << 1 | extent.lane << 2
            entry.resident = extent.resident
            entry.device, entry.ready = extent.device, extent.ready
            if extent.copies:
                numbers = extent.copies.numbers
                entry.copies = numbers.buffer_info()[0] + extent.copies.first * COPY_FIELDS * numbers.itemsize
                entry.copy_count = extent.copies.count
        # The list keeps the copy tables alive, whose addresses the engine now has.
        self._extents.extend(extents)
        self._check(self._library.wl_submit(self._engine, table, len(extents)), "take extents")

    def set_limits(self, workers: int, chunk_bytes: int) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        self._check(self._library.wl_set_limits(self._engine, workers, chunk_bytes), "start a thread")

    def poll(self, timeout_seconds: float) -> list[Event]:
        """See :class:`~weightlift.operations.Engine`."""
        events = self._events
        count = self._library.wl_poll_now(self._engine, events, _EVENTS_PER_POLL, 0)
        if not count and timeout_seconds > 0:
            count = self._library.wl_poll(self._engine, events, _EVENTS_PER_POLL, int(timeout_seconds * 1000))
        return [self._event(events[index]) for index in range(count)]

    def _event(self, event: _Event) -> Event:
        if event.kind == 0:
            return ExtentDone(event.extent)
        if event.kind == 1:
            address = self._slots.address + event.slot * self._slots.slot_bytes + event.slot_delta
            return ChunkReady(event.extent, event.slot, address, event.offset, event.length)
        kind, stage = FailureKind(event.failure), Stage(event.stage)
        return Failure(event.extent, kind, event.error, event.offset, event.length, stage=stage)

    def return_slot(self, slot: int) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        self._library.wl_return_slot(self._engine, slot)

    def counters(self) -> Counters:
        """See :class:`~weightlift.operations.Engine`."""
        raw = _Counters()
        self._library.wl_read_counters(self._engine, ctypes.byref(raw))
        times = (nanoseconds * _NANOSECONDS for nanoseconds in raw.nanoseconds)
        storage, cache, populate, copy, slot_wait, device, register, busy = times
        return Counters(
            claimed_bytes=raw.claimed_bytes,
            read_bytes=raw.read_bytes,
            landed_bytes=raw.landed_bytes,
            reads=raw.reads,
            fallbacks=raw.fallbacks,
            storage_seconds=storage,
            cache_seconds=cache,
            populate_seconds=populate,
            copy_seconds=copy,
            slot_wait_seconds=slot_wait,
            device_seconds=device,
            register_seconds=register,
            busy_seconds=busy,
            workers=raw.workers,
            running=raw.running,
        )

    def shard_use(self, shard: int) -> ShardUse:
        """See :class:`~weightlift.operations.Engine`."""
        raw = _Shard()
        self._library.wl_read_shard(self._engine, shard, ctypes.byref(raw))
        by_path = list(raw.bytes)
        return ShardUse(
            direct_bytes=by_path[ReadPath.DIRECT],
            buffered_bytes=by_path[ReadPath.BUFFERED] + by_path[ReadPath.DONTCACHE],
            mapped_bytes=by_path[ReadPath.MAPPED],
            refused_bytes=raw.refused_bytes,
            refused_errno=raw.refused_errno,
        )

    def activity(self) -> list[Activity]:
        """See :class:`~weightlift.operations.Engine`."""
        table = (_Activity * _ACTIVITY_ROOM)()
        count = self._library.wl_read_activity(self._engine, table, _ACTIVITY_ROOM)
        return [
            Activity(entry.shard, entry.offset, entry.length, entry.nanoseconds * _NANOSECONDS, Stage(entry.stage))
            for entry in table[:count]
        ]

    def watch(self, seconds: float, names: Sequence[str], fd: int = 2) -> None:
        """See :class:`~weightlift.operations.Engine`; works while the interpreter lock is held, too. Only once.

        Args:
            seconds: how long nothing may land.
            names: what to call each shard.
            fd: where to say it; the lines are left out while nobody reads them.
        """
        text = b"".join(printable(name).encode() + b"\0" for name in names)
        error = self._library.wl_watch(self._engine, max(1, round(seconds * 1000)), fd, text, len(text))
        self._check(error, "watch")

    def allow(self, nbytes: int) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        self._library.wl_allow(self._engine, nbytes)

    def trim(self) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        self._library.wl_trim(self._engine)

    def trace(self, capacity: int) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        self._check(self._library.wl_trace(self._engine, capacity), "keep a trace")
        self._traced = capacity

    def steps(self) -> NativeSteps:
        """See :class:`~weightlift.operations.Engine`."""
        return NativeSteps(self._library, self._engine, self._traced)

    def cancel(self) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        self._library.wl_cancel(self._engine)

    def join(self, timeout_seconds: float) -> int:
        """See :class:`~weightlift.operations.Engine`."""
        # Threads with nothing left to do leave at once.
        left = self._library.wl_join_now(self._engine, _LEAVING_MILLISECONDS)
        return int(left and self._library.wl_join(self._engine, int(timeout_seconds * 1000)))

    def close(self) -> None:
        """See :class:`~weightlift.operations.Engine`."""
        engine, self._engine = self._engine, None
        self._library.wl_free(engine)

    @staticmethod
    def _check(error: int, action: str) -> None:
        if error:
            raise EngineError(
                f"the native engine could not {action}: {os.strerror(error)} (errno {error})",
                hint="a limit on threads or memory of this user or container is reached: raise it or lower workers",
            )
