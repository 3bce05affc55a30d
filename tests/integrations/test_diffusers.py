"""diffusers itself, on tiny models of real architectures."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

import weightlift
from weightlift.integrations.pretrained import from_pretrained
from weightlift.testing.differential import comparable

if TYPE_CHECKING:
    from pathlib import Path


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


def test_an_autoencoder(tmp_path: Path) -> None:
    model = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4)
    model.save_pretrained(tmp_path)
    with weightlift.patch():
        mine = diffusers.AutoencoderKL.from_pretrained(tmp_path, device_map="cpu")
    assert state(mine) == state(model)
