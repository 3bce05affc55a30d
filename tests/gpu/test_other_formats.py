"""GGUF and PyTorch checkpoints onto fake devices: raw blocks, numbers made of them, and tensors that share bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy
import pytest
import torch

import weightlift as wl
from weightlift.dtypes import GGML
from weightlift.testing import GGUFSpec, write_gguf
from weightlift.testing.leaks import nothing_left_behind

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.testing.fake_devices import FakeDevices
    from weightlift.testing.fake_gpu import FakeGpu

ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
SPECS = [
    *(GGUFSpec(dtype.name, dtype.name, (9, 512)) for dtype in GGML.values()),
    GGUFSpec("large", "Q4_K", (3000, 8192)),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("staging", ["auto", "pageable"])
@pytest.mark.parametrize("method", ["auto", "direct", "buffered", "mmap"])
def test_raw_blocks(tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, method: str, staging: str, engine: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", SPECS)
    with nothing_left_behind(tmp_path):
        state = wl.load(path, device="cuda:1", method=method, staging=staging, engine=engine, host_memory="8MiB")
    for item in gguf.GGUFReader(path).tensors:
        assert state[item.name].reshape(-1).view(torch.uint8).numpy().tobytes() == item.data.tobytes(), item.name
    assert gpu.copied_bytes(1) > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_tensors_that_share_bytes(tmp_path: Path, gpu: FakeGpu, devices: FakeDevices, method: str, engine: str) -> None:
    path, base, small = tmp_path / "m.pt", torch.randn(3000, 1024), torch.randn(6, 7)
    saved: dict[str, Any] = {
        "a": base,
        "rows": base[5:9],
        "transposed": base.t(),
        "small": small,
        "view": small[:, 1::2],
    }
    # More than one in the same slab, so that not all begin at its beginning.
    saved |= {f"t{number}": torch.randn(5, number + 2).t() for number in range(4)}
    torch.save(saved, path)
    for name, tensor in wl.load(path, device="cuda:0", method=method, engine=engine).items():
        assert (tensor.shape, tensor.stride()) == (saved[name].shape, saved[name].stride())
        assert torch.equal(tensor, saved[name]), name
    streamed = dict(wl.stream(path, device="cuda:0", method=method, engine=engine))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in streamed.items())
    assert streamed["rows"].data_ptr() == streamed["a"].data_ptr() + 5 * 1024 * 4


def test_numbers_are_made_on_the_processor_and_copied(tmp_path: Path) -> None:
    """Another device that only torch reaches; the CPU by a name of its own stands for it."""
    path = write_gguf(tmp_path / "m.gguf", [GGUFSpec("t", "Q6_K", (40, 512))])
    found = wl.load(path, device="cpu:0", dequantize=True)["t"]
    (item,) = gguf.GGUFReader(path).tensors
    with numpy.errstate(all="ignore"):
        numpy.testing.assert_array_equal(found.numpy(), gguf.quants.dequantize(item.data, item.tensor_type))
