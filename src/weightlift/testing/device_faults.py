"""What engines have to do when devices fail, hang, or are not wanted any more; a part of ``device_conformance``."""

# ruff: noqa: D102, FBT001 - the names of tests say what they show, and their arguments are tables of cases
from __future__ import annotations

import os
import select
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Self

import pytest

from weightlift.operations import Failure, FailureKind, ReadPath, Sink, Stage
from weightlift.testing.bench import Landing, threads_now
from weightlift.testing.conformance import PATIENCE_SECONDS, run_to_end, stop, wait_for
from weightlift.testing.device_bench import DEVICES, DeviceBench, HookedRuntime, fake_library
from weightlift.testing.fake_gpu import FOREVER, FakeGpu, FakeGpuUnavailable
from weightlift.units import KIB

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from weightlift.device_operations import Devices, SlotMemory
    from weightlift.host.gpu import Kind
    from weightlift.operations import Activity, Engine, ShardSource

CHUNK: Final = 64 * KIB
_CODE: Final = 700
_WATCH_SECONDS: Final = 0.02


class DeviceFaults(ABC):
    """Engines on devices that do not do what they should."""

    WORKER_ROOM: Final = 4
    FIRST_CALLS: Final = WORKER_ROOM * DEVICES

    @abstractmethod
    def make_engine(
        self, shards: Sequence[ShardSource], slots: SlotMemory, worker_room: int, devices: Devices
    ) -> Engine:
        """A new engine."""

    def calls_with_the_interpreter_lock(self, kind: Kind) -> Collection[str]:  # noqa: ARG002 - for those that have some
        """The functions of a runtime that the engine's workers call with the interpreter lock held."""
        return ()

    @pytest.fixture(params=["cuda", "hip"])
    def kind(self, request: pytest.FixtureRequest) -> Kind:
        chosen: Kind = request.param
        return chosen

    @pytest.fixture
    def bench(self, kind: Kind, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceBench]:
        """A file of known contents, two fake devices, and slots in between."""
        try:
            library = fake_library(tmp_path_factory.getbasetemp())
        except FakeGpuUnavailable as err:
            pytest.skip(str(err))
        threads = threads_now()
        with FakeGpu(library, kind, devices=DEVICES, seed=7, delay_seconds=(0.0, 0.0002)) as gpu:
            with DeviceBench(tmp_path, gpu) as bench:
                yield bench
            assert gpu.last_error() == 0, "an error was left behind on the caller's thread"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while threads_now() > threads:
            assert time.monotonic() < deadline, f"{threads_now() - threads} threads were left behind"

    def make(self, bench: DeviceBench, *, slots: int = 4, chunk_bytes: int = CHUNK, streams: int = 1) -> Engine:
        """An engine over the bench's file and devices that has no threads yet."""
        devices = bench.devices(slots, streams=streams)
        return self.make_engine([bench.files.source], bench.slots(slots, chunk_bytes), self.WORKER_ROOM, devices)

    def start(
        self, bench: DeviceBench, *, slots: int = 4, workers: int = 3, chunk_bytes: int = CHUNK, streams: int = 1
    ) -> Engine:
        """An engine over the bench's file and devices, ready for extents."""
        engine = self.make(bench, slots=slots, chunk_bytes=chunk_bytes, streams=streams)
        engine.set_limits(workers, chunk_bytes)
        return engine

    def failure(self, bench: DeviceBench, engine: Engine) -> Failure:
        """The failure that an engine tells; afterwards every worker leaves, and no copy is under way."""
        events = wait_for(engine, 1, Failure)
        assert engine.join(PATIENCE_SECONDS) == 0
        bench.check_idle()
        failures = [event for event in events + engine.poll(0) if isinstance(event, Failure)]
        assert len(failures) == 1, events
        assert (engine.counters().running, engine.activity()) == (0, [])
        stop(engine)
        return failures[0]

    @pytest.mark.parametrize(
        ("function", "after", "stage"),
        [
            ("SetDevice", FIRST_CALLS, Stage.DEVICE_COPY),
            ("StreamWaitEvent", 0, Stage.DEVICE_COPY),
            ("MemcpyAsync", 0, Stage.DEVICE_COPY),
            # In the middle of a chunk, whose other copies have to be waited for.
            ("MemcpyAsync", 22, Stage.DEVICE_COPY),
            ("EventRecord", 1, Stage.DEVICE_COPY),
            # The first that asks for a copy, one of those that ask for a moment, and one between pauses.
            ("EventQuery", FIRST_CALLS, Stage.DEVICE_WAIT),
            ("EventQuery", FIRST_CALLS + 3, Stage.DEVICE_WAIT),
            ("EventQuery", FIRST_CALLS + 2000, Stage.DEVICE_WAIT),
        ],
    )
    @pytest.mark.parametrize("workers", [1, 4])
    def test_a_call_that_fails_is_told_once_with_its_stage(
        self, bench: DeviceBench, workers: int, function: str, after: int, stage: Stage
    ) -> None:
        engine, ready = self.make(bench, slots=8), (bench.event(bench.ordinal(0)), 0)
        bench.gpu.fail(function, _CODE, after=after)
        engine.set_limits(workers, CHUNK)
        extents = [
            bench.extent(ReadPath.BUFFERED, index * 10 * CHUNK, 10 * CHUNK, index % 2, ready=ready[index % 2])
            for index in range(4)
        ]
        bench.gpu.pause()
        engine.submit(extents)
        if function == "EventQuery":
            # A copy that lands at once is not asked for often.
            bench.gpu.wait_for_calls(function, after + 1)
        bench.gpu.resume()
        failure = self.failure(bench, engine)
        assert (failure.kind, failure.error_number, failure.stage) == (FailureKind.DEVICE, _CODE, stage)
        extent = extents[failure.extent]
        assert extent.offset <= failure.offset < extent.offset + extent.length
        assert 0 < failure.length <= CHUNK
        assert failure.cause is None

    @pytest.mark.parametrize(
        ("function", "after"),
        [("MemcpyAsync", 3), ("EventRecord", 3), ("EventQuery", FIRST_CALLS), ("EventQuery", FIRST_CALLS + 2000)],
    )
    def test_a_runtime_that_is_broken_for_good_lets_everybody_leave(
        self, bench: DeviceBench, function: str, after: int
    ) -> None:
        engine = self.make(bench, slots=8)
        bench.gpu.fail(function, _CODE, after=after, times=FOREVER)
        engine.set_limits(3, CHUNK)
        bench.gpu.pause()
        engine.submit([bench.whole(0, 30 * CHUNK)])
        bench.gpu.wait_for_calls(function, after + 1)
        if function == "EventQuery":
            # What will not tell can still be waited with; nobody leaves while copies may use the memory.
            bench.gpu.wait_for_calls("EventSynchronize", 1)
            assert engine.join(0.05) > 0
        bench.gpu.resume()
        assert any(isinstance(event, Failure) for event in wait_for(engine, 1, Failure))
        bench.gpu.settle()
        stop(engine)

    @pytest.mark.parametrize(
        ("function", "stage"), [("SetDevice", Stage.DEVICE_COPY), ("EventQuery", Stage.DEVICE_WAIT)]
    )
    def test_a_first_call_that_fails_is_told_with_the_first_chunk(
        self, bench: DeviceBench, function: str, stage: Stage
    ) -> None:
        engine = self.make(bench)
        bench.gpu.fail(function, _CODE, after=1)
        engine.set_limits(3, CHUNK)
        engine.submit([bench.whole(CHUNK, 3 * CHUNK)])
        failure = self.failure(bench, engine)
        assert (failure.kind, failure.error_number, failure.stage) == (FailureKind.DEVICE, _CODE, stage)
        assert failure.extent == 0
        assert bench.gpu.calls("MemcpyAsync") == 0

    def test_slots_that_cannot_be_registered_are_used_as_they_are(self, bench: DeviceBench) -> None:
        bench.gpu.fail("HostRegister", 2, after=1, times=FOREVER)
        engine = self.start(bench, slots=3)
        bench.gpu.pause()
        engine.submit([bench.whole(0, 9 * CHUNK)])
        bench.gpu.wait_for_calls("EventRecord", 3)
        bench.gpu.resume()
        run_to_end(engine, 1, Landing(bench.files.contents))
        stop(engine)
        bench.check_memory()
        assert bench.gpu.calls("HostRegister") == 3, "a refused slot is not tried again"
        assert bench.gpu.calls("GetLastError") >= 2
        counters = bench.gpu.counters()
        assert 0 < counters.unregistered_copies < counters.copies
        assert counters.registrations == 1

    def test_nothing_is_read_before_every_worker_has_called_every_device(self, bench: DeviceBench) -> None:
        late, lock, seen = threading.Event(), threading.Lock(), set[int]()

        def hold_back() -> None:
            with lock:
                seen.add(threading.get_native_id())
                last = len(seen) == self.WORKER_ROOM
            if last:
                late.wait(PATIENCE_SECONDS)

        bench.runtime = HookedRuntime(bench.gpu.runtime, before_set_device=hold_back)
        engine = self.start(bench, workers=1)
        engine.submit([bench.whole(0, 3 * CHUNK)])
        bench.gpu.wait_for_calls("EventQuery", self.FIRST_CALLS - DEVICES)
        assert engine.poll(0.05) == []
        assert engine.counters().claimed_bytes == 0
        (doing,) = engine.activity()
        assert (doing.shard, doing.length, doing.stage) == (0, 0, Stage.DEVICE_COPY)
        late.set()
        run_to_end(engine, 1, Landing(bench.files.contents))
        assert len(seen) == self.WORKER_ROOM
        stop(engine)
        bench.check_memory()

    @pytest.mark.parametrize("lane", [False, True])
    def test_workers_leave_only_when_their_copies_have_completed(self, bench: DeviceBench, lane: bool) -> None:
        engine = self.start(bench, slots=3)
        bench.gpu.pause()
        engine.submit([bench.whole(0, 30 * CHUNK, lane=lane)])
        bench.gpu.wait_for_calls("EventRecord", 3)
        engine.cancel()
        assert engine.join(0.05) > 0, "copies are under way"
        bench.gpu.resume()
        assert engine.join(PATIENCE_SECONDS) == 0
        bench.check_idle()
        assert engine.counters().claimed_bytes == engine.counters().landed_bytes == 3 * CHUNK
        assert engine.poll(0) == []
        stop(engine)

    def test_a_failure_waits_for_the_copies_of_other_workers(self, bench: DeviceBench) -> None:
        engine = self.start(bench, slots=3)
        bench.gpu.pause()
        bench.gpu.fail("MemcpyAsync", _CODE, after=2)
        engine.submit([bench.whole(0, 30 * CHUNK)])
        (failure,) = (event for event in wait_for(engine, 1, Failure) if isinstance(event, Failure))
        assert failure.stage is Stage.DEVICE_COPY
        assert engine.join(0.05) > 0, "copies are under way"
        bench.gpu.resume()
        assert engine.join(PATIENCE_SECONDS) == 0
        bench.check_idle()
        stop(engine)

    @pytest.mark.parametrize(
        ("function", "stage", "said"),
        [
            ("HostRegister", Stage.REGISTERING, "pinning memory for"),
            ("MemcpyAsync", Stage.DEVICE_COPY, "starting a copy to the device from"),
            ("EventQuery", Stage.DEVICE_WAIT, "waiting for the device with"),
            ("SetDevice", Stage.DEVICE_COPY, "starting a copy to the device from"),
        ],
    )
    def test_a_call_that_hangs_is_named(
        self, bench: DeviceBench, kind: Kind, function: str, stage: Stage, said: str
    ) -> None:
        if function in self.calls_with_the_interpreter_lock(kind):
            pytest.skip(
                f"this engine calls {kind}{function} with the interpreter lock held, so nothing in Python could go on"
            )
        engine = self.make(bench)
        # A copy that lands at once is not waited for.
        bench.gpu.pause()
        if function == "EventQuery":
            engine.set_limits(1, CHUNK)
            bench.gpu.wait_for_calls(function, self.FIRST_CALLS)
        bench.gpu.hang(function)
        engine.set_limits(1, CHUNK)
        with Listener() as listener:
            engine.watch(_WATCH_SECONDS, ["weights of the\nmodel"], listener.descriptor)
            engine.submit([bench.whole(CHUNK, CHUNK + 11)])
            bench.gpu.wait_for_calls(function, hanging=1)
            first, second = listener.line(), listener.line()
            doing = _settled_activity(engine, stage)
            if function != "SetDevice":
                assert (doing.shard, doing.stage) == (0, stage)
                assert (doing.offset, doing.length) in {(CHUNK, CHUNK), (2 * CHUNK, 11)}
            bench.gpu.unhang(function)
            bench.gpu.resume()
            run_to_end(engine, 1, Landing(bench.files.contents))
            stop(engine)
        bench.check_memory()
        for line in (first, second):
            assert line.startswith("weightlift: nothing has landed for ")
            assert f" {CHUNK + 11} bytes are outstanding: worker " in line
            assert f"{said} weights of the\\nmodel at byte " in line
        assert _seconds(second) >= 2 * _seconds(first) - 0.1, "a line for each doubling of the time"

    def test_a_program_that_asks_for_no_news_is_named(self, bench: DeviceBench) -> None:
        engine = self.start(bench, slots=1)
        with Listener() as listener:
            engine.watch(_WATCH_SECONDS, ["weights"], listener.descriptor)
            engine.submit([bench.files.extent(ReadPath.BUFFERED, Sink.HAND_OVER, 0, 2 * CHUNK)])
            assert "the program has not asked for news for " in listener.line()
            landing = Landing(bench.files.contents)
            run_to_end(engine, 1, landing)
            stop(engine)


class Listener:
    """Reads what is written to a descriptor, line by line; closed with its ``with`` block."""

    def __init__(self) -> None:
        self.reading, self.descriptor = os.pipe()
        self._text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reading)
        os.close(self.descriptor)

    def line(self) -> str:
        """The next line."""
        while "\n" not in self._text:
            ready, _, _ = select.select([self.reading], [], [], PATIENCE_SECONDS)
            assert ready, f"nothing was said in {PATIENCE_SECONDS} s"
            self._text += os.read(self.reading, 1 << 16).decode()
        line, self._text = self._text.split("\n", 1)
        return line


def _settled_activity(engine: Engine, stage: Stage) -> Activity:
    """What a busy worker is doing, in a certain stage."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        for doing in engine.activity():
            if doing.stage is stage:
                return doing
        assert time.monotonic() < deadline, engine.activity()


def _seconds(line: str) -> float:
    return float(line.split(" for ", 1)[1].split(" s", 1)[0])
