"""Both engines against a perfect model, whatever their caller does in which order.

The model knows every byte: where it has to land, that it lands once, which slots are out, how much may be claimed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from weightlift.engines.native import NativeEngine
from weightlift.engines.python import PythonEngine
from weightlift.operations import (
    UNBOUNDED,
    ChunkReady,
    Engine,
    Event,
    Extent,
    ExtentDone,
    Failure,
    FailureKind,
    ReadPath,
    Sink,
)
from weightlift.testing.bench import FILE_BYTES, Arena, Bench, threads_now
from weightlift.testing.conformance import HOST_SINKS, PATIENCE_SECONDS
from weightlift.testing.device_bench import DEVICES, DeviceBench
from weightlift.testing.fake_gpu import UNWRITTEN, FakeGpu, FakeGpuUnavailable, build
from weightlift.testing.faults import FaultingReader
from weightlift.units import KIB, MIB, PAGE_BYTES, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.device_operations import Devices, SlotMemory
    from weightlift.host.gpu import Kind
    from weightlift.operations import ShardSource

PICK = st.integers(0, 1000)
CHUNK_BYTES_MAX = 64 * KIB
CHUNKS = st.sampled_from([PAGE_BYTES, 16 * KIB, CHUNK_BYTES_MAX])
LENGTHS = st.one_of(st.integers(1, 5000), st.integers(1, 300 * KIB))
ARENA_USED_MAX = 8 * MIB
WORKER_ROOM = 4
DEVICE_ERROR = 719
BEYOND = 64 * KIB
"""The file is said to be so much longer than it is, for reads that meet its end."""

_library: list[Path] = []


@pytest.fixture(scope="module")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        _library[:] = [build(tmp_path_factory.mktemp("fake-gpu"))]
    except FakeGpuUnavailable as err:
        pytest.skip(str(err))


WANTED = st.fixed_dictionaries(
    {
        "path": st.sampled_from(list(ReadPath)),
        "sink": st.sampled_from(HOST_SINKS),
        "offset": st.integers(0, FILE_BYTES - 1),
        "length": LENGTHS,
        "lane": st.booleans(),
        "fresh": st.booleans(),
        "resident": st.booleans(),
    }
)


@dataclass
class Sent:
    """An extent that was submitted, and what has been told of it."""

    extent: Extent
    arena: Arena
    first_place: int
    end_place: int
    handed: list[tuple[int, int]] = field(default_factory=list)
    done: bool = False


class EngineMachine(RuleBasedStateMachine):
    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        self.bench = self.open_bench(Path(folder))
        self.threads = threads_now()
        self.bench.source = self.bench.source._replace(size_bytes=FILE_BYTES + BEYOND)
        self.sent: list[Sent] = []
        self.held: dict[int, ChunkReady] = {}
        self.failure: Failure | None = None
        self.claimed_at_the_end: int | None = None
        self.claimed_max = UNBOUNDED
        self.possible_failures: set[tuple[FailureKind, int]] = set()

    def open_bench(self, folder: Path) -> Bench:
        return self._stack.enter_context(Bench(folder))

    def make_engine(self, shards: Sequence[ShardSource], slots: int) -> Engine:
        raise NotImplementedError

    @initialize(slots=st.integers(1, 4), workers=st.integers(0, 4), chunk_bytes=CHUNKS)
    def begin(self, slots: int, workers: int, chunk_bytes: int) -> None:
        self.slots = slots
        self.engine = self.make_engine([self.bench.source], slots)
        self.engine.set_limits(workers, chunk_bytes)

    @property
    def has_ended(self) -> bool:
        return self.failure is not None or self.claimed_at_the_end is not None

    @property
    def arenas(self) -> list[Arena]:
        return [self.bench._arena]

    @property
    def arena_used(self) -> int:
        return max(arena._cursor for arena in self.arenas)

    # ---- what a caller may do

    @precondition(lambda self: not self.has_ended and self.arena_used < ARENA_USED_MAX)
    @rule(wanted=st.lists(WANTED, min_size=0, max_size=3))
    def submit(self, wanted: list[dict[str, Any]]) -> None:
        self._submit([self._extent(**item) for item in wanted])

    def _extent(
        self, path: ReadPath, sink: Sink, offset: int, length: int, *, lane: bool, fresh: bool, resident: bool
    ) -> Sent:
        if path is ReadPath.DIRECT and self.bench.source.direct_descriptor < 0:
            path = ReadPath.BUFFERED
        length = min(length, FILE_BYTES - offset)
        arena = self.bench._arena
        first = len(arena._places)
        extent = self.bench.extent(path, sink, offset, length, fresh=fresh and sink is Sink.PLACE)
        extent = extent._replace(lane=lane and sink is not Sink.HAND_OVER, resident=resident)
        return Sent(extent, arena, first, len(arena._places))

    def _submit(self, more: list[Sent]) -> None:
        self.sent += more
        self.engine.submit([sent.extent for sent in more])

    @precondition(lambda self: not self.has_ended and self.arena_used < ARENA_USED_MAX)
    @rule(
        path=st.sampled_from([ReadPath.BUFFERED, ReadPath.DONTCACHE, ReadPath.DIRECT]),
        sink=st.sampled_from(HOST_SINKS),
        before=st.integers(0, 100 * KIB),
        beyond=st.integers(1, BEYOND),
    )
    def submit_what_the_file_does_not_have(self, path: ReadPath, sink: Sink, before: int, beyond: int) -> None:
        if path is ReadPath.DIRECT and self.bench.source.direct_descriptor < 0:
            path = ReadPath.BUFFERED
        self.possible_failures.add((FailureKind.END_OF_FILE, 0))
        arena = self.bench._arena
        first = len(arena._places)
        extent = self.bench.extent(path, sink, FILE_BYTES - before, before + beyond)
        self._submit([Sent(extent, arena, first, len(arena._places))])

    @rule(workers=st.integers(0, 4), chunk_bytes=CHUNKS)
    def set_limits(self, workers: int, chunk_bytes: int) -> None:
        self.engine.set_limits(workers, chunk_bytes)
        # One that has failed starts no more threads, though the failure is yet to be told.
        if not self.has_ended and not self.possible_failures:
            assert self.engine.counters().workers == workers

    @rule(more=st.one_of(st.integers(0, 200 * KIB), st.just(UNBOUNDED)))
    def allow(self, more: int) -> None:
        claimed = self.engine.counters().claimed_bytes
        self.engine.allow(min(claimed + more, UNBOUNDED))
        # What was claimed before the call is claimed; from then on a chunk may begin below the bound and end behind it.
        already = self.engine.counters().claimed_bytes
        self.claimed_max = max(already, min(claimed + more, UNBOUNDED) + CHUNK_BYTES_MAX - 1)

    @rule()
    def trim(self) -> None:
        self.engine.trim()
        for chunk in self.held.values():
            self.bench.check_chunk(chunk)

    @rule(patiently=st.booleans())
    def poll(self, patiently: bool) -> None:
        self._take(self.engine.poll(0.002 if patiently else 0.0))

    @precondition(lambda self: self.held)
    @rule(which=PICK)
    def return_slot(self, which: int) -> None:
        self._return(sorted(self.held)[which % len(self.held)])

    def _return(self, slot: int) -> None:
        chunk = self.held.pop(slot)
        self.bench.check_chunk(chunk)
        self.engine.return_slot(slot)

    @rule()
    def look_at_what_workers_do(self) -> None:
        for doing in self.engine.activity():
            assert doing.shard == 0
            # First calls to a device belong to no chunk, and are told with the next one's place and no length.
            assert 0 <= doing.length <= CHUNK_BYTES_MAX
            assert doing.length == 0 or any(
                sent.extent.offset <= doing.offset < sent.extent.offset + sent.extent.length for sent in self.sent
            )

    @precondition(lambda self: not self.has_ended)
    @rule()
    def everything_lands_once_nothing_holds_it_up(self) -> None:
        self._drain()

    @precondition(lambda self: not self.has_ended)
    @rule()
    def cancel(self) -> None:
        self.engine.cancel()
        self.claimed_at_the_end = self.engine.counters().claimed_bytes

    # ---- what the engine tells

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, ChunkReady):
                self._take_chunk(event)
            elif isinstance(event, ExtentDone):
                sent = self.sent[event.extent]
                assert not sent.done, "told twice"
                sent.done = True
                if sent.extent.sink is Sink.HAND_OVER:
                    self._check_whole(sent)
            else:
                assert self.failure is None, "there is one first failure"
                assert (event.kind, event.error_number) in self.possible_failures, event
                extent = self.sent[event.extent].extent
                assert extent.offset <= event.offset <= extent.offset + extent.length
                self.failure = event
                if self.claimed_at_the_end is None:
                    self.claimed_at_the_end = self.engine.counters().claimed_bytes

    def _take_chunk(self, chunk: ChunkReady) -> None:
        assert 0 <= chunk.slot < self.slots
        assert chunk.slot not in self.held, "a slot is one chunk's until it is returned"
        self.bench.check_chunk(chunk)
        sent = self.sent[chunk.extent]
        assert sent.extent.sink is Sink.HAND_OVER
        assert not sent.done
        assert 0 < chunk.length <= CHUNK_BYTES_MAX
        sent.handed.append((chunk.offset, chunk.length))
        self.held[chunk.slot] = chunk

    @staticmethod
    def _check_whole(sent: Sent) -> None:
        position = sent.extent.offset
        for offset, length in sorted(sent.handed):
            assert offset == position
            position += length
        assert position == sent.extent.offset + sent.extent.length

    # ---- what always holds

    @invariant()
    def counters_agree_with_the_model(self) -> None:
        if not hasattr(self, "engine"):
            return
        counters = self.engine.counters()
        total = sum(sent.extent.length for sent in self.sent)
        assert counters.landed_bytes <= counters.read_bytes <= counters.claimed_bytes <= min(total, self.claimed_max)
        if self.claimed_at_the_end is not None:
            assert counters.claimed_bytes == self.claimed_at_the_end, "nothing is claimed after the end"
        assert counters.landed_bytes >= sum(sent.extent.length for sent in self.sent if sent.done)

    # ---- the end

    def _drain(self) -> None:
        self.engine.allow(UNBOUNDED)
        self.claimed_max = UNBOUNDED
        self.engine.set_limits(3, CHUNK_BYTES_MAX)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.failure is None and not all(sent.done for sent in self.sent):
            for slot in list(self.held):
                self._return(slot)
            self._take(self.engine.poll(0.1))
            assert time.monotonic() < deadline, f"{self.sent} did not land in {PATIENCE_SECONDS} s"
        if self.failure is None:
            self._check_landed()

    def _check_landed(self) -> None:
        total = sum(sent.extent.length for sent in self.sent)
        counters, use = self.engine.counters(), self.engine.shard_use(0)
        assert (counters.claimed_bytes, counters.read_bytes, counters.landed_bytes) == (total, total, total)
        assert use.direct_bytes + use.buffered_bytes + use.mapped_bytes == total
        for arena in self.arenas:
            arena.check()

    def _check_no_slot_is_lost(self) -> None:
        """As many chunks can be handed over at once as there are slots, and no more."""
        for slot in list(self.held):
            self._return(slot)
        self.engine.set_limits(2, PAGE_BYTES)
        extent = Extent(0, ReadPath.BUFFERED, Sink.HAND_OVER, 3, (self.slots + 1) * PAGE_BYTES)
        self._submit([Sent(extent, self.bench._arena, 0, 0)])
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(self.held) < self.slots and self.failure is None:
            self._take(self.engine.poll(0.1))
            assert time.monotonic() < deadline, f"{self.slots - len(self.held)} slots are lost"
        assert self.failure is not None or self.engine.poll(0.0) == []

    def _check_rest_untouched(self) -> None:
        """What was not claimed was not touched; what did not land may be anything within its place."""
        claimed, begin = self.engine.counters().claimed_bytes, 0
        in_order = not any(sent.extent.lane for sent in self.sent)
        for sent in self.sent:
            arena, guard = sent.arena, bytes([sent.arena._guard])
            for place in arena._places[sent.first_place : sent.end_place]:
                first, end = place.start, place.start + place.length
                if place.whole_pages:
                    first, end = align_down(first, PAGE_BYTES), align_up(end, PAGE_BYTES)
                if in_order and begin >= claimed:
                    assert ctypes.string_at(arena.address + first, end - first) == guard * (end - first)
                if not sent.done:
                    ctypes.memset(arena.address + first, guard[0], end - first)
            begin += sent.extent.length
        for arena in self.arenas:
            # Places that were never finished are nobody's any more, so that the arena wants its guard in them.
            mine = [sent for sent in self.sent if sent.arena is arena and not sent.done]
            unfinished = {number for sent in mine for number in range(sent.first_place, sent.end_place)}
            arena._places = [place for number, place in enumerate(arena._places) if number not in unfinished]
            arena.check()

    def teardown(self) -> None:
        try:
            if hasattr(self, "engine"):
                self._end()
        finally:
            self._stack.close()

    def _end(self) -> None:
        if not self.has_ended:
            self._drain()
        if not self.has_ended:
            self._check_no_slot_is_lost()
        self.engine.cancel()
        claimed = self.engine.counters().claimed_bytes
        for slot in list(self.held):
            self._return(slot)
        assert self.engine.join(PATIENCE_SECONDS) == 0, "a worker has not left"
        self._take(self.engine.poll(0.0))
        for slot in list(self.held):
            self._return(slot)
        counters = self.engine.counters()
        assert (counters.claimed_bytes, counters.running) == (claimed, 0)
        assert (self.engine.activity(), self.engine.poll(0.0)) == ([], [])
        self._check_rest_untouched()
        self.engine.close()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while threads_now() > self.threads:
            assert time.monotonic() < deadline, f"{threads_now() - self.threads} threads were left behind"


class NativeMachine(EngineMachine):
    def make_engine(self, shards: Sequence[ShardSource], slots: int) -> Engine:
        return NativeEngine(shards, self.bench.pool(slots, CHUNK_BYTES_MAX), WORKER_ROOM)


class PythonMachine(EngineMachine):
    def make_engine(self, shards: Sequence[ShardSource], slots: int) -> Engine:
        self.reader = FaultingReader(0)
        return PythonEngine(shards, self.bench.pool(slots, CHUNK_BYTES_MAX), WORKER_ROOM, reader=self.reader)

    @rule(short_reads=st.sampled_from([0.0, 0.5, 1.0]), interruptions=st.sampled_from([0.0, 0.5, 1.0]))
    def let_reads_be_short_and_interrupted(self, short_reads: float, interruptions: float) -> None:
        self.reader.faults = replace(self.reader.faults, short_reads=short_reads, interruptions=interruptions)

    @rule(after=st.integers(0, 600 * KIB))
    def refuse_direct_reads(self, after: int) -> None:
        self.reader.faults = replace(self.reader.faults, refuse_direct_from=after)

    @rule(after=st.integers(1, 6), number=st.sampled_from([errno.EIO, errno.ESTALE, errno.ENOMEM]))
    def let_a_read_fail(self, after: int, number: int) -> None:
        self.possible_failures.add((FailureKind.READ, number))
        faults = self.reader.faults
        self.reader.faults = replace(faults, fail_at_read=self.reader.reads + after, error_number=number)


class DeviceMachine(EngineMachine):
    """The same with two fake devices beside host memory, whose copies are held up and fail."""

    kind: Kind

    def open_bench(self, folder: Path) -> Bench:
        self.gpu = self._stack.enter_context(FakeGpu(_library[0], self.kind, devices=DEVICES, seed=1))
        self.devices = self._stack.enter_context(DeviceBench(folder, self.gpu))
        # The thread that carries work out starts with the first of it, and stays.
        self.gpu.fill(self.devices.stream(0), self.devices._arenas[0].address, UNWRITTEN, 1)
        self.gpu.settle()
        return self.devices.files

    def make_on_devices(self, shards: Sequence[ShardSource], slots: SlotMemory, devices: Devices) -> Engine:
        raise NotImplementedError

    def make_engine(self, shards: Sequence[ShardSource], slots: int) -> Engine:
        return self.make_on_devices(shards, self.devices.slots(slots, CHUNK_BYTES_MAX), self.devices.devices(slots))

    @property
    def arenas(self) -> list[Arena]:
        return [self.bench._arena, *self.devices._arenas]

    @precondition(lambda self: not self.has_ended and self.arena_used < ARENA_USED_MAX)
    @rule(
        path=st.sampled_from(list(ReadPath)),
        offset=st.integers(0, FILE_BYTES - 1),
        length=LENGTHS,
        device=st.integers(0, DEVICES - 1),
        lane=st.booleans(),
    )
    def submit_for_a_device(self, path: ReadPath, offset: int, length: int, device: int, lane: bool) -> None:
        if path is ReadPath.DIRECT and self.bench.source.direct_descriptor < 0:
            path = ReadPath.BUFFERED
        arena = self.devices._arenas[self.devices.ordinal(device)]
        first = len(arena._places)
        extent = self.devices.extent(path, offset, min(length, FILE_BYTES - offset), device, lane=lane)
        self._submit([Sent(extent, arena, first, len(arena._places))])

    @rule()
    def hold_copies_up(self) -> None:
        self.gpu.pause()

    @rule()
    def let_copies_go_on(self) -> None:
        self.gpu.resume()

    @precondition(lambda self: not self.has_ended)
    @rule(function=st.sampled_from(["MemcpyAsync", "EventRecord"]), after=st.integers(0, 10))
    def let_a_call_fail(self, function: str, after: int) -> None:
        self.possible_failures.add((FailureKind.DEVICE, DEVICE_ERROR))
        self.gpu.fail(function, DEVICE_ERROR, after=after)

    def _drain(self) -> None:
        self.gpu.resume()
        super()._drain()

    def _end(self) -> None:
        self.gpu.resume()
        super()._end()
        self.devices.check_idle()


class NativeDeviceMachine(DeviceMachine):
    kind = "cuda"

    def make_on_devices(self, shards: Sequence[ShardSource], slots: SlotMemory, devices: Devices) -> Engine:
        return NativeEngine(shards, slots, WORKER_ROOM, devices)


class PythonDeviceMachine(DeviceMachine):
    kind = "hip"

    def make_on_devices(self, shards: Sequence[ShardSource], slots: SlotMemory, devices: Devices) -> Engine:
        return PythonEngine(shards, slots, WORKER_ROOM, devices=devices)


EXAMPLES = hypothesis.settings(max_examples=hypothesis.settings().max_examples // 4)


@pytest.mark.native
class TestNativeEngine(NativeMachine.TestCase):  # type: ignore[misc] # made by hypothesis, of no type of its own
    settings = EXAMPLES


class TestPythonEngine(PythonMachine.TestCase):  # type: ignore[misc] # made by hypothesis, of no type of its own
    settings = EXAMPLES


@pytest.mark.native
@pytest.mark.usefixtures("fake_library")
class TestNativeEngineOnDevices(NativeDeviceMachine.TestCase):  # type: ignore[misc] # see above
    settings = EXAMPLES


@pytest.mark.usefixtures("fake_library")
class TestPythonEngineOnDevices(PythonDeviceMachine.TestCase):  # type: ignore[misc] # see above
    settings = EXAMPLES
