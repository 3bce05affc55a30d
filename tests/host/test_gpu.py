"""The shim over a GPU runtime answers engines with codes and owners with errors, under CUDA's names and under HIP's."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.errors import DeviceError, UnsupportedError
from weightlift.host.gpu import CALLS, GpuRuntime, find_runtime
from weightlift.testing.fake_gpu import FakeGpu, FakeGpuUnavailable, build

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weightlift.device_operations import Runtime
    from weightlift.host.gpu import Kind

SIZE = 4096
INVALID_VALUE, OUT_OF_MEMORY, NOT_READY = 1, 2, 600


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


@pytest.fixture
def runtime(gpu: FakeGpu) -> GpuRuntime:
    return gpu.runtime


class Rig:
    """Host memory, device memory, a stream and an event of device 0, given back in the end."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.buffer = ctypes.create_string_buffer(SIZE)
        self.source, self.target = ctypes.addressof(self.buffer), gpu.allocate(0, SIZE)
        self.stream, self.event = gpu.runtime.create_stream(0), gpu.runtime.create_event(0)

    def copy(self) -> int:
        return self.gpu.runtime.copy_to_device(self.target, self.source, SIZE, self.stream)

    def close(self) -> None:
        self.gpu.release(self.stream)  # after a test that failed half way
        self.gpu.runtime.synchronize_stream(self.stream)
        self.gpu.runtime.destroy_stream(self.stream)
        self.gpu.runtime.destroy_event(self.event)
        self.gpu.free(self.target)


@pytest.fixture
def rig(gpu: FakeGpu) -> Iterator[Rig]:
    made = Rig(gpu)
    yield made
    made.close()


def code_of(call: Callable[..., int | None], *arguments: object) -> int:
    try:
        return call(*arguments) or 0
    except DeviceError as err:
        return err.code


def as_protocol(runtime: GpuRuntime) -> Runtime:
    """The shim satisfies the engines' protocol: checked by the type checker."""
    return runtime


def last_error_is_read_away(gpu: FakeGpu, function: str, call: Callable[..., Any], *arguments: object) -> None:
    gpu.fail(function, OUT_OF_MEMORY)
    assert code_of(call, *arguments) == OUT_OF_MEMORY
    assert gpu.last_error() == 0
    assert gpu.calls("GetLastError") == 1


