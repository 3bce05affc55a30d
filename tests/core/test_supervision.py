"""What a load does when memory gets short, and that it is watched: whole loads on made-up figures."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

import weightlift as wl
from weightlift import care, monitor
from weightlift.buffers import SlotPool
from weightlift.engines.python import PythonEngine
from weightlift.engines.tuner import Setting
from weightlift.errors import InsufficientMemoryError, OptionError
from weightlift.host import residency, sweeping
from weightlift.host.gauges import HostFigures
from weightlift.host.memory import ProcessMemory, process_memory
from weightlift.options import LoadOptions
from weightlift.staging import plan_pool
from weightlift.supervision import Supervisor
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
SPECS: Final = [TensorSpec(f"layers.{number}", "U8", (4 * MIB,)) for number in range(8)]
TOTAL: Final = 512 * MIB


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Have every load see a group with so much memory left, without and with what could still be taken back."""

    def set_left(available: int, last_resort: int) -> None:
        figures = HostFigures(ProcessMemory(0, 0, 0), available, last_resort, TOTAL, "/group", 0, 0, None, None, None)

        class Gauges:
            def read(self, **_: Any) -> HostFigures:
                return figures

        monkeypatch.setattr(monitor, "HostGauges", Gauges)

    return set_left


@pytest.mark.parametrize("engine", ENGINES)
def test_under_the_floor_less_is_in_flight_and_the_cache_is_emptied(
    tmp_path: Path, left: Callable[[int, int], None], engine: str
) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        sweeping.sweep(file.fileno(), [(0, path.stat().st_size)])
        left(20 * MIB, 400 * MIB)
        report = wl.load(
            path, device="null", method="buffered", cache="keep", engine=engine, workers=4, chunk_bytes=MIB
        ).report
        cached = residency.residency(file.fileno(), path.stat().st_size)
    first = report.interventions[0]
    assert first.action == "dropped the page cache of what was read and 2 workers × 1024 KiB"
    assert "20.0 MiB of memory are left, with a floor of 32.0 MiB" in first.reason
    assert report.cache_decided == "drop"
    assert "memory got short" in report.reason
    if report.page_cache_before_bytes == 0:
        assert cached == 0
    assert report.to_json()["interventions"][0]["action"] == first.action


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", ["cpu", "null"])
def test_at_the_end_of_memory_the_load_ends_with_the_numbers(
    tmp_path: Path, left: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch, device: str, engine: str
) -> None:
    monkeypatch.setattr(care, "PATIENCE_SECONDS", 0.0)
    path = write_checkpoint(tmp_path / "model.safetensors", [TensorSpec("x", "U8", (1 << 30,))], sparse=True)
    left(MIB, 2 * MIB)
    with nothing_left_behind(tmp_path), pytest.raises(InsufficientMemoryError) as caught:
        # One worker with small chunks: the load cannot be over before it is looked at.
        wl.load(path, device=device, framework="numpy", engine=engine, workers=1, chunk_bytes=64 * KIB)
    assert "1.00 MiB of memory are left, with a floor of 32.0 MiB" in caught.value.message
    assert caught.value.hint


@pytest.mark.needs("proc")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_look_that_comes_late_does_no_harm(tmp_path: Path, left: Callable[[int, int], None], engine: str) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", [TensorSpec("x", "U8", (1 << 28,))], sparse=True)
    left(100 * MIB, 100 * MIB)
    recording = wl.Recording()
    reached: list[int] = []

    def keep_busy(done: int, total: int) -> None:
        # As long as nobody looks, the workers may take half of what was left at the last look.
        if not reached:
            held = -1
            while held != memory_of_tensors():
                held = memory_of_tensors()
                select.select([], [], [], 0.1)
            reached.append(held)

    def memory_of_tensors() -> int:
        memory = process_memory()
        assert memory is not None
        return memory.anonymous_bytes - start

    before = process_memory()
    assert before is not None
    start = before.anonymous_bytes
    wl.load(path, framework="numpy", engine=engine, recording=recording, progress=keep_busy, chunk_bytes=MIB)
    assert 30 * MIB < reached[0] < 110 * MIB


def test_a_stream_says_when_the_program_is_what_takes_long(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS[:3])
    work = bytes(64 * MIB)
    stream = wl.stream(path, framework="numpy")
    for _ in stream:
        hashlib.sha256(work).digest()
    assert stream.report is not None
    assert stream.report.bottleneck == "consumer"
    assert (stream.report.consumer_seconds or 0) > 0
    assert stream.report.to_json()["consumer_seconds"] == stream.report.consumer_seconds


