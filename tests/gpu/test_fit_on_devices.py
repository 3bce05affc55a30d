"""Device memory in fit reports, on the fake runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import weightlift as wl
from weightlift.testing import make_checkpoint
from weightlift.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.testing.fake_devices import FakeDevices

# The fake devices have 256 MiB each.


def test_free_and_reusable_memory_of_each_device(tmp_path: Path, devices: FakeDevices) -> None:
    path, _ = make_checkpoint(tmp_path / "model.safetensors", shape=(1024, 1024), count=4)
    devices.memories[1].cached_bytes = 3 * MIB
    fit = wl.fit(path, device={"tensor_000": "cuda:0", "tensor_001": "cpu", "*": "cuda:1"})
    assert [(found.device, found.tensor_bytes) for found in fit.devices] == [("cuda:0", 2 * MIB), ("cuda:1", 4 * MIB)]
    assert [found.reusable_bytes for found in fit.devices] == [0, 3 * MIB]
    for found in fit.devices:
        assert found.free_bytes is not None
        assert 0 < found.free_bytes <= 256 * MIB
        assert found.total_bytes == 256 * MIB
    assert fit.tensor_bytes >= 2 * MIB
    assert 0 < fit.staging_bytes <= 128 * MIB


def test_conversion_counts(tmp_path: Path, devices: FakeDevices) -> None:
    path, _ = make_checkpoint(tmp_path / "model.safetensors", shape=(1024, 1024), count=4)
    (found,) = wl.fit(path, device="cuda", dtype="float32").devices
    assert (found.device, found.tensor_bytes) == ("cuda:0", 16 * MIB)


def test_a_misfit_lets_the_framework_say_so_and_adds_what_was_known(tmp_path: Path, devices: FakeDevices) -> None:
    path, _ = make_checkpoint(tmp_path / "model.safetensors", shape=(4096, 4096), count=9)
    assert wl.load(path, device="cuda:0", names="tensor_000").report.fit.startswith("fits: ")
    fit = wl.fit(path, device="cuda:0")
    assert fit.devices[0].missing_bytes > 0
    with pytest.raises(torch.OutOfMemoryError) as caught:
        wl.load(path, device="cuda:0")
    (note,) = caught.value.__notes__
    assert "288 MiB on cuda:0" in note
    assert "too little" in note
