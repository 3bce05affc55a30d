"""Whole loads onto fake devices: what is delivered, and what happens when the devices do not play along."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

import weightlift as wl
from weightlift import keeping, pipeline, streaming
from weightlift.errors import DeviceError, SelectionError
from weightlift.formats import describe
from weightlift.loading import transfer_rows
from weightlift.options import LoadOptions
from weightlift.plan import CacheDecision
from weightlift.targets.access import gpu_access
from weightlift.targets.device import ReadyEvents
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.module import ModuleTarget
from weightlift.testing import TensorSpec, every_dtype_specs, exl2_specs, tensor_bytes, write_checkpoint
from weightlift.testing.fake_devices import FakeMemory
from weightlift.testing.leaks import nothing_left_behind
from weightlift.types import Framework
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.testing.fake_devices import FakeDevices
    from weightlift.testing.fake_gpu import FakeGpu

ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
SPECS = [
    *every_dtype_specs(),
    TensorSpec("model.layers.0.large", "F32", (513, 1025)),
    TensorSpec("model.layers.1.huge", "BF16", (3000, 2001)),
    TensorSpec("model.bytes", "U8", (77_777,)),
]


def stored_bytes(tensor: Any) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def require_contents(state: dict[str, Any], specs: list[TensorSpec]) -> None:
    assert sorted(state) == sorted(spec.name for spec in specs)
    for spec in specs:
        assert stored_bytes(state[spec.name]) == tensor_bytes(spec), spec


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("staging", ["auto", "pageable"])
@pytest.mark.parametrize("method", ["auto", "direct", "buffered", "mmap"])
@pytest.mark.parametrize("padding", ["reference", "none"])
def test_every_way_delivers_the_same_tensors(
    tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, method: str, staging: str, engine: str, padding: Any
) -> None:
    path = write_checkpoint(tmp_path, SPECS, shards=2, padding=padding)
    with nothing_left_behind(tmp_path):
        state = wl.load(path, device="cuda:1", method=method, staging=staging, engine=engine, host_memory="8MiB")
    require_contents(state, SPECS)
    # As in memory of their own, which begins at a multiple of 64 on a fake device.
    assert not any(t.data_ptr() % (64 if t.nbytes >= 512 else 16) for t in state.values() if t.nbytes >= 16)
    report = state.report
    assert report.device == "cuda:1"
    assert report.staging == ("pageable" if staging == "pageable" else "pinned")
    assert gpu.copied_bytes(1) == sum(len(tensor_bytes(spec)) for spec in SPECS)
    assert gpu.copied_bytes(0) == 0
    pinned = report.host_memory.peak_pinned_bytes
    assert 0 < pinned <= 8 * MIB if staging == "auto" else pinned == 0
    assert gpu.counters().registered_bytes_peak == pinned


@pytest.mark.parametrize("engine", ENGINES)
def test_small_tensors_travel_together(tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str) -> None:
    specs = exl2_specs(layers=3, hidden=512, keys=128, inner=1024, vocabulary=1000)
    path = write_checkpoint(tmp_path, specs)
    state = wl.load(path, device="cuda:0", engine=engine)
    require_contents(state, specs)
    assert gpu.calls("MemcpyAsync") < len(specs) / 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_delivers_in_file_order(tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str) -> None:
    path = write_checkpoint(tmp_path, SPECS, shards=2)
    with wl.stream(path, device="cuda:0", engine=engine, host_memory="8MiB") as tensors:
        delivered = [(name, stored_bytes(tensor)) for name, tensor in tensors]
    assert [name for name, _ in delivered] == list(wl.open(path))
    contents = dict(delivered)
    assert all(contents[spec.name] == tensor_bytes(spec) for spec in SPECS)
    assert tensors.report is not None
    assert tensors.report.staging == "pinned"


@pytest.mark.parametrize("count", [9, 90])
def test_small_tensors_are_no_tied_ones_to_programs_that_save_them(
    tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, count: int
) -> None:
    """They share a slab; who saves a model tells by storages which of its tensors are one and the same."""
    specs = [TensorSpec(f"t{number}", "F16", (320,)) for number in range(count)]
    state = wl.load(write_checkpoint(tmp_path / "model.safetensors", specs), device="cuda:0")
    gpu.settle()
    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_parameter(name, torch.nn.Parameter(tensor))
    saving = pytest.importorskip("accelerate.utils.other")
    assert len(saving.clean_state_dict_for_safetensors(dict(module.state_dict()))) == count
    module.register_parameter("tied", module.get_parameter("t4"))
    safetensors.torch.save_model(module, str(tmp_path / "saved.safetensors"))
    saved = wl.load(tmp_path / "saved.safetensors")
    require_contents(saved, specs)
    with torch.no_grad():
        module.get_parameter("t5").zero_()
    assert safetensors.torch.load_model(module, tmp_path / "saved.safetensors") == (set(), [])
    require_contents(state, specs)


@pytest.mark.needs("preadv", "cachestat")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keep", [True, False])
def test_a_stream_reads_its_first_tensors_both_ways(
    tmp_path: Path, devices: FakeDevices, engine: str, monkeypatch: pytest.MonkeyPatch, *, keep: bool
) -> None:
    for name, value in {"WORTH_BYTES": 24 * MIB, "KEPT_BYTES": 8 * MIB, "DIRECT_BYTES": 4 * MIB}.items():
        monkeypatch.setattr(keeping, name, value)
    monkeypatch.setattr(keeping, "_STREAM_SHARE_MIN", 8)
    decision = CacheDecision(keep, "so says the test")
    monkeypatch.setattr(keeping, "judge_rounds", lambda costs, _: decision if len(costs) == 2 else None)
    specs = [TensorSpec(f"t{number:02}", "U8", (5 * MIB,)) for number in range(16)]
    path = write_checkpoint(tmp_path / "model.safetensors", specs)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with wl.stream(path, device="cuda:0", engine=engine) as tensors:
        delivered = [(name, stored_bytes(tensor)) for name, tensor in tensors]
    assert delivered == [(spec.name, tensor_bytes(spec)) for spec in specs]
    report = tensors.report
    assert report is not None
    if not (report.page_cache_before_bytes or 0) < MIB or not report.method_used["direct"]:
        pytest.skip(f"the page cache cannot be emptied here, or there are no direct reads: {report.reason}")
    # Two tensors through the page cache and one past it, twice.
    assert report.method_used["direct"] == (2 if keep else 12) * 5 * MIB
    assert report.cache_decided == ("keep" if keep else "drop")


@pytest.mark.parametrize("engine", ENGINES)
def test_globs_spread_tensors_over_devices_in_one_pass(
    tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str
) -> None:
    path = write_checkpoint(tmp_path, SPECS, shards=2)
    where = {"model.layers.0.*": "cuda:0", "model.*": "cuda:1", "*": "cpu"}
    state = wl.load(path, device=where, engine=engine)
    require_contents(state, SPECS)
    sizes = {spec.name: len(tensor_bytes(spec)) for spec in SPECS}
    assert gpu.copied_bytes(0) == sizes["model.layers.0.large"]
    assert gpu.copied_bytes(1) == sizes["model.layers.1.huge"] + sizes["model.bytes"]
    assert set(state.report.device.split(", ")) == {"cpu", "cuda:0", "cuda:1"}


def test_a_function_of_the_description_chooses_the_device(tmp_path: Path, gpu: FakeGpu, devices: FakeDevices) -> None:
    path = write_checkpoint(tmp_path, SPECS)
    state = wl.load(path, device=lambda tensor: "cuda:1" if tensor.nbytes > MIB else "cpu")
    require_contents(state, SPECS)
    assert gpu.copied_bytes(1) == sum(len(tensor_bytes(spec)) for spec in SPECS if len(tensor_bytes(spec)) > MIB)


def test_a_tensor_that_no_glob_matches_is_named(tmp_path: Path, devices: FakeDevices) -> None:
    path = write_checkpoint(tmp_path, SPECS)
    with pytest.raises(SelectionError, match=r"no device was given for tensor \S+: none of the 1 globs") as caught:
        wl.load(path, device={"model.*": "cuda:0"})
    assert '"*"' in caught.value.hint


@pytest.mark.parametrize("engine", ENGINES)
def test_existing_tensors_are_filled_in_place(tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str) -> None:
    specs = [spec for spec in SPECS if len(tensor_bytes(spec))]
    path = write_checkpoint(tmp_path, specs)
    description = describe(path)
    state = wl.load(path, framework="torch")
    destinations = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    for tensor in destinations.values():
        devices.memories[0].adopt(tensor)
    access = gpu_access("cuda:0", pick_framework(Framework.TORCH))
    assert not isinstance(access, str)
    # CPU tensors pose as the device's, so the device goes by their name.
    accesses = [access._replace(device="cpu")]
    target = ModuleTarget(description, range(len(description)), pick_framework(Framework.TORCH), destinations, accesses)
    options = LoadOptions(engine=engine)  # type: ignore[arg-type]
    transfer_rows(description, range(len(description)), options, target, accesses=accesses)
    require_contents(destinations, specs)
    assert gpu.copied_bytes(0) == description.total_bytes


@pytest.mark.parametrize("engine", ENGINES)
def test_copies_wait_for_what_the_caller_has_queued(
    tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str
) -> None:
    specs = [TensorSpec("a", "U8", (300 * KIB,)), TensorSpec("b", "F32", (3 * MIB,))]
    path = write_checkpoint(tmp_path, specs)
    memory = devices.memories[0]
    memory.pending = True
    gpu.hold(memory.stream)
    loaded: list[Any] = []
    thread = threading.Thread(target=lambda: loaded.append(wl.load(path, device="cuda:0", engine=engine)))
    thread.start()
    gpu.wait_for_calls("MemcpyAsync", 1)
    gpu.settle()
    assert gpu.copied_bytes(0) == 0
    gpu.release(memory.stream)
    thread.join()
    require_contents(loaded[0], specs)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_next_load_finds_its_memory_pinned(tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str) -> None:
    path = write_checkpoint(tmp_path, [TensorSpec("a", "U8", (20 * MIB,))])
    first = wl.load(path, device="cuda:0", engine=engine)
    registered, streams = gpu.calls("HostRegister"), gpu.calls("StreamCreateWithFlags")
    assert registered > 0
    for _ in range(3):
        again = wl.load(path, device="cuda:0", engine=engine)
        assert torch.equal(again["a"], first["a"])
    assert gpu.calls("StreamCreateWithFlags") == streams
    assert gpu.counters().registered_bytes_peak <= 128 * MIB
    assert wl.release_pinned_memory() > 0
    assert gpu.counters().registered_bytes == 0
    assert wl.release_pinned_memory() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_refused_pinning_is_reported_and_nothing_else(
    tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str
) -> None:
    gpu.fail("HostRegister", 2, times=2**63)
    path = write_checkpoint(tmp_path, SPECS)
    state = wl.load(path, device="cuda:0", engine=engine)
    require_contents(state, SPECS)
    assert state.report.staging == "pageable"
    assert "refused to pin" in state.report.staging_reason
    assert state.report.host_memory.peak_pinned_bytes == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("function", ["MemcpyAsync", "EventRecord", "StreamWaitEvent"])
def test_a_failing_call_names_file_tensor_and_error(
    tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str, function: str
) -> None:
    path = write_checkpoint(tmp_path, SPECS)
    # The first event is recorded on the caller's stream, before anything is copied.
    gpu.fail(function, 719, after=1 if function == "EventRecord" else 0)
    with (
        nothing_left_behind(tmp_path),
        pytest.raises(DeviceError, match=r"model\.safetensors.*cuda:0.*719.*in tensor") as caught,
    ):
        wl.load(path, device="cuda:0", engine=engine)
    assert caught.value.code == 719
    assert caught.value.hint
    assert gpu.last_error() == 0
    require_contents(wl.load(path, device="cuda:0", engine=engine), SPECS)


@pytest.mark.parametrize("engine", ENGINES)
def test_out_of_memory_is_the_frameworks_own_error(
    tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str
) -> None:
    path = write_checkpoint(tmp_path, [TensorSpec(f"t{index}", "U8", (30 * MIB,)) for index in range(6)])
    hog = gpu.allocate(0, 156 * MIB)
    with nothing_left_behind(tmp_path), pytest.raises(torch.OutOfMemoryError):
        wl.load(path, device="cuda:0", engine=engine)
    gpu.free(hog)
    assert len(wl.load(path, device="cuda:1", engine=engine)) == 6


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupted_load_drains_its_copies(tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str) -> None:
    path = write_checkpoint(tmp_path, [TensorSpec("a", "U8", (40 * MIB,)), TensorSpec("b", "U8", (40 * MIB,))])

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with nothing_left_behind(tmp_path), pytest.raises(KeyboardInterrupt):
        wl.load(path, device="cuda:0", engine=engine, progress=interrupt, host_memory="8MiB")
    assert gpu.counters().queued_operations == 0
    assert gpu.counters().stray_copies == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_all_device_memory_is_there_after_the_first_bytes(
    tmp_path: Path, devices: FakeDevices, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    recorded: list[int] = []
    record = ReadyEvents.record

    def noted(events: ReadyEvents) -> int:
        recorded.append(record(events))
        return recorded[-1]

    monkeypatch.setattr(ReadyEvents, "record", noted)
    monkeypatch.setattr(pipeline, "_FIRST_BATCH_BYTES", MIB)
    monkeypatch.setattr(pipeline, "_MOST_BATCH_BYTES", MIB)
    specs = [TensorSpec(f"large.{number}", "U8", (11 * MIB,)) for number in range(6)]
    path = write_checkpoint(tmp_path, specs, shards=6)
    require_contents(wl.load(path, device="cuda:0", engine=engine, host_memory="8MiB"), specs)
    assert len(recorded) == 2, "one event for the memory of the first bytes, one for all the rest"


def test_device_memory_is_prepared_for_many_tensors_at_once(
    tmp_path: Path, devices: FakeDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(FakeMemory, "expect", lambda _, nbytes: asked.append(nbytes))
    monkeypatch.setattr(streaming, "_EXPECTED_BYTES", 25 * MIB)
    specs = [TensorSpec(f"large.{number}", "U8", (11 * MIB,)) for number in range(4)]
    path = write_checkpoint(tmp_path / "model.safetensors", specs)
    with wl.stream(path, device="cuda:0") as stream:
        assert len(list(stream)) == 4
    assert asked == [33 * MIB, 11 * MIB], "never more than is still to come, nor for each tensor by itself"
    asked.clear()
    wl.load(path, device="cuda:0")
    assert asked == [44 * MIB]
