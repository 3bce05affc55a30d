"""Both engines against a perfect model, with storage and with devices that misbehave."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from weightlift.engines.native import NativeEngine
from weightlift.engines.python import PythonEngine
from weightlift.operations import Engine, FailureKind, ReadPath
from weightlift.testing.bench import FILE_BYTES, Arena, Bench
from weightlift.testing.device_bench import DEVICES, DeviceBench
from weightlift.testing.engine_machine import (
    ARENA_USED_MAX,
    CHUNK_BYTES_MAX,
    LENGTHS,
    WORKER_ROOM,
    EngineMachine,
    Sent,
)
from weightlift.testing.fake_gpu import UNWRITTEN, FakeGpu, FakeGpuUnavailable, build
from weightlift.testing.faults import FaultingReader
from weightlift.units import KIB

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weightlift.device_operations import Devices, SlotMemory
    from weightlift.host.gpu import Kind
    from weightlift.operations import ShardSource

DEVICE_ERROR = 719
_library: list[Path] = []


@pytest.fixture(scope="module")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        _library[:] = [build(tmp_path_factory.mktemp("fake-gpu"))]
    except FakeGpuUnavailable as err:
        pytest.skip(str(err))


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
        self.gpu = self.stack.enter_context(FakeGpu(_library[0], self.kind, devices=DEVICES, seed=1))
        self.devices = self.stack.enter_context(DeviceBench(folder, self.gpu))
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

    @rule(
        path=st.sampled_from(list(ReadPath)),
        offset=st.integers(0, FILE_BYTES - 1),
        length=LENGTHS,
        device=st.integers(0, DEVICES - 1),
        lane=st.booleans(),
    )
    def submit_for_a_device(self, path: ReadPath, offset: int, length: int, device: int, lane: bool) -> None:
        if not (not self.has_ended and self.arena_used < ARENA_USED_MAX):
            return
        if path is ReadPath.DIRECT and self.bench.source.direct_descriptor < 0:
            path = ReadPath.BUFFERED
        arena = self.devices._arenas[self.devices.ordinal(device)]
        first = len(arena._places)
        extent = self.devices.extent(path, offset, min(length, FILE_BYTES - offset), device, lane=lane)
        self.submit([Sent(extent, arena, first, len(arena._places))])

    @rule()
    def hold_copies_up(self) -> None:
        self.gpu.pause()

    @rule()
    def let_copies_go_on(self) -> None:
        self.gpu.resume()

    @rule(function=st.sampled_from(["MemcpyAsync", "EventRecord"]), after=st.integers(0, 10))
    def let_a_call_fail(self, function: str, after: int) -> None:
        if self.has_ended:
            return
        self.possible_failures.add((FailureKind.DEVICE, DEVICE_ERROR))
        self.gpu.fail(function, DEVICE_ERROR, after=after)

    def drain(self) -> None:
        self.gpu.resume()
        super().drain()

    def end(self) -> None:
        self.gpu.resume()
        super().end()
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
for machine in (NativeMachine, PythonMachine, NativeDeviceMachine, PythonDeviceMachine):
    machine.TestCase.settings = EXAMPLES

TestNativeEngine = pytest.mark.native(NativeMachine.TestCase)
TestPythonEngine = PythonMachine.TestCase
TestNativeEngineOnDevices = pytest.mark.native(pytest.mark.usefixtures("fake_library")(NativeDeviceMachine.TestCase))
TestPythonEngineOnDevices = pytest.mark.usefixtures("fake_library")(PythonDeviceMachine.TestCase)
