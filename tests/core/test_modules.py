"""``weightlift.load_into``: a module's own tensors are filled, cast where asked for, and judged as torch does."""

from __future__ import annotations

import mmap
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import weightlift as wl
from weightlift.errors import StateMismatchError, UnsupportedError
from weightlift.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

safetensors_torch = pytest.importorskip("safetensors.torch")
METHODS = ("auto", "direct", "buffered")


class Model(torch.nn.Module):
    """Large and small parameters, a buffer, and an integer."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(2000, 513, dtype=dtype)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 96, dtype=dtype) for _ in range(8))
        self.register_buffer("steps", torch.arange(7))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    state = {name: tensor.clone() for name, tensor in Model().state_dict().items()}
    path = tmp_path / "model.safetensors"
    safetensors_torch.save_file(state, path)
    return path, state


def _first_weight(module: Model) -> torch.Tensor:
    layer = module.layers[0]
    assert isinstance(layer, torch.nn.Linear)
    return layer.weight


def _same(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(tensor.equal(state[name].to(tensor.dtype)) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("engine", [pytest.param("native", marks=pytest.mark.native), "python"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_are_filled_where_they_are(saved: Any, engine: str, method: str, dtype: torch.dtype) -> None:
    path, state = saved
    torch.manual_seed(1)
    module = Model(dtype)
    addresses = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    result = wl.load_into(module, path, engine=engine, method=method, host_memory="8MiB")
    assert _same(module, state)
    assert addresses == {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert result.report.tensors == len(state)
    assert module.embedding.weight.requires_grad


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whether memory was touched")
def test_memory_that_was_never_touched_is_prepared(tmp_path: Path) -> None:
    """As a module has after ``to_empty``; only what lies inside it is prepared."""
    state = {"large": torch.arange(9 * MIB, dtype=torch.int32).view(torch.uint8)[5:-7].clone()}
    safetensors_torch.save_file(state, tmp_path / "model.safetensors")
    memory = mmap.mmap(-1, 40 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[MIB], memory[38 * MIB] = 7, 7
    large = torch.frombuffer(memory, dtype=torch.uint8)[MIB + 1 :][: state["large"].numel()]
    report = wl.load_into({"large": large}, tmp_path / "model.safetensors", engine="native", method="buffered").report
    assert large.equal(state["large"])
    assert report.worker_seconds["preparing memory"] > 0
    assert (memory[MIB], memory[38 * MIB]) == (7, 7)
    again = wl.load_into({"large": large}, tmp_path / "model.safetensors", engine="native", method="buffered").report
    assert again.worker_seconds["preparing memory"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_strided_destinations_are_filled_too(saved: Any, method: str) -> None:
    path, state = saved
    wide = torch.zeros(513, 2000, dtype=torch.bfloat16).t()
    assert not wide.is_contiguous()
    wl.load_into({"embedding.weight": wide}, path, names=["embedding.weight"], method=method)
    assert wide.equal(state["embedding.weight"])


def test_names_are_judged_as_torch_judges_them(saved: Any) -> None:
    path, state = saved
    module = Model()
    module.extra = torch.nn.Linear(2, 2)
    del module.steps
    before = _first_weight(module).clone()
    with pytest.raises(StateMismatchError, match=r"extra\.weight.*steps") as caught:
        wl.load_into(module, path)
    assert "strict=False" in caught.value.hint
    assert _first_weight(module).equal(before), "a refused load must not have touched the module"
    result = wl.load_into(module, path, strict=False)
    assert result.missing_keys == ["extra.weight", "extra.bias"]
    assert result.unexpected_keys == ["steps"]
    assert _first_weight(module).equal(state["layers.0.weight"])


def test_a_tied_tensor_need_not_be_stored_twice(saved: Any) -> None:
    path, _ = saved
    module = Model()
    module.head = torch.nn.Linear(513, 2000, bias=False, dtype=torch.bfloat16)
    module.head.weight = module.embedding.weight
    assert wl.load_into(module, path).missing_keys == []


def test_another_shape_is_refused_before_anything_is_read(saved: Any) -> None:
    path, _ = saved
    module = Model()
    module.layers[3] = torch.nn.Linear(64, 97, dtype=torch.bfloat16)
    before = _first_weight(module).clone()
    with pytest.raises(StateMismatchError, match=r"\[96\].*\[97\]|\[96, 64\].*\[97, 64\]") as caught:
        wl.load_into(module, path)
    assert caught.value.tensor is not None
    assert _first_weight(module).equal(before)


def test_a_module_without_memory_says_how_to_get_some(saved: Any) -> None:
    path, state = saved
    with torch.device("meta"):
        module = Model()
    with pytest.raises(StateMismatchError, match="meta") as caught:
        wl.load_into(module, path)
    assert "to_empty" in caught.value.hint
    module.to_empty(device="cpu")
    wl.load_into(module, path)
    assert _same(module, state)


def test_mappings_cannot_fill_memory(saved: Any) -> None:
    with pytest.raises(UnsupportedError, match="mmap"):
        wl.load_into(Model(), saved[0], method="mmap")


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_larger_than_the_budget_is_cast_in_chunks(tmp_path: Path, method: str) -> None:
    torch.manual_seed(2)
    state = {"weight": torch.randn(24 * MIB // 2).to(torch.float16)}
    path = tmp_path / "model.safetensors"
    safetensors_torch.save_file(state, path)
    destination = {"weight": torch.zeros(24 * MIB // 2)}
    report = wl.load_into(destination, path, method=method, host_memory="8MiB").report
    assert destination["weight"].equal(state["weight"].float())
    assert report.host_memory.staging_bytes <= 8 * MIB
