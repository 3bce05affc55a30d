"""How fast storage, memory and links are on this machine: short, bounded, and leaving the page cache as it was found.

Bytes are moved by the engines that loads use. Storage is read where the page cache held nothing, each path in a part of
the file of its own, so that none profits from another; what came to be cached is swept afterwards. What is found is
told to :mod:`weightlift.ceilings` for the reports of later loads of the same process.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.buffers import HostRegion, SlotPool
from weightlift.ceilings import remember_memory_copy, remember_storage
from weightlift.engines.choice import make_engine
from weightlift.engines.probing import run_probes
from weightlift.health.facts import Speeds
from weightlift.host import residency, storage, sweeping
from weightlift.host.memory import available_processors, headroom
from weightlift.operations import Extent, ExtentDone, Failure, ReadPath, ShardSource, Sink
from weightlift.plan import GRANULE_BYTES
from weightlift.shards import readonly_address
from weightlift.staging import ALIGNMENT_SLACK_BYTES
from weightlift.targets.device import ReadyEvents
from weightlift.types import EngineName
from weightlift.units import MIB, PAGE_BYTES, align_down, align_up, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightlift.operations import Engine
    from weightlift.targets.device import DeviceAccess

_PATH_SECONDS: Final = 0.4
_PATH_BYTES_MAX: Final = 1024 * MIB
_PATH_BYTES_MIN: Final = 8 * MIB
_CHUNK_BYTES: Final = 4 * MIB
_LANE_BYTES: Final = 32 * MIB
_WORKERS: Final = 4
_GAP_BYTES: Final = 16 * MIB
"""Left between two paths' parts of a file, since read-ahead runs on behind what was read."""

_STUCK_SECONDS: Final = 1.0
_COPY_SECONDS: Final = 0.25
_COPY_BYTES_MAX: Final = 256 * MIB
_COPY_BYTES_MIN: Final = 16 * MIB
_COPY_SHARE: Final = 16
_COPY_THREADS_MAX: Final = 16
_LINK_SECONDS: Final = 0.25
_LINK_BYTES: Final = 64 * MIB
_LINK_COPY_BYTES: Final = 8 * MIB

_abandoned: list[object] = []
"""What reads that never returned may still write to."""

_PATHS: Final = {
    "direct": ReadPath.DIRECT,
    "uncached": ReadPath.DONTCACHE,
    "buffered": ReadPath.BUFFERED,
    "mmap": ReadPath.MAPPED,
}


class _Part(NamedTuple):
    offset: int
    length: int


def storage_speeds(
    path: str | os.PathLike[str], *, seconds: float = _PATH_SECONDS, workers: int | None = None
) -> Speeds:
    """Read parts of a file by each path, at most that long each and at most the file in all.

    Args:
        path: a file; what the page cache holds of it is the same afterwards.
        seconds: how long each path is tried.
        workers: threads that read; by default four, or two where there are no more processors.

    Raises:
        OSError: the file cannot be read.
    """
    with contextlib.ExitStack() as stack:
        trial = storage.DirectTrial(path)
        stack.callback(trial.close)
        access = trial.judge(run_probes([trial.probe])[0] if trial.probe else None)
        direct = trial.fd if access.supported and access.offset_alignment <= PAGE_BYTES else -1
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        stack.callback(os.close, fd)
        size, device = os.fstat(fd).st_size, os.fstat(fd).st_dev
        step, whole = GRANULE_BYTES * residency.BLOCK_GRANULES, residency.whole_file(size)
        (blocks,), _ = residency.count_together([(fd, whole)], step, run_probes)
        cached = residency.residency_map(fd, size, GRANULE_BYTES, blocks)
        absent = residency.absent_ranges(fd, cached) if cached is not None else []
        mapping = mmap.mmap(fd, size, access=mmap.ACCESS_READ) if size else None
        if mapping is not None:
            stack.callback(mapping.close)
        source = ShardSource(
            fd,
            direct,
            size,
            access.offset_alignment if access.supported else PAGE_BYTES,
            readonly_address(mapping) if mapping is not None else 0,
        )
        probe = _StorageProbe(source, seconds, workers or max(2, min(available_processors(), _WORKERS)), stack)
        try:
            speeds, notes = probe.run(size, absent if cached is not None else None, access.reason)
        finally:
            if cached is not None:
                sweeping.sweep_until_settled(fd, absent)
    cold = [speed for name, speed in speeds.items() if name != "cached"]
    if cold:
        remember_storage(device, max(cold))
    return Speeds(storage=speeds, notes=notes)


