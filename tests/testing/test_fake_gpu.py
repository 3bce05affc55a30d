"""The fake GPU runtime is as asynchronous, and as strict, as tests of copies to devices need it to be."""

from __future__ import annotations

import ctypes
import shlex
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from weightlift.errors import DeviceError
from weightlift.testing.fake_gpu import FOREVER, UNWRITTEN, FakeGpu, FakeGpuUnavailable, build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weightlift.host.gpu import Kind

SIZE = 4096
INVALID_VALUE, OUT_OF_MEMORY, INVALID_DEVICE, INVALID_HANDLE, NOT_READY = 1, 2, 101, 400, 600


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("fake_gpu"))
    except FakeGpuUnavailable as err:
        pytest.skip(str(err))


@pytest.fixture(params=["cuda", "hip"])
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def gpu(library: Path, kind: Kind) -> Iterator[FakeGpu]:
    with FakeGpu(library, kind, seed=5) as opened:
        yield opened


class Rig:
    """Host memory, device memory, streams and an event of device 0, given back in the end."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.buffer = ctypes.create_string_buffer(b"\x11" * SIZE, SIZE)
        self.source = ctypes.addressof(self.buffer)
        self.target = gpu.allocate(0, SIZE)
        self.stream, self.other = gpu.runtime.create_stream(0), gpu.runtime.create_stream(0)
        self.event = gpu.runtime.create_event(0)

    def copy(self, stream: int | None = None) -> int:
        return self.gpu.runtime.copy_to_device(self.target, self.source, SIZE, stream or self.stream)

    def landed(self) -> bytes:
        return ctypes.string_at(self.target, SIZE)

    def close(self) -> None:
        self.gpu.resume()
        for stream in (self.stream, self.other):
            self.gpu.release(stream)  # after a test that failed half way
        for stream in (self.stream, self.other):
            self.gpu.runtime.synchronize_stream(stream)
            self.gpu.runtime.destroy_stream(stream)
        self.gpu.runtime.destroy_event(self.event)
        self.gpu.free(self.target)


@pytest.fixture
def rig(gpu: FakeGpu) -> Iterator[Rig]:
    made = Rig(gpu)
    yield made
    made.close()


class TestFakeIsAsynchronous:
    def test_a_copy_reads_its_source_when_it_is_carried_out(self, gpu: FakeGpu, rig: Rig) -> None:
        gpu.pause()
        assert rig.copy() == 0
        assert gpu.runtime.record(rig.event, rig.stream) == 0
        gpu.settle()
        assert gpu.runtime.query(rig.event) == NOT_READY
        assert rig.landed() == bytes([UNWRITTEN]) * SIZE
        ctypes.memset(rig.source, 0x22, SIZE)
        gpu.resume()
        gpu.runtime.synchronize_stream(rig.stream)
        assert gpu.runtime.query(rig.event) == 0
        assert rig.landed() == b"\x22" * SIZE
        assert (gpu.copied_bytes(0), gpu.copied_bytes(1)) == (SIZE, 0)

    def test_delays_change_when_and_not_what(self, library: Path, kind: Kind) -> None:
        with FakeGpu(library, kind, delay_seconds=(0.0001, 0.002)) as gpu:
            rig = Rig(gpu)
            assert rig.copy() == 0
            assert gpu.runtime.query(rig.event) == 0  # never recorded
            gpu.runtime.synchronize_stream(rig.stream)
            assert rig.landed() == b"\x11" * SIZE
            rig.close()

    def test_streams_keep_their_order_and_overtake_each_other_as_the_seed_says(self, library: Path) -> None:
        def order(seed: int) -> list[int]:
            with FakeGpu(library, devices=1, seed=seed) as gpu:
                target = gpu.allocate(0, 64)
                streams = [gpu.runtime.create_stream(0) for _ in range(4)]
                gpu.pause()
                for nbytes in range(1, 9):
                    for stream in streams:
                        gpu.fill(stream, target, 0, nbytes)
                gpu.resume()
                gpu.settle()
                executed = gpu.executed()
                for stream in streams:
                    assert [done.nbytes for done in executed if done.stream == stream] == list(range(1, 9))
                    gpu.runtime.destroy_stream(stream)
                gpu.free(target)
                return [streams.index(done.stream) for done in executed]

        orders = [order(seed) for seed in range(5)]
        assert order(3) == orders[3]
        assert len(set(map(tuple, orders))) == 5
        assert all(found != [0, 1, 2, 3] * 8 for found in orders)

    @pytest.mark.parametrize("waits", [True, False])
    def test_work_queued_on_the_callers_stream_is_seen(self, gpu: FakeGpu, rig: Rig, waits: bool) -> None:
        gpu.hold(rig.other)
        gpu.fill(rig.other, rig.target, 0x33, SIZE)
        assert gpu.runtime.record(rig.event, rig.other) == 0
        if waits:
            assert gpu.runtime.stream_wait(rig.stream, rig.event) == 0
        assert rig.copy() == 0
        gpu.settle()
        assert (rig.landed() == b"\x11" * SIZE) is not waits
        gpu.release(rig.other)
        gpu.settle()
        assert rig.landed() == (b"\x11" if waits else b"\x33") * SIZE

    def test_a_stream_waits_for_what_was_recorded_when_it_was_told_to(self, gpu: FakeGpu, rig: Rig) -> None:
        gpu.hold(rig.stream)
        assert gpu.runtime.record(rig.event, rig.other) == 0
        assert gpu.runtime.stream_wait(rig.stream, rig.event) == 0
        gpu.settle()
        gpu.hold(rig.other)
        assert gpu.runtime.record(rig.event, rig.other) == 0
        gpu.release(rig.stream)
        gpu.runtime.synchronize_stream(rig.stream)
        assert gpu.runtime.query(rig.event) == NOT_READY
        gpu.release(rig.other)
        gpu.settle()
        assert gpu.runtime.query(rig.event) == 0

    def test_the_default_stream_is_that_of_the_current_device(self, gpu: FakeGpu, rig: Rig) -> None:
        assert gpu.runtime.record(rig.event, 0) == 0
        with gpu.runtime.using(1):
            assert gpu.runtime.record(rig.event, 0) == INVALID_HANDLE
            assert gpu.runtime.copy_to_device(rig.target, rig.source, SIZE, 0) == INVALID_VALUE

    def test_what_was_queued_outlives_its_stream_and_events(self, gpu: FakeGpu, rig: Rig) -> None:
        stream, event = gpu.runtime.create_stream(0), gpu.runtime.create_event(0)
        gpu.pause()
        assert rig.copy(stream) == gpu.runtime.record(event, stream) == gpu.runtime.stream_wait(stream, event) == 0
        gpu.runtime.destroy_event(event)
        gpu.runtime.destroy_stream(stream)
        assert [rig.copy(stream), gpu.runtime.record(event, rig.stream)] == [INVALID_HANDLE] * 2
        gpu.resume()
        gpu.settle()
        assert rig.landed() == b"\x11" * SIZE


class TestFakeChecks:
    def test_devices_events_and_addresses_belong_together(self, gpu: FakeGpu, rig: Rig) -> None:
        foreign = gpu.allocate(1, SIZE)
        copy = gpu.runtime.copy_to_device
        assert copy(foreign, rig.source, SIZE, rig.stream) == INVALID_VALUE
        assert copy(rig.target + 1, rig.source, SIZE, rig.stream) == INVALID_VALUE
        assert copy(rig.source, rig.source, 1, rig.stream) == INVALID_VALUE
        gpu.adopt(0, rig.source, SIZE)
        assert copy(rig.source + 16, rig.source, 16, rig.stream) == 0
        with pytest.raises(ValueError, match="invalid argument"):
            gpu.adopt(1, rig.source + 5, 1)
        gpu.settle()
        gpu.free(foreign)
        gpu.free(rig.source)
        with pytest.raises(ValueError, match="begins at"):
            gpu.free(rig.source)
        with gpu.runtime.using(1):
            assert gpu.runtime.record(rig.event, rig.stream) == 0
        stream = gpu.runtime.create_stream(1)
        assert gpu.runtime.record(rig.event, stream) == INVALID_HANDLE
        assert gpu.runtime.stream_wait(stream, rig.event) == 0
        gpu.runtime.destroy_stream(stream)

    def test_registrations_are_counted_and_refused_when_they_overlap(self, gpu: FakeGpu, rig: Rig) -> None:
        register = gpu.runtime.register
        assert rig.copy() == 0
        assert [register(rig.source, 1024), register(rig.source, 1024), register(rig.source + 1023, 9)] == [0, 712, 712]
        assert [register(rig.source + 1024, 0), register(rig.source + 1024, 1024)] == [INVALID_VALUE, 0]
        assert gpu.runtime.copy_to_device(rig.target, rig.source + 100, 900, rig.stream) == 0
        gpu.settle()
        gpu.runtime.unregister(rig.source)
        with pytest.raises(DeviceError, match=r"HostUnregister failed: \w+HostMemoryNotRegistered \(713\)"):
            gpu.runtime.unregister(rig.source)
        found = gpu.counters()
        assert (found.registrations, found.registered_bytes, found.registered_bytes_peak) == (1, 1024, 2048)
        assert (found.copies, found.unregistered_copies) == (2, 1)
        gpu.fail("HostRegister", OUT_OF_MEMORY, after=1, times=FOREVER)
        codes = [register(rig.source + at, 8) for at in (0, 8, 16)]
        assert codes == [0, OUT_OF_MEMORY, OUT_OF_MEMORY]
        for at in (0, 1024):
            gpu.runtime.unregister(rig.source + at)

    @pytest.mark.parametrize("gone", ["destination", "source"])
    def test_memory_that_is_gone_is_not_written_but_counted(self, library: Path, kind: Kind, gone: str) -> None:
        with FakeGpu(library, kind, check_leaks=False) as gpu:
            rig = Rig(gpu)
            gpu.adopt(0, rig.source, 16)
            assert gpu.runtime.register(rig.source + 16, 16) == 0
            gpu.pause()
            assert gpu.runtime.copy_to_device(rig.source, rig.source + 16, 16, rig.stream) == 0
            ctypes.memset(rig.source + 16, 0x44, 16)
            if gone == "source":
                gpu.runtime.unregister(rig.source + 16)
            else:
                gpu.free(rig.source)
            gpu.resume()
            gpu.settle()
            assert gpu.counters().stray_copies == 1
            assert rig.buffer.raw[:16] == b"\x11" * 16

    def test_failures_come_when_they_were_ordered(self, gpu: FakeGpu, kind: Kind) -> None:
        gpu.fail(f"{kind}SetDevice", 3, after=2, times=2)
        assert [gpu.runtime.set_device(0) for _ in range(5)] == [0, 0, 3, 3, 0]
        assert gpu.calls("SetDevice") == 5
        with pytest.raises(ValueError, match="GetDevices is none"):
            gpu.fail("GetDevices", 3)

    def test_the_last_error_stays_until_it_is_read(self, gpu: FakeGpu, library: Path, kind: Kind) -> None:
        raw = ctypes.CDLL(str(library))
        assert raw[f"{kind}SetDevice"](9) == INVALID_DEVICE
        assert raw[f"{kind}SetDevice"](1) == 0
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(gpu.last_error()))
        thread.start()
        thread.join()
        assert (seen, gpu.last_error()) == ([0], INVALID_DEVICE)
        assert [raw[f"{kind}GetLastError"]() for _ in range(2)] == [INVALID_DEVICE, 0]

    def test_memory_of_a_device_is_limited(self, library: Path, kind: Kind) -> None:
        with FakeGpu(library, kind, memory_bytes=10_000) as gpu:
            address = gpu.allocate(1, 6000)
            assert gpu.runtime.memory_info(0) == (10_000, 10_000)
            assert gpu.runtime.memory_info(1) == (4000, 10_000)
            with pytest.raises(MemoryError, match=r"4001 bytes on device 1: .*out of memory"):
                gpu.allocate(1, 4001)
            gpu.free(address)

    @pytest.mark.parametrize("what", ["streams", "events", "registrations", "allocations", "queued_operations"])
    def test_what_is_left_behind_is_named(self, library: Path, kind: Kind, what: str) -> None:
        buffer = ctypes.create_string_buffer(SIZE)
        leave: dict[str, Callable[[FakeGpu], object]] = {
            "streams": lambda gpu: gpu.runtime.create_stream(1),
            "events": lambda gpu: gpu.runtime.create_event(1),
            "registrations": lambda gpu: gpu.runtime.register(ctypes.addressof(buffer), SIZE),
            "allocations": lambda gpu: gpu.allocate(0, 1),
            "queued_operations": lambda gpu: gpu.fill(0, ctypes.addressof(buffer), 1, 1),
        }
        gpu = FakeGpu(library, kind, strict=False)
        gpu.__enter__()
        gpu.hold(0)
        leave[what](gpu)
        with pytest.raises(AssertionError, match=rf"left behind in the fake GPU: 1 {what}\Z"):
            gpu.__exit__(None, None, None)

    def test_what_is_left_behind_hides_no_other_error(self, library: Path, kind: Kind) -> None:
        with pytest.raises(DeviceError, match="StreamDestroy"), FakeGpu(library, kind) as gpu:
            gpu.runtime.destroy_stream(gpu.runtime.create_stream(0) + 1)
        with FakeGpu(library, kind) as gpu:
            assert gpu.leaks() == {}

    def test_one_session_at_a_time(self, gpu: FakeGpu, library: Path) -> None:
        with pytest.raises(RuntimeError, match="in use already"), FakeGpu(library):
            pass
        assert gpu.runtime.device_count() == 2

    @pytest.mark.parametrize("ends", ["unhang", "session"])
    def test_a_call_hangs_until_it_is_let_go(self, library: Path, kind: Kind, ends: str) -> None:
        codes: list[int] = []
        with FakeGpu(library, kind) as gpu:
            thread = threading.Thread(target=lambda: codes.append(gpu.runtime.register(0, 1)))
            gpu.hang("HostRegister")
            thread.start()
            gpu.wait_for_calls("HostRegister", hanging=1)
            assert codes == []
            if ends == "unhang":
                gpu.unhang("HostRegister")
                thread.join()
        thread.join()
        assert codes == [INVALID_VALUE]


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "weightlift-has-no-such-compiler -O2")
    with pytest.raises(FakeGpuUnavailable, match="needs a C compiler, and there is no 'weightlift-has-no-such-compil"):
        build(tmp_path)


def test_what_the_compiler_says_is_in_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", f"{shlex.quote(sys.executable)} -c 'raise SystemExit(\"no such flag\")'")
    with pytest.raises(RuntimeError, match=r"fake_gpu.c .*failed:\nno such flag"):
        build(tmp_path)