def test_a_stream_that_is_waited_for_names_what_holds_it_up(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    stream = wl.stream(path, framework="numpy")
    assert len(list(stream)) == len(SPECS)
    assert stream.report is not None
    assert stream.report.bottleneck in {"storage", "memory copy"}


def test_hashing_what_is_read_is_the_processors_work(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    report = wl.load(path, device="null").report
    assert set(report.worker_seconds) > {"storage", "page cache", "waiting for a slot"}
    assert sum(report.worker_seconds.values()) > 0


@contextlib.contextmanager
def standard_error() -> Iterator[int]:
    """The standard error stream of the process, as a pipe's other end."""
    ours, theirs = os.pipe()
    before = os.dup(2)
    os.dup2(theirs, 2)
    os.close(theirs)
    try:
        yield ours
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(ours)


@pytest.mark.parametrize("engine", ENGINES)
def test_host_loads_are_watched_too(tmp_path: Path, engine: str) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    said: list[bytes] = []
    with standard_error() as stream:

        def hold_up(done: int, total: int) -> None:
            # While this callback waits, nobody takes in what was read, and the slots run out.
            if not said and select.select([stream], [], [], 20)[0]:
                said.append(os.read(stream, 4096))

        wl.load(
            path,
            device="null",
            digest=True,
            engine=engine,
            watch_seconds=0.05,
            progress=hold_up,
            host_memory="8MiB",
        )
    assert said[0].startswith(b"weightlift: nothing has landed for 0.")
    assert b"the program has not asked for news" in said[0]


def test_watching_is_on_by_default_and_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LoadOptions().watch_seconds == 30
    monkeypatch.setenv("WEIGHTLIFT_WATCH", "0")
    assert LoadOptions().watch_seconds == 0
    for wrong in (-1, "soon", 1e9, float("nan")):
        with pytest.raises(OptionError, match="watch_seconds"):
            LoadOptions(watch_seconds=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "count"), [("mmap", 0), ("buffered", 1)])
def test_what_reads_nothing_is_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, count: int
) -> None:
    """Watching takes a thread, whose end a small load would wait for."""
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS[:1])
    watched: list[float] = []
    watch = PythonEngine.watch

    def note(engine: PythonEngine, seconds: float, *more: Any) -> None:
        watched.append(seconds)
        watch(engine, seconds, *more)

    monkeypatch.setattr(PythonEngine, "watch", note)
    state = wl.load(path, method=method, engine="python")
    assert len(state) == 1
    assert watched == [30] * count


def test_tuning_begins_anew_where_it_began() -> None:
    with contextlib.closing(PythonEngine([], SlotPool(1, 4 * KIB).memory, 64)) as engine:
        supervisor = Supervisor(LoadOptions(), time.monotonic(), lambda: None)
        pool = plan_pool((), budget_bytes=128 * MIB, processors=4, workers=None, chunk_bytes=None, open_ended=True)
        supervisor.begin(engine, pool, 8 * MIB)
        supervisor._tuner.setting = Setting(pool.workers + 1, pool.chunk_bytes // 2)
        engine.set_limits(pool.workers + 1, pool.chunk_bytes // 2)
        supervisor.tune_anew()
        assert supervisor.chunk_bytes == pool.chunk_bytes
        assert engine.counters().workers == pool.workers
        engine.cancel()
        assert engine.join(10.0) == 0


@pytest.mark.parametrize("left", [True, False])
def test_concurrency_that_is_left_alone_stays_as_it_is(*, left: bool) -> None:
    with contextlib.closing(PythonEngine([], SlotPool(1, 4 * KIB).memory, 64)) as engine:
        supervisor = Supervisor(LoadOptions(), time.monotonic(), lambda: None)
        pool = plan_pool((), budget_bytes=128 * MIB, processors=4, workers=None, chunk_bytes=None, open_ended=True)
        supervisor.begin(engine, pool, 64 * GIB)
        if left:
            supervisor.leave_concurrency()
        changes = [supervisor._tuner.observe(0.1 * n, 100 * MIB * n) for n in range(1, 50)]
        assert any(changes) is not left
        engine.cancel()
        assert engine.join(10.0) == 0
