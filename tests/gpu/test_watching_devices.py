"""What is sampled and traced of loads onto fake devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import weightlift as wl
from weightlift.steps import StepKind
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.testing.fake_devices import FakeDevices
    from weightlift.testing.fake_gpu import FakeGpu

ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
SPECS = [TensorSpec(f"layers.{number}", "F32", (1000, 1000)) for number in range(10)]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_chunk_is_read_copied_and_seen_to_land(
    tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str
) -> None:
    path = write_checkpoint(tmp_path / "model", SPECS, shards=2)
    recording = wl.Recording()
    report = wl.load(path, device="cuda:1", engine=engine, recording=recording, host_memory="8MiB").report
    assert recording.steps is not None
    steps = list(recording.steps)
    by_kind = {kind: [step for step in steps if step.kind is kind] for kind in StepKind}
    assert sum(step.length for step in by_kind[StepKind.READ]) == report.nbytes
    chunks = {(step.shard, step.offset, step.length, step.slot) for step in by_kind[StepKind.READ]}
    for kind in (StepKind.DEVICE_COPY, StepKind.UNDER_WAY):
        assert {(step.shard, step.offset, step.length, step.slot) for step in by_kind[kind]} == chunks
        assert len(by_kind[kind]) == len(chunks)
    queued = {(step.shard, step.offset): step.start for step in by_kind[StepKind.DEVICE_COPY]}
    assert all(step.start == queued[step.shard, step.offset] <= step.end for step in by_kind[StepKind.UNDER_WAY])
    assert {step.slot for step in by_kind[StepKind.REGISTER]} == {step.slot for step in by_kind[StepKind.READ]}
    assert set(recording.shards) == {file.path for file in report.files}


@pytest.mark.parametrize("engine", ENGINES)
def test_device_and_pinned_memory_are_sampled(tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, engine: str) -> None:
    path = write_checkpoint(tmp_path / "model", SPECS)
    state = wl.load(path, device={"*.0": "cuda:0", "*": "cuda:1"}, engine=engine, host_memory="8MiB")
    last = state.report.samples[-1]
    assert last.device_bytes is not None
    assert state.report.nbytes <= last.device_bytes <= state.report.nbytes + MIB
    assert last.pinned_bytes == state.report.host_memory.peak_pinned_bytes > 0
    assert last.read_bytes == last.landed_bytes == state.report.nbytes
    assert last.tensor_bytes == 0


def test_a_device_that_does_not_tell_its_memory_is_unknown(tmp_path: Path, gpu: FakeGpu, devices: FakeDevices) -> None:
    path = write_checkpoint(tmp_path / "model", SPECS)
    gpu.fail("MemGetInfo", 2, times=100)
    assert wl.load(path, device="cuda:0").report.samples[-1].device_bytes is None