class _StorageProbe:
    """One file, read by one path after the other."""

    def __init__(self, source: ShardSource, seconds: float, workers: int, stack: contextlib.ExitStack) -> None:
        self._source = source
        self._seconds = seconds
        self._workers = workers
        self._stack = stack
        self._notes: dict[str, str] = {}
        self._speeds: dict[str, float] = {}

    def run(
        self, size: int, absent: Sequence[tuple[int, int]] | None, direct_reason: str
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Try everything that can be tried.

        Args:
            size: of the file.
            absent: ranges that the page cache did not hold; ``None`` where that is unknown.
            direct_reason: why direct reads work or not.
        """
        supported = self._supported(direct_reason)
        if absent is None:
            # Only direct reads are sure to leave the page cache alone.
            for name in set(supported) - {"direct"}:
                self._notes[name] = "what the page cache holds of the file is unknown, so nothing is read through it"
            supported, absent = [name for name in supported if name == "direct"], [(0, size)]
        parts = dict(zip(reversed(supported), _divide(absent, len(supported)), strict=False))
        if "direct" in supported and size >= _PATH_BYTES_MIN:
            # Direct reads neither fill the page cache nor empty it, so that any part of the file will do.
            parts.setdefault("direct", _Part(0, align_down(min(size, _PATH_BYTES_MAX), PAGE_BYTES)))
        for name in supported:
            part = parts.get(name)
            if part is None:
                self._notes[name] = f"less than {format_bytes(_PATH_BYTES_MIN)} of the file are not in the page cache"
                continue
            self._measure(name, name, part)
            if name == "buffered":
                self._measure("cached", name, part, resident=True)
        if "cached" not in self._speeds and not absent:
            self._measure("cached", "buffered", _Part(0, min(size, _PATH_BYTES_MAX)), resident=True)
        return self._speeds, self._notes

    def _supported(self, direct_reason: str) -> list[str]:
        names = list(_PATHS)
        if self._source.direct_descriptor < 0:
            names.remove("direct")
            self._notes["direct"] = direct_reason
        if not storage.probe_dontcache(self._source.descriptor):
            names.remove("uncached")
            self._notes["uncached"] = "the file system or the kernel does not offer such reads"
        if not self._source.mapping_address:
            names.remove("mmap")
        return names

    def _measure(self, name: str, path: str, part: _Part, *, resident: bool = False) -> None:
        try:
            speed = _read_speed(
                self._source,
                _PATHS[path],
                part,
                self._seconds,
                workers=self._workers,
                resident=resident,
                stack=self._stack,
            )
        except OSError as err:
            self._notes[name] = str(err)
            return
        if speed is not None:
            self._speeds[name] = speed


def _divide(absent: Sequence[tuple[int, int]], count: int) -> Iterator[_Part]:
    """Parts of the largest absent range, with gaps between them; fewer where it is too short for all."""
    offset, length = max(absent, key=lambda item: item[1], default=(0, 0))
    start, end = align_up(offset, PAGE_BYTES), align_down(offset + length, PAGE_BYTES)
    count = min(count, (end - start + _GAP_BYTES) // (_PATH_BYTES_MIN + _GAP_BYTES))
    if count < 1:
        if end - start >= _PATH_BYTES_MIN:
            yield _Part(start, end - start)
        return
    each = (end - start - (count - 1) * _GAP_BYTES) // count
    for number in range(count):
        yield _Part(
            start + align_down(number * (each + _GAP_BYTES), PAGE_BYTES),
            align_down(min(each, _PATH_BYTES_MAX), PAGE_BYTES),
        )


def _read_speed(
    source: ShardSource,
    path: ReadPath,
    part: _Part,
    seconds: float,
    *,
    workers: int,
    resident: bool,
    stack: contextlib.ExitStack,
) -> float | None:
    """GB/s of one path over one part, or of as much of it as the time allows."""
    pool = SlotPool(workers + 2, _CHUNK_BYTES + ALIGNMENT_SLACK_BYTES)
    engine = make_engine(EngineName.AUTO, [source], pool.memory, workers)
    lane = path in {ReadPath.BUFFERED, ReadPath.DONTCACHE} and not resident
    extents = [
        Extent(
            0, path, Sink.DISCARD, offset, min(_LANE_BYTES, part.offset + part.length - offset), lane=lane,
            resident=resident,
        )
        for offset in range(part.offset, part.offset + part.length, _LANE_BYTES)
    ]  # fmt: skip
    engine.submit(extents)
    begin = time.monotonic()
    engine.set_limits(workers, _CHUNK_BYTES)
    failure = _wait(engine, len(extents), begin + seconds)
    engine.cancel()
    stuck = engine.join(_STUCK_SECONDS)
    elapsed, landed = time.monotonic() - begin, engine.counters().landed_bytes
    if stuck:
        # Its descriptors and its mapping have to stay as well.
        _abandoned.append((engine, pool, stack.pop_all()))
        raise OSError(f"a read did not return within {seconds + _STUCK_SECONDS:.0f} s")
    engine.close()
    pool.close()
    if failure is not None:
        raise OSError(failure.error_number, os.strerror(failure.error_number))
    return landed / elapsed / 1e9 if landed else None


def _wait(engine: Engine, extents: int, deadline: float) -> Failure | None:
    while extents and time.monotonic() < deadline:
        for event in engine.poll(0.01):
            if isinstance(event, Failure):
                return event
            extents -= isinstance(event, ExtentDone)
    return None


def memory_copy_speed(*, seconds: float = _COPY_SECONDS) -> float | None:
    """GB/s at which all processors together copy from memory to memory; ``None`` where too little memory is free."""
    room = headroom()
    total = _COPY_BYTES_MAX if room is None else min(_COPY_BYTES_MAX, room.available_bytes // _COPY_SHARE)
    if total < _COPY_BYTES_MIN:
        return None
    threads = min(available_processors(), _COPY_THREADS_MAX)
    region = HostRegion(total)
    ctypes.memset(region.address, 1, total)
    each = align_down(total // (2 * threads), PAGE_BYTES)
    copied = [0] * threads
    begin = time.monotonic()

    def copy(number: int) -> None:
        target = region.address + 2 * number * each
        # Once at least: on a busy machine threads may begin after the time is over.
        while not copied[number] or time.monotonic() < begin + seconds:
            ctypes.memmove(target, target + each, each)
            copied[number] += each

    workers = [threading.Thread(target=copy, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    speed = sum(copied) / (time.monotonic() - begin) / 1e9
    remember_memory_copy(speed)
    return speed


def link_speed(access: DeviceAccess, *, seconds: float = _LINK_SECONDS) -> float:
    """GB/s at which a GPU is filled from pinned memory.

    Args:
        access: the GPU.
        seconds: how long to copy; what is under way then is waited for.

    Raises:
        DeviceError: its runtime refuses; a call that hangs is the caller's to notice.
    """
    import torch

    runtime, ordinal = access.runtime, access.ordinal
    region = HostRegion(_LINK_BYTES)
    ctypes.memset(region.address, 1, _LINK_BYTES)
    tensor = access.memory.allocate(torch.uint8, (_LINK_BYTES,))
    target = access.memory.address(tensor)
    ready = ReadyEvents(access)
    with contextlib.ExitStack() as stack, runtime.using(ordinal):
        stack.callback(ready.close)
        runtime.check(runtime.register(region.address, _LINK_BYTES), "pin memory")
        stack.callback(runtime.unregister, region.address)
        stream = runtime.create_stream(ordinal)
        stack.callback(runtime.destroy_stream, stream)
        # The allocator may hand out memory that the caller's stream has still to finish with.
        runtime.check(runtime.stream_wait(stream, ready.record()), "wait for the stream")
        runtime.synchronize_stream(stream)
        copied, begin = 0, time.monotonic()
        while time.monotonic() < begin + seconds:
            for offset in range(0, _LINK_BYTES, _LINK_COPY_BYTES):
                code = runtime.copy_to_device(target + offset, region.address + offset, _LINK_COPY_BYTES, stream)
                runtime.check(code, "copy to the device")
            runtime.synchronize_stream(stream)
            copied += _LINK_BYTES
        return copied / (time.monotonic() - begin) / 1e9
