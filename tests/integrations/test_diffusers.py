"""diffusers itself, on tiny models of real architectures."""

from __future__ import annotations

import copy
import functools
import os
import shutil
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

import weightlift
from weightlift.errors import UnsupportedError
from weightlift.integrations import diffusers as adapter
from weightlift.integrations.pretrained import from_pretrained
from weightlift.testing.differential import comparable

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.testing.fake_devices import FakeDevices


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("unet")
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    model.save_pretrained(folder, max_shard_size="500KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def state(model: Any) -> dict[str, Any]:
    return {name: comparable(tensor) for name, tensor in model.state_dict().items()}


def picture(model: Any) -> Any:
    # Kernels round differently with how weights happen to be aligned in memory, so they are put elsewhere first.
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        sample = torch.linspace(-1, 1, 192, dtype=model.dtype).reshape(1, 3, 8, 8)
        return model(sample, timestep=7).sample


@pytest.mark.parametrize(
    ("arguments", "adapted"),
    [
        ({}, False),
        ({"low_cpu_mem_usage": False}, False),
        ({"torch_dtype": torch.bfloat16}, False),
        ({"device_map": "cpu"}, True),
        ({"device_map": {"": "cpu"}, "torch_dtype": torch.float16}, True),
    ],
    ids=str,
)
def test_a_sharded_model(unet: Path, arguments: dict[str, Any], adapted: bool) -> None:
    stock = diffusers.UNet2DModel.from_pretrained(unet, **arguments)
    with weightlift.patch() as patch:
        mine = diffusers.UNet2DModel.from_pretrained(unet, **arguments)
    assert state(mine) == state(stock)
    if stock.dtype is torch.float32:
        assert torch.equal(picture(mine), picture(stock))
    # With a device map every shard is loaded by itself, onto its devices.
    assert len(patch.reports) == (len(list(unet.glob("*.safetensors"))) if adapted else 0)


def test_one_call_without_a_patch_of_ones_own(unet: Path) -> None:
    mine = from_pretrained(diffusers.UNet2DModel, unet, device_map="cpu")
    assert state(mine) == state(diffusers.UNet2DModel.from_pretrained(unet))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one file, as most of diffusers' are."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("autoencoder")
    diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) == 1
    return folder


@pytest.mark.parametrize(
    ("arguments", "loads"),
    [
        ({}, 0),
        ({"torch_dtype": torch.bfloat16}, 0),
        ({"device_map": "cpu"}, 1),
        ({"device_map": {"": "cpu"}, "torch_dtype": torch.float16}, 1),
        pytest.param(
            {"device_map": "cpu", "disable_mmap": True},
            0,
            # diffusers leaves that file to the garbage collector.
            marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
        ),
    ],
    ids=str,
)
def test_a_model_in_one_file(autoencoder: Path, arguments: dict[str, Any], loads: int) -> None:
    stock = diffusers.AutoencoderKL.from_pretrained(autoencoder, **arguments)
    with weightlift.patch() as patch:
        mine = diffusers.AutoencoderKL.from_pretrained(autoencoder, **arguments)
    assert state(mine) == state(stock)
    assert mine.dtype is stock.dtype
    # With a device map it is loaded once, when it is known where everything goes.
    assert len(patch.reports) == loads
    assert {parameter.device.type for parameter in mine.parameters()} == {"cpu"}


def test_a_pipeline_hands_its_device_map_to_its_models(unet: Path, tmp_path: Path) -> None:
    model = diffusers.UNet2DModel.from_pretrained(unet)
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with weightlift.patch() as patch:
        pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, device_map="cpu")
    assert state(pipeline.unet) == state(model)
    assert len(patch.reports) == 1


def test_names_of_an_older_version(autoencoder: Path, tmp_path: Path) -> None:
    """diffusers renames tensors between opening the file and placing them."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in safetensors.torch.load_file(next(autoencoder.glob("*.safetensors"))).items():
        new = next((part for part in older if f".{part}." in name), None)
        tensors[name if new is None else name.replace(new, older[new])] = tensor
    assert any("proj_attn" in name for name in tensors)
    safetensors.torch.save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    shutil.copy(autoencoder / "config.json", tmp_path)
    with weightlift.patch() as patch:
        mine = diffusers.AutoencoderKL.from_pretrained(tmp_path, device_map="cpu")
    assert state(mine) == state(diffusers.AutoencoderKL.from_pretrained(autoencoder))
    assert len(patch.reports) == 1


class Computing(diffusers.AutoencoderKL):  # type: ignore[misc]
    """A model that does more to a file's tensors than give them other names."""

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Any]) -> None:
        state_dict["quant_conv.weight"] = state_dict["quant_conv.weight"] * 2


