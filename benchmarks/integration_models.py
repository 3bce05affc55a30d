"""The models that frameworks are measured with: whole ones with random weights, written to disk and known to be there.

Knows what each kind of model consists of, at full size and at one that only tries the steps; nothing of loads.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weightlift.testing import exl2_specs

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.testing import TensorSpec

LLAMA: Final = {
    "full": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 14, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512},
}
HEADS: Final = {"full": 32, "tiny": 4}
SHARD: Final = {"full": "4GB", "tiny": "300KB"}

EXL2: Final = {
    "full": {"hidden": 8192, "keys": 1024, "inner": 28672, "vocabulary": 32000, "layers": 8},
    "tiny": {"hidden": 256, "keys": 128, "inner": 512, "vocabulary": 512, "layers": 2},
}
"""A tenth of a 70B."""
EXL2_BITS: Final = 4
EXL2_GROUP_ROWS: Final = 128
HEAD_SIZE: Final = 128

UNET: Final = {"full": (512, 1024, 2048, 2048), "tiny": (32, 64)}
"""Channels of a diffusion model's blocks; those of Stable Diffusion 1.5 are 320, 640, 1280 and 1280."""
UNET_CONTEXT: Final = 768


def llama(folder: Path, size: str, device: str) -> None:
    """A Llama in half precision, in two shards or more."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        **LLAMA[size],
        num_attention_heads=HEADS[size],
        num_key_value_heads=HEADS[size],
        max_position_embeddings=2048,
        dtype=torch.float16,
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.float16)
    model.save_pretrained(folder, max_shard_size=SHARD[size])


def exl2(folder: Path, size: str, device: str) -> None:
    """A Llama quantised for ExLlamaV2 to 4 bits a weight, one file: random weights and scales, every group of rows."""
    import torch
    import transformers
    from safetensors.torch import save_file

    shape = EXL2[size]
    specs = exl2_specs(bits=EXL2_BITS, **shape)
    with torch.device(device):
        tensors = {spec.name: _exl2_tensor(spec) for spec in specs}
    save_file(tensors, folder / "output.safetensors")
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        vocab_size=shape["vocabulary"],
        num_attention_heads=shape["hidden"] // HEAD_SIZE,
        num_key_value_heads=shape["keys"] // HEAD_SIZE,
        head_dim=HEAD_SIZE,
        max_position_embeddings=2048,
    ).save_pretrained(folder)


def _exl2_tensor(spec: TensorSpec) -> Any:
    """One tensor with contents that ExLlamaV2's kernels take for a quantised matrix, weights of usual size."""
    import torch

    kind, shape = spec.name.rsplit(".", 1)[-1], spec.shape
    if kind in {"q_weight", "q_scale"}:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
    if kind == "q_invperm":
        return torch.randperm(shape[0], dtype=torch.int32)
    if kind == "q_groups":
        # Of each group the bits, and the row of packed words that it begins with.
        begins = torch.arange(shape[0] // 2) * (EXL2_GROUP_ROWS * EXL2_BITS // 32)
        return torch.stack([torch.full_like(begins, EXL2_BITS), begins], dim=1).flatten().to(torch.int16)
    if kind == "q_scale_max":
        return torch.full(shape, 0.01, dtype=torch.float16)
    if spec.name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.float16)
    return (torch.randn(shape) * 0.02).to(torch.float16)


def unet(folder: Path, size: str, device: str) -> None:
    """The part of a Stable Diffusion pipeline that holds nearly all of its weights, in half precision."""
    import diffusers
    import torch

    channels = UNET[size]
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",) * 2}
    with torch.device(device):
        model = diffusers.UNet2DConditionModel(
            block_out_channels=channels, cross_attention_dim=UNET_CONTEXT, **({} if size == "full" else kinds)
        ).to(torch.float16)
    model.save_pretrained(folder)


MODELS: Final[dict[str, Callable[[Path, str, str], None]]] = {"llama": llama, "exl2": exl2, "unet": unet}


def make(name: str, folder: Path, size: str, device: str) -> dict[str, Any]:
    """Write a model to a folder; returns how large it is."""
    import torch

    torch.manual_seed(0)
    folder.mkdir()
    MODELS[name](folder, size, device)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"bytes": sum(file.stat().st_size for file in files), "files": len(files)}


if __name__ == "__main__":
    # In a process of its own, so that its device memory is given back.
    print(json.dumps(make(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])))
