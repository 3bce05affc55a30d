"""What the caller gets is theirs: private, writable, alive as long as they hold it, and gone when they let go."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import weightlift as wl
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import MIB

OWNING = ["auto", "direct", "buffered"]
SPECS = [
    TensorSpec("large", "F32", (8, MIB)),
    TensorSpec("other", "F32", (4, MIB)),
    *[TensorSpec(f"small.{n}", "U8", (1000 + n,)) for n in range(20)],
]


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("method", [*OWNING, "mmap"])
def test_editing_a_tensor_reaches_neither_the_file_nor_another_load(
    tmp_path: Path, method: str, framework: str
) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS[1:], padding=1)
    before = path.read_bytes()
    first, second = (wl.load(path, method=method, framework=framework) for _ in range(2))
    for tensor in first.values():
        tensor[:] = 7
    assert path.read_bytes() == before
    for spec in SPECS[1:]:
        assert second[spec.name].reshape(-1)[:8].view(_byte(framework)).tolist() == list(
            tensor_bytes(spec, stop=_stop(spec))
        )
        assert bool((first[spec.name] == 7).all())
    for tensor in second.values():
        tensor[:] = 9
    assert all(bool((tensor == 7).all()) for tensor in first.values()), "the loads share memory"


def _byte(framework: str) -> Any:
    return torch.uint8 if framework == "torch" else numpy.uint8


def _stop(spec: TensorSpec) -> int:
    return 8 * (4 if spec.dtype == "F32" else 1)


def test_readonly_mappings_are_shared_and_cannot_be_written(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS[1:])
    state = wl.load(path, method="mmap", readonly=True, framework="numpy")
    with pytest.raises(ValueError, match="read-only"):
        state["other"][0] = 1
    assert not state["small.3"].flags.writeable


@pytest.mark.parametrize("method", OWNING)
def test_neighbours_in_memory_do_not_touch_each_other(tmp_path: Path, method: str) -> None:
    specs = [TensorSpec(f"t.{n:02}", "U8", (n * 37 + 1,)) for n in range(30)]
    path = write_checkpoint(tmp_path / "model.safetensors", specs, padding=5)
    state = wl.load(path, method=method, framework="numpy")
    for number, spec in enumerate(specs):
        state[spec.name][:] = number
    for number, spec in enumerate(specs):
        assert bool((state[spec.name] == number).all())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory")
@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("method", OWNING)
def test_deleting_one_large_tensor_gives_its_memory_back(tmp_path: Path, method: str, framework: str) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    wl.load(path, method=method, framework=framework)
    # What earlier tests left behind shall not be counted when it is collected.
    gc.collect()
    start = anonymous_bytes()
    state = wl.load(path, method=method, framework=framework)
    loaded = anonymous_bytes()
    assert loaded - start > 44 * MIB
    del state["large"]
    gc.collect()
    assert loaded - anonymous_bytes() > 31 * MIB
    other = state["other"]
    assert other.reshape(-1)[:2].view(_byte(framework)).tolist() == list(tensor_bytes(SPECS[1], stop=8))
    del state
    gc.collect()
    assert loaded - anonymous_bytes() < 36 * MIB, "a tensor still held has lost its memory"
    del other
    gc.collect()
    assert anonymous_bytes() - start < 2 * MIB


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_view_keeps_its_tensor_alive(tmp_path: Path, framework: str) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    view = wl.load(path, framework=framework, method="buffered")["large"][5, 100:200]
    gc.collect()
    wl.load(path, framework=framework, method="buffered")
    start = (5 * MIB + 100) * 4
    found = view.view(_byte(framework)).tolist()
    assert found == list(tensor_bytes(SPECS[0], start=start, stop=start + 400))


def test_mappings_last_as_long_as_their_tensors(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS[1:])
    with nothing_left_behind(tmp_path):
        tensor = wl.load(path, method="mmap", framework="numpy")["small.7"]
        gc.collect()
        assert any(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())
        assert tensor.tobytes() == tensor_bytes(SPECS[2 + 7])
        del tensor