def test_tensors_that_are_computed_before_they_are_read(autoencoder: Path) -> None:
    with weightlift.patch():
        with pytest.raises(UnsupportedError, match=r"computes quant_conv\.weight from tensors of the file"):
            Computing.from_pretrained(autoencoder, device_map="cpu")
        mine = Computing.from_pretrained(autoencoder)
    assert state(mine) == state(Computing.from_pretrained(autoencoder))


def test_tensors_that_the_model_does_not_have(autoencoder: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(next(autoencoder.glob("*.safetensors")))
    tensors["of.another.model"] = torch.ones(3)
    safetensors.torch.save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    shutil.copy(autoencoder / "config.json", tmp_path)
    arguments: dict[str, Any] = {"device_map": "cpu", "output_loading_info": True}
    _, stock = diffusers.AutoencoderKL.from_pretrained(tmp_path, **arguments)
    with weightlift.patch():
        _, mine = diffusers.AutoencoderKL.from_pretrained(tmp_path, **arguments)
    assert mine == stock
    assert mine["unexpected_keys"] == ["of.another.model"]


def test_a_file_that_is_cut_off(autoencoder: Path, tmp_path: Path) -> None:
    shutil.copytree(autoencoder, tmp_path, dirs_exist_ok=True)
    os.truncate(next(tmp_path.glob("*.safetensors")), 1000)
    with pytest.raises(Exception, match="Unable to load weights") as stock:
        diffusers.AutoencoderKL.from_pretrained(tmp_path, device_map="cpu")
    with weightlift.patch(), pytest.raises(type(stock.value), match="Unable to load weights"):
        diffusers.AutoencoderKL.from_pretrained(tmp_path, device_map="cpu")


@pytest.mark.parametrize("sharded", [True, False], ids=["shards", "one file"])
def test_weights_that_a_quantizer_of_which_nothing_is_known_places_itself(
    unet: Path, autoencoder: Path, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint says in its own configuration that it is quantised; its tensors are then needed in host memory."""
    kind, folder = (diffusers.UNet2DModel, unet) if sharded else (diffusers.AutoencoderKL, autoencoder)
    stock = kind.from_pretrained(folder, device_map="cpu")
    module = diffusers.models.modeling_utils
    seen: dict[str, Any] = {}
    load_shard_file = module._load_shard_file

    def load_as_if_not_quantised(shard_file: Any, *arguments: Any, **named: Any) -> Any:
        seen.update({name: comparable(tensor) for name, tensor in module.load_state_dict(shard_file).items()})
        return load_shard_file(shard_file, *arguments, **named | {"hf_quantizer": None})

    monkeypatch.setattr(module, "_load_shard_file", load_as_if_not_quantised)
    with weightlift.patch() as patch:
        adapted = module._load_shard_file

        def quantised(*arguments: Any, **named: Any) -> Any:
            return adapted(*arguments, **named | {"hf_quantizer": "there is one"})

        monkeypatch.setattr(module, "_load_shard_file", quantised)
        kind.from_pretrained(folder, device_map="cpu")
    assert seen == state(stock)
    assert [one.method_used["mmap"] for one in patch.reports] == [one.nbytes for one in patch.reports]
    assert len(patch.reports) == len(list(folder.glob("*.safetensors")))


def conditional_unet(seed: int = 0) -> Any:
    """A model with matrices that quantizers take."""
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        norm_num_groups=8,
    )


def noise_removed(model: Any) -> Any:
    with torch.no_grad():
        noise, context = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), torch.linspace(-1, 1, 320).reshape(1, 5, 64)
        return model(noise, torch.tensor(3.0), context).sample


QUANTISED: dict[str, tuple[dict[str, Any], str]] = {
    "4 bits": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "buffered"),
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "mmap"),
    "quanto": ({"quant_method": "quanto", "weights_dtype": "int8"}, "buffered"),
}
"""Ways to quantise, and how weights that are quantised so are read."""


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes can do without a GPU; only diffusers asks for one."""
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)


@pytest.mark.usefixtures("any_device")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning", "ignore:`Quanto:FutureWarning")
@pytest.mark.parametrize("shard", ["10GB", "8MB"], ids=["one file", "shards"])
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_models(name: str, shard: str, tmp_path: Path) -> None:
    config, way = QUANTISED[name]
    conditional_unet().save_pretrained(tmp_path / "whole", max_shard_size=shard)
    arguments: dict[str, Any] = {"device_map": "cpu", "torch_dtype": torch.float32}
    kind = diffusers.UNet2DConditionModel
    quantising = kind.from_pretrained(tmp_path / "whole", quantization_config=dict(config), **arguments)
    quantising.save_pretrained(tmp_path / "quantised", max_shard_size=shard)
    stock = kind.from_pretrained(tmp_path / "quantised", **arguments)
    with weightlift.patch() as patch:
        mine = kind.from_pretrained(tmp_path / "quantised", **arguments)
    assert torch.equal(noise_removed(mine), noise_removed(stock))
    files = len(list((tmp_path / "quantised").glob("*.safetensors")))
    assert [{key for key, nbytes in one.method_used.items() if nbytes} for one in patch.reports] == [{way}] * files
    # While they are being quantised, one at a time leaves its file.
    with weightlift.patch() as patch:
        mine = kind.from_pretrained(tmp_path / "whole", quantization_config=dict(config), **arguments)
    assert torch.equal(noise_removed(mine), noise_removed(quantising))
    assert {key for one in patch.reports for key, nbytes in one.method_used.items() if nbytes} == {"mmap"}


@pytest.mark.usefixtures("any_device")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_on_rocm_no_copy_comes_out_of_a_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conditional_unet().save_pretrained(tmp_path)
    kind, arguments = diffusers.UNet2DConditionModel, {"device_map": "cpu", "torch_dtype": torch.float32}
    stock = kind.from_pretrained(tmp_path, quantization_config=dict(QUANTISED["8 bits"][0]), **arguments)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    with weightlift.patch() as patch:
        mine = kind.from_pretrained(tmp_path, quantization_config=dict(QUANTISED["8 bits"][0]), **arguments)
    assert torch.equal(noise_removed(mine), noise_removed(stock))
    assert not any(one.method_used["mmap"] for one in patch.reports)


@pytest.mark.usefixtures("any_device")
def test_a_quantised_model_goes_to_the_device_that_bitsandbytes_chooses(
    tmp_path: Path, devices: FakeDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a map, too; what bitsandbytes unpacks stays on the CPU."""
    config, _ = QUANTISED["4 bits"]
    conditional_unet().save_pretrained(tmp_path / "whole")
    kind = diffusers.UNet2DConditionModel
    arguments: dict[str, Any] = {"device_map": "cpu", "quantization_config": dict(config)}
    kind.from_pretrained(tmp_path / "whole", **arguments).save_pretrained(tmp_path / "quantised")
    module, found = diffusers.models.modeling_utils, dict[str, Any]()

    class PlacedError(Exception):
        """Instead of what torch would have to know the fake GPU for."""

    def stop(state: dict[str, Any], *_: Any, **__: Any) -> None:
        found.update(state)
        raise PlacedError

    monkeypatch.setattr(module, "_load_shard_file", stop)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_caching_allocator_warmup", lambda *_: None)
    with weightlift.patch() as patch, pytest.raises(PlacedError):
        kind.from_pretrained(tmp_path / "quantised")
    for memory in devices.memories:
        memory._gpu.settle()
    assert set(patch.reports[0].device.split(", ")) == {"cpu", "cuda:0"}
    stored = safetensors.torch.load_file(next((tmp_path / "quantised").glob("*.safetensors")))
    assert {key: comparable(tensor) for key, tensor in found.items()} == {
        key: comparable(tensor) for key, tensor in stored.items()
    }


def test_its_tensors_go_to_their_devices(autoencoder: Path, devices: FakeDevices) -> None:
    """Onto (fake) GPUs by a map of modules; to go on, diffusers would need a torch that knows them."""
    path = next(autoencoder.glob("*.safetensors"))
    waiting = adapter._InFile(path, weightlift.open(path))
    reports: list[Any] = []
    placing = adapter._Adapter(diffusers.models.modeling_utils, {}, reports.append)
    name = next(iter(waiting))
    waiting["renamed.weight"] = waiting.pop(name)
    device_map = {"encoder": "cuda:0", "renamed": 1, "": "cpu"}
    found = placing.contents(waiting, functools.partial(placing.load, device_map=device_map))
    for memory in devices.memories:
        memory._gpu.settle()
    expected = safetensors.torch.load_file(path)
    expected["renamed.weight"] = expected.pop(name)
    assert {name: comparable(tensor) for name, tensor in found.items()} == {
        name: comparable(tensor) for name, tensor in expected.items()
    }
    assert set(reports[0].device.split(", ")) == {"cpu", "cuda:0", "cuda:1"}


def test_an_autoencoder(tmp_path: Path) -> None:
    model = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4)
    model.save_pretrained(tmp_path)
    with weightlift.patch():
        mine = diffusers.AutoencoderKL.from_pretrained(tmp_path, device_map="cpu")
    assert state(mine) == state(model)