class TestRuntime:
    @pytest.mark.parametrize(
        ("function", "method", "arguments"),
        [
            ("SetDevice", "set_device", [1]),
            ("MemcpyAsync", "copy_to_device", [1, 1, 1, 0]),
            ("EventRecord", "record", [1, 0]),
            ("EventQuery", "query", [1]),
            ("EventSynchronize", "wait", [1]),
            ("StreamWaitEvent", "stream_wait", [0, 1]),
            ("HostRegister", "register", [4096, 4096]),
        ],
    )
    def test_engines_get_codes_and_the_framework_finds_no_error(
        self, gpu: FakeGpu, function: str, method: str, arguments: list[int]
    ) -> None:
        last_error_is_read_away(gpu, function, getattr(as_protocol(gpu.runtime), method), *arguments)

    @pytest.mark.parametrize(
        ("function", "method", "arguments"),
        [
            ("GetDeviceCount", "device_count", []),
            ("GetDevice", "current_device", []),
            ("SetDevice", "create_stream", [1]),
            ("StreamCreateWithFlags", "create_stream", [1]),
            ("StreamDestroy", "destroy_stream", [16]),
            ("StreamSynchronize", "synchronize_stream", [16]),
            ("EventCreateWithFlags", "create_event", [1]),
            ("EventDestroy", "destroy_event", [16]),
            ("HostUnregister", "unregister", [4096]),
            ("MemGetInfo", "memory_info", [1]),
            ("DeviceGetPCIBusId", "pci_bus_id", [1]),
            ("RuntimeGetVersion", "runtime_version", []),
        ],
    )
    def test_owners_get_a_named_error_and_the_framework_none(
        self, gpu: FakeGpu, kind: Kind, function: str, method: str, arguments: list[int]
    ) -> None:
        call = getattr(gpu.runtime, method)
        last_error_is_read_away(gpu, function, call, *arguments)
        gpu.fail(function, OUT_OF_MEMORY)
        with pytest.raises(
            DeviceError, match=rf"\A{kind}{function}.* failed: \w+ \(2\): out of memory\nhint: "
        ) as caught:
            call(*arguments)
        assert caught.value.call.startswith(f"{kind}{function}")
        assert caught.value.name == {"cuda": "cudaErrorMemoryAllocation", "hip": "hipErrorOutOfMemory"}[kind]
        assert gpu.runtime.current_device() == 0

    def test_not_ready_is_no_error_to_leave_behind(self, gpu: FakeGpu, rig: Rig) -> None:
        gpu.hold(rig.stream)
        assert gpu.runtime.record(rig.event, rig.stream) == 0
        assert (gpu.runtime.query(rig.event), gpu.last_error()) == (gpu.runtime.not_ready, 0)
        gpu.release(rig.stream)

    def test_errors_have_the_runtimes_own_names(self, runtime: GpuRuntime, kind: Kind) -> None:
        assert runtime.error_text(NOT_READY) == f"{kind}ErrorNotReady (600): device not ready"
        assert runtime.error_text(12345) == "unrecognized error code (12345)"
        runtime.check(0, "anything")
        with pytest.raises(DeviceError, match=r"copying failed: .*InvalidValue") as caught:
            runtime.check(INVALID_VALUE, "copying")
        assert (caught.value.code, caught.value.call) == (INVALID_VALUE, "copying")

    def test_without_devices_the_error_says_so(self, library: Path, kind: Kind) -> None:
        with FakeGpu(library, kind, devices=0) as gpu, pytest.raises(DeviceError, match="ErrorNoDevice") as caught:
            gpu.runtime.device_count()
        assert "CUDA_VISIBLE_DEVICES" in caught.value.hint

    def test_facts_of_devices(self, gpu: FakeGpu, kind: Kind) -> None:
        assert gpu.runtime.device_count() == 2
        assert gpu.runtime.pci_bus_id(1) == "0000:a1:00.0"
        assert gpu.runtime.runtime_version() == {"cuda": "12.4", "hip": "6.2.41134"}[kind]
        assert (gpu.runtime.kind, gpu.runtime.path) == (kind, str(gpu.library))

    def test_streams_do_not_block_and_events_keep_no_time(self, gpu: FakeGpu, rig: Rig) -> None:
        assert gpu.runtime.register(rig.source, SIZE) == 0
        assert [gpu.flags(handle) for handle in (rig.stream, rig.event, rig.source)] == [1, 2, 1]
        gpu.runtime.unregister(rig.source)

    def test_the_current_device_is_restored_on_its_thread(self, gpu: FakeGpu, runtime: GpuRuntime) -> None:
        with runtime.using(0):
            assert gpu.calls("SetDevice") == 0  # naming a device is not free
        assert runtime.set_device(1) == 0
        with runtime.using(0):
            assert runtime.current_device() == 0
        with pytest.raises(DeviceError), runtime.using(0):
            runtime.check(INVALID_VALUE, "anything")
        assert runtime.current_device() == 1
        with pytest.raises(DeviceError, match=r"SetDevice\(7\) failed: .*InvalidDevice \(101\)"):
            runtime.create_event(7)
        barrier, seen = threading.Barrier(2), {}

        def work(ordinal: int) -> None:
            assert runtime.set_device(ordinal) == 0
            barrier.wait()
            stream = runtime.create_stream(1 - ordinal)
            barrier.wait()
            seen[ordinal] = runtime.current_device()
            runtime.destroy_stream(stream)

        threads = [threading.Thread(target=work, args=(ordinal,)) for ordinal in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == {0: 0, 1: 1}
        assert runtime.current_device() == 1

    def test_the_interpreter_lock_is_kept_only_where_nothing_waits(self, gpu: FakeGpu, rig: Rig, kind: Kind) -> None:
        if not gpu.sees_interpreter_lock():
            pytest.skip("this build of Python does not export PyGILState_Check")
        runtime = gpu.runtime
        assert rig.copy() == 0
        gpu.settle()
        assert runtime.register(rig.source, SIZE - 1) == runtime.set_device(0) == 0
        assert rig.copy() == 0
        gpu.settle()
        assert (gpu.calls("MemcpyAsync"), gpu.locked_calls("MemcpyAsync")) == (2, 0)
        runtime.unregister(rig.source)
        assert runtime.register(rig.source, SIZE) == 0
        assert rig.copy() == runtime.record(rig.event, rig.stream) == runtime.stream_wait(rig.stream, rig.event) == 0
        assert runtime.copy_to_device(rig.target, rig.source + SIZE, 0, rig.stream) == 0
        runtime.wait(rig.event)
        runtime.query(rig.event)
        gpu.settle()
        runtime.unregister(rig.source)
        assert rig.copy() == 0
        quick = {"SetDevice": 1, "MemcpyAsync": 2, "EventRecord": 1, "EventQuery": 1, "StreamWaitEvent": 1}
        made_by_the_rig = {"create_stream", "create_event"}
        names = [
            call.cuda.removeprefix("cuda")
            for role, call in CALLS.items()
            if not call.cuda.startswith("cudaGet") and role not in made_by_the_rig
        ]
        locked = {name: gpu.locked_calls(name) for name in names if gpu.locked_calls(name)}
        assert locked == (quick if kind == "cuda" else {})

    def test_the_native_engine_gets_its_eight_functions(self, gpu: FakeGpu, kind: Kind) -> None:
        table: array[int] = gpu.runtime.function_table()
        loaded = ctypes.CDLL(str(gpu.library))
        names = (
            *("SetDevice", "MemcpyAsync", "EventRecord", "EventQuery", "EventSynchronize", "StreamWaitEvent"),
            *("HostRegister", "GetLastError"),
        )
        assert list(table) == [ctypes.cast(loaded[kind + name], ctypes.c_void_p).value for name in names]


class TestFindRuntime:
    def test_an_injected_library_is_loaded_once(self, library: Path, kind: Kind) -> None:
        found = find_runtime(kind, str(library))
        assert isinstance(found, GpuRuntime)
        assert (found.kind, find_runtime(kind, str(library))) == (kind, found)

    def test_a_library_is_not_loaded_unless_told_to(self, library: Path, kind: Kind, tmp_path: Path) -> None:
        copy = tmp_path / "copy.so"
        copy.write_bytes(library.read_bytes())
        with pytest.raises(UnsupportedError, match="could not be loaded"):
            GpuRuntime(kind, str(copy))

    def test_why_there_is_none_is_said(self, kind: Kind, tmp_path: Path) -> None:
        missing = str(tmp_path / "missing.so")
        assert f"runtime {missing} could not be loaded: " in str(find_runtime(kind, missing))
        assert f"it lacks {kind}SetDevice, {kind}MemcpyAsync, " in str(find_runtime(kind, "libc.so.6"))

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell which libraries are loaded")
    def test_only_what_the_process_has_loaded_is_found(self, library: Path, tmp_path: Path) -> None:
        folder = tmp_path / "with a space"
        folder.mkdir()
        names = ("libcudart.so.12", "libcudart-a1b2.so.11.0", "libamdhip64.so.6.2.41134", "libamdhip64-0f.so", "hip.so")
        for name in names:
            (folder / name).write_bytes(library.read_bytes())
        done = run_script(
            """
            import ctypes, os
            folder, *names = sys.argv[1:]
            def show(kind):
                found = find_runtime(kind)
                print(found.replace(folder, "") if isinstance(found, str) else os.path.basename(found.path))
            ctypes.CDLL(os.path.join(folder, names[4]))
            show("cuda"), show("hip")
            for name, kind in zip(names, ("cuda", "cuda", "hip", "hip")):
                ctypes.CDLL(os.path.join(folder, name))
                os.unlink(os.path.join(folder, name))
                show(kind)
            """,
            str(folder),
            *names,
        )
        # What was found once stays, since the framework that has loaded it does.
        assert done == [
            "no CUDA runtime (libcudart) is loaded in this process",
            "no HIP runtime (libamdhip64) is loaded in this process",
            "libcudart.so.12",
            "libcudart.so.12",
            "libamdhip64.so.6.2.41134",
            "libamdhip64.so.6.2.41134",
        ]

    def test_copies_of_a_runtime_that_were_loaded_before_the_first_question(
        self, library: Path, tmp_path: Path
    ) -> None:
        names = ("libcudart.so.12", "libcudart-a1b2.so.11.0", "libamdhip64.so.6.2.41134", "libamdhip64-0f.so")
        for name in names:
            (tmp_path / name).write_bytes(library.read_bytes())
        done = run_script(
            """
            import ctypes, os
            folder, *names = sys.argv[1:]
            for name in names:
                ctypes.CDLL(os.path.join(folder, name))
            print(os.path.basename(find_runtime("cuda").path))
            print(find_runtime("hip"))
            """,
            str(tmp_path),
            *names,
        )
        assert done[0] in names[:2]
        assert done[1].startswith("several HIP runtimes are loaded (/")

    @pytest.mark.parametrize("platform", ["darwin", "win32"])
    def test_other_systems_get_a_sentence(self, platform: str) -> None:
        sentence = run_script("print(find_runtime('cuda'))", before=f"sys.platform = {platform!r}; del os.RTLD_NOLOAD")
        assert "CUDA runtime" in sentence[0]


def run_script(script: str, *arguments: str, before: str = "") -> list[str]:
    imports = f"import os, sys\n{before}\nfrom weightlift.host.gpu import find_runtime\n"
    command = [sys.executable, "-c", imports + textwrap.dedent(script), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=100).stdout.splitlines()
