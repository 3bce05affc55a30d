"""The vLLM loader: the stream below it here, and vLLM's own registry and loader where vLLM can be imported.

vLLM wants a torch of its own and hundreds of other packages, so it is not installed for every run. Name a folder that
holds it and what it imports, and this runs against the real one::

    WEIGHTLIFT_TEST_VLLM=/folder make test ARGUMENTS=tests/integrations/test_vllm.py
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

from weightlift.integrations.vllm import stream_files
from weightlift.testing.differential import tensor_bytes
from weightlift.testing.factory import write_checkpoint
from weightlift.testing.shapes import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.testing.fake_devices import FakeDevices

VLLM = os.environ.get("WEIGHTLIFT_TEST_VLLM")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three shards; the last two sort differently as text and as numbers, and all hold a tensor of one name."""
    found = []
    for number in (10, 9, 1):
        specs = [TensorSpec(f"layers.{number}.experts.{expert}.w", "BF16", (8, 16)) for expert in range(4)]
        path = tmp_path / f"model-{number}.safetensors"
        write_checkpoint(path, [*specs, TensorSpec("in_all", "F32", (3,))], seed=number)
        found.append(str(path))
    return found


def stored(files: list[str]) -> list[tuple[str, bytes]]:
    ordered = sorted(files, key=lambda path: int(path.rsplit("-", 1)[1].split(".")[0]))
    return [
        (name, tensor_bytes(tensor)) for path in ordered for name, tensor in safetensors.torch.load_file(path).items()
    ]


def test_files_by_number_and_tensors_in_file_order(files: list[str]) -> None:
    found = [(name, tensor_bytes(tensor)) for name, tensor in stream_files(files, lambda _: True, "cpu", {})]
    assert found == stored(files)
    assert sum(name == "in_all" for name, _ in found) == 3


def test_tensors_that_are_not_wanted_are_not_read(files: list[str]) -> None:
    def wanted(name: str) -> bool:
        return "experts.2" in name

    found = list(stream_files(files, wanted, "cpu", {"method": "buffered"}))
    assert [name for name, _ in found] == [f"layers.{number}.experts.2.w" for number in (1, 9, 10)]
    assert list(stream_files(files, lambda _: False, "cpu", {})) == []


def test_they_go_to_the_device(files: list[str], devices: FakeDevices) -> None:
    found = []
    for name, tensor in stream_files(files, lambda _: True, "cuda:1", {}):
        devices.memories[1]._gpu.settle()
        found.append((name, tensor_bytes(tensor)))
    assert found == stored(files)


def test_a_consumer_that_stops_leaves_nothing_open(files: list[str]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    stream: Any = stream_files(files, lambda _: True, "cpu", {})
    next(stream)
    stream.close()
    del stream
    assert len(os.listdir("/proc/self/fd")) == before


def test_damaged_files_are_refused_in_the_librarys_class(files: list[str]) -> None:
    os.truncate(files[0], 300)
    with pytest.raises(safetensors.SafetensorError):
        list(stream_files(files, lambda _: True, "cpu", {}))


def test_the_entry_point_names_what_is_there() -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins", name="weightlift")
    assert {point.value for point in points} == {"weightlift.integrations.vllm:register"}


REAL = """
import sys, torch, safetensors.torch
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

def loader(**extra):
    return get_model_loader(LoadConfig(load_format="weightlift", model_loader_extra_config=extra))

mine = loader(method="buffered", host_memory="16MiB", enable_weights_track=True)
assert isinstance(mine, DefaultModelLoader), type(mine).__mro__
assert mine.enable_weights_track is True
for bad in ({"method": "fast"}, {"nonsense": 1}, {"num_threads": 0}):
    try:
        loader(**bad)
    except ValueError as err:
        print("refused", str(err).splitlines()[0])
    else:
        raise AssertionError(bad)
stock = get_model_loader(LoadConfig(load_format="safetensors"))
source = DefaultModelLoader.Source(sys.argv[1], None, prefix="model.")
theirs = dict(stock._get_weights_iterator(source))
ours = dict(mine._get_weights_iterator(source))
assert ours.keys() == theirs.keys() and len(ours) > 3
assert all(torch.equal(ours[n].view(torch.uint8), theirs[n].view(torch.uint8)) for n in theirs)
mine.local_expert_ids = stock.local_expert_ids = {1, 3}
ours, theirs = dict(mine._get_weights_iterator(source)), dict(stock._get_weights_iterator(source))
assert ours.keys() == theirs.keys() and 0 < len(ours) < 12, sorted(ours)
import vllm.model_executor.model_loader.default_loader as module
assert module.safetensors_weights_iterator.__module__ == "vllm.model_executor.model_loader.weight_utils"

class Model(torch.nn.Module):
    def load_weights(self, weights):
        self.found = {name: tensor.device.type for name, tensor in weights}
        return None

class ModelConfig:
    model, revision, quantization, multimodal_config, is_moe = sys.argv[1], None, None, None, False

model = Model()
mine.local_expert_ids = None
mine._init_ep_weight_filter = lambda config: None
mine.enable_weights_track = False
mine.load_weights(model, ModelConfig())
assert len(model.found) == 12 and set(model.found.values()) == {"cpu"}, model.found
print("DONE")
"""


@pytest.mark.skipif(not VLLM, reason="WEIGHTLIFT_TEST_VLLM names no folder with vLLM and what it imports")
def test_the_real_registry_and_loader(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        specs = [TensorSpec(f"layers.{number}.mlp.experts.{expert}.w1.weight", "BF16", (8, 16)) for expert in range(4)]
        write_checkpoint(tmp_path / f"model-{number}.safetensors", specs, seed=number)
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(VLLM), "VLLM_TARGET_DEVICE": "cpu"}
    finished = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert finished.stdout.endswith("DONE\n"), finished.stdout + finished.stderr
    assert finished.stdout.count("refused") == 3


def test_dtype_of_what_arrives(files: list[str]) -> None:
    kinds = {tensor.dtype for _, tensor in stream_files(files, lambda _: True, "cpu", {})}
    assert kinds == {torch.bfloat16, torch.float32}
