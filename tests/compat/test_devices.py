"""Tensors on a (fake) GPU: they get there by weightlift's own copies, whole, in slices and prefetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from weightlift.compat.safetensors import SafetensorError, safe_open
from weightlift.compat.safetensors import opened as opened_module
from weightlift.compat.safetensors.torch import load_file
from weightlift.testing.factory import tensor_bytes, write_checkpoint
from weightlift.testing.fake_devices import FakeDevices
from weightlift.testing.fake_gpu import FakeGpu, FakeGpuUnavailable, build
from weightlift.testing.shapes import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SPECS = [
    TensorSpec("big", "BF16", (300, 4096)),
    *(TensorSpec(f"small_{number}", "F16", (5, 7 + number)) for number in range(12)),
    TensorSpec("number", "F32", ()),
    TensorSpec("empty", "F32", (0, 3)),
]


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("fake-gpu"))
    except FakeGpuUnavailable as err:
        pytest.skip(str(err))


@pytest.fixture(params=["cuda", "hip"])
def devices(
    request: pytest.FixtureRequest, fake_library: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeDevices]:
    # What is small goes there by a copy of torch's own, and torch does not know the fake.
    monkeypatch.setattr(opened_module, "SMALL_DEVICE_BYTES", -1)
    with FakeGpu(fake_library, request.param, seed=1, memory_bytes=256 << 20) as gpu, FakeDevices(gpu) as fakes:
        yield fakes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m.safetensors", SPECS)


def stored(spec: TensorSpec, first: int = 0, end: int | None = None) -> bytes:
    content = tensor_bytes(spec)
    rows = spec.shape[0] if spec.shape else 1
    row_bytes = len(content) // rows if rows else 0
    return content[first * row_bytes : rows * row_bytes if end is None else end * row_bytes]


def settled(devices: FakeDevices, tensor: Any) -> bytes:
    devices.memories[0]._gpu.settle()
    if not tensor.numel():
        return b""
    return bytes(tensor.view(-1).view(torch.uint8).numpy().tobytes())


def test_tensors_and_whole_files(path: Path, devices: FakeDevices) -> None:
    with safe_open(path, framework="pt", device="cuda:1") as file:
        for spec in SPECS:
            assert settled(devices, file.get_tensor(spec.name)) == stored(spec)
            assert settled(devices, file.get_slice(spec.name)[...]) == stored(spec)
        assert {report.device for report in file.reports} == {"cuda:1"}
    whole = load_file(path, device="cuda:0")
    assert list(whole) == safe_open(path, framework="pt").offset_keys()
    assert all(settled(devices, whole[spec.name]) == stored(spec) for spec in SPECS)


def test_prefetching_everything(path: Path, devices: FakeDevices) -> None:
    file = safe_open(path, framework="pt", device="cuda:0")
    with file.prefetch() as loader:
        assert loader.names() == file.offset_keys()
        assert len(loader) == len(SPECS)
        taken = loader.take("small_3")
        rest = dict(loader)
    assert rest.keys() == {spec.name for spec in SPECS} - {"small_3"}
    rest["small_3"] = taken
    assert all(settled(devices, rest[spec.name]) == stored(spec) for spec in SPECS)


def test_prefetching_rows(path: Path, devices: FakeDevices) -> None:
    plan = {
        "big": slice(100, 250),
        "small_1": slice(-2, None),
        "small_2": slice(1, 1),
        "small_4": None,
        "small_5": slice(None),
    }
    by_name = {spec.name: spec for spec in SPECS}
    with safe_open(path, framework="pt").prefetch(plan, device=1, threads=2) as loader:
        found = dict(loader)
    assert found["big"].shape == (150, 4096)
    assert settled(devices, found["big"]) == stored(by_name["big"], 100, 250)
    assert settled(devices, found["small_1"]) == stored(by_name["small_1"], 3, 5)
    assert found["small_2"].shape == (0, 9)
    assert settled(devices, found["small_4"]) == stored(by_name["small_4"])
    assert settled(devices, found["small_5"]) == stored(by_name["small_5"])


def test_each_tensor_is_handed_out_once(path: Path, devices: FakeDevices) -> None:
    file = safe_open(path, framework="pt", device="cuda:0")
    loader = file.prefetch({"small_1": None, "big": None})
    loader.take("big")
    with pytest.raises(SafetensorError, match="already"):
        loader.take("big")
    with pytest.raises(SafetensorError, match="not part"):
        loader.take("small_2")
    assert [name for name, _ in loader] == ["small_1"]
    assert list(loader) == []
    loader.close()
    for use in (lambda: loader.take("small_1"), lambda: next(iter(loader))):
        with pytest.raises(SafetensorError, match="closed"):
            use()


def test_closing_early_leaves_nothing_running(path: Path, devices: FakeDevices) -> None:
    loader = safe_open(path, framework="pt", device="cuda:0").prefetch()
    loader.close()
    assert not loader._thread.is_alive()
    loader.close()


def test_a_failure_reaches_whoever_waits(path: Path, devices: FakeDevices) -> None:
    file = safe_open(path, framework="pt", device="cuda:0")
    path.write_bytes(path.read_bytes()[:-500_000])
    with pytest.raises(SafetensorError, match=r"m\.safetensors"):
        dict(file.prefetch())
