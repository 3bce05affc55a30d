"""The native engine keeps the guarantees of every engine, and what only compiled code can do."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.device_operations import SlotMemory
from weightlift.engines import native
from weightlift.engines.native import NativeEngine, native_library
from weightlift.engines.probing import run_probes as ask_together
from weightlift.errors import UnsupportedError
from weightlift.host.probes import Probe, run_probes
from weightlift.operations import FailureKind, ReadPath, Sink, Stage
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.testing.bench import FILE_BYTES
from weightlift.testing.conformance import PATIENCE_SECONDS, EngineConformance, stop
from weightlift.testing.device_conformance import DeviceConformance
from weightlift.testing.device_faults import CHUNK, Listener
from weightlift.testing.trace_conformance import TraceConformance
from weightlift.units import KIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from weightlift.device_operations import Devices
    from weightlift.operations import ShardSource
    from weightlift.testing.bench import Bench
    from weightlift.testing.device_bench import DeviceBench


@pytest.mark.native
class TestNativeEngine(TraceConformance, EngineConformance):
    def make_engine(self, shards: Sequence[ShardSource], slots: SlotMemory, worker_room: int) -> NativeEngine:
        library = native_library()
        if isinstance(library, str):
            pytest.skip(library)
        return NativeEngine(shards, slots, worker_room)

    @pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only Linux populates mappings before they are read")
    def test_a_file_that_shrinks_under_its_mapping_is_a_failure(self, bench: Bench) -> None:
        engine = self.start(bench)
        os.truncate(bench.path, FILE_BYTES // 2)
        engine.submit([bench.extent(ReadPath.MAPPED, Sink.DISCARD, FILE_BYTES - 100 * KIB, 100 * KIB)])
        failure = self._failure(engine)
        assert (failure.extent, failure.kind) == (0, FailureKind.END_OF_FILE)

    def test_memory_that_cannot_be_populated_is_a_failure(self, bench: Bench) -> None:
        engine = self.start(bench)
        nowhere = bench.extent(ReadPath.BUFFERED, Sink.PLACE, 0, 64 * KIB, fresh=True)._replace(address=64 * KIB)
        engine.submit([nowhere])
        failure = self._failure(engine)
        assert failure.kind in {FailureKind.MEMORY, FailureKind.READ}
        assert failure.error_number


@pytest.mark.native
class TestNativeEngineOnDevices(DeviceConformance):
    def make_engine(
        self, shards: Sequence[ShardSource], slots: SlotMemory, worker_room: int, devices: Devices
    ) -> NativeEngine:
        library = native_library()
        if isinstance(library, str):
            pytest.skip(library)
        return NativeEngine(shards, slots, worker_room, devices)

    @pytest.mark.parametrize("kind", ["hip"], indirect=True)
    def test_a_hang_is_named_though_the_interpreter_lock_is_held(self, bench: DeviceBench) -> None:
        bench.gpu.hang("MemcpyAsync")
        engine = self.start(bench)
        with Listener() as listener:
            engine.watch(0.02, ["weights"], listener.descriptor)
            engine.submit([bench.whole(0, KIB)])
            bench.gpu.wait_for_calls("MemcpyAsync", hanging=1)
            listener.line()
            # Called this way it keeps the lock until the next line comes, which no thread of Python's could write.
            awaited = _PollDescriptor(listener.reading, select.POLLIN, 0)
            assert ctypes.PyDLL(None).poll(ctypes.byref(awaited), 1, int(1000 * PATIENCE_SECONDS)) == 1
            assert "starting a copy to the device from weights at byte 0" in listener.line()
            bench.gpu.unhang("MemcpyAsync")
            stop(engine)

    # A copy that takes long is asked for at the turn, for a moment without it, at the turn again, and then awaited.
    @pytest.mark.parametrize("earlier", [0, 1, 2])
    def test_no_refusal_to_say_whether_a_copy_has_completed_is_lost(self, bench: DeviceBench, earlier: int) -> None:
        engine, before = self.make(bench), self.FIRST_CALLS + earlier
        bench.gpu.fail("EventQuery", 700, after=before)
        bench.gpu.pause()
        engine.set_limits(1, CHUNK)
        engine.submit([bench.whole(CHUNK, CHUNK)])
        bench.gpu.wait_for_calls("EventQuery", before + 1)
        bench.gpu.resume()
        failure = self.failure(bench, engine)
        assert (failure.kind, failure.error_number, failure.stage) == (FailureKind.DEVICE, 700, Stage.DEVICE_WAIT)
        assert (failure.offset, failure.length) == (CHUNK, CHUNK)


@pytest.mark.needs("preadv", "cachestat")
@pytest.mark.native
def test_many_probes_have_the_answers_of_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1024)
    block = ctypes.create_string_buffer(FILE_BYTES)
    with path.open("rb") as file:
        fd = file.fileno()
        probes = [Probe(fd, KIB * n, KIB, ctypes.addressof(block) + KIB * n) for n in range(300)]
        probes += [Probe(fd, 4 * KIB * n, 4 * KIB) for n in range(64)]
        probes += [Probe(fd, 0, 64 * KIB, ahead=True), Probe(-1, 0, KIB, ahead=True)]
        probes += [Probe(-1, 0, KIB), Probe(-1, 0, KIB, ctypes.addressof(block))]
        answers = ask_together(probes)
        assert answers == run_probes(probes)
        assert answers[:256] == [KIB] * 256
        assert answers[256:300] == [0] * 44
        assert answers[-4:] == [0, -errno.EBADF, -errno.EBADF, -errno.EBADF]
        assert block.raw[: 256 * KIB] == path.read_bytes()
    assert ask_together([]) == []


class _PollDescriptor(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


@pytest.fixture
def forgotten_library() -> Iterator[None]:
    native_library.cache_clear()
    yield
    native_library.cache_clear()


def test_a_library_that_is_not_there_is_said_in_a_sentence(
    forgotten_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WEIGHTLIFT_ENGINE_LIBRARY", str(tmp_path / "engine.so"))
    assert native_library() == "the native engine was not built (engine.so is not there)"
    with pytest.raises(UnsupportedError, match="was not built") as caught:
        NativeEngine([], SlotMemory(0, 0, 0), 1)
    assert "python" in caught.value.hint


def test_a_library_that_does_not_load_is_said_in_a_sentence(
    forgotten_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "engine.so").write_bytes(b"not a library")
    monkeypatch.setenv("WEIGHTLIFT_ENGINE_LIBRARY", str(tmp_path / "engine.so"))
    assert "could not be loaded" in str(native_library())


@pytest.mark.native
def test_a_library_of_another_version_is_refused(forgotten_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ABI", 999)
    assert "another version" in str(native_library())


@pytest.mark.native
def test_a_load_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", [TensorSpec("t", "U8", (9,))])
    program = (
        "import sys, weightlift; weightlift.load(sys.argv[1], framework='numpy'); "
        "print(*(name.removeprefix('weightlift.') for name in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    imported = set(ran.stdout.split())
    assert {"engines.native", "formats.safetensors"} <= imported
    unused = {"engines.python", "formats.gguf", "formats.pytorch", "formats.pickle_reader", "streaming", "modules"}
    assert not unused & imported
