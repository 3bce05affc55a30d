"""Tiny models of real architectures with random weights, and no network."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

# Read when the libraries are imported; nothing here is to be fetched.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from weightlift.integrations import patching
from weightlift.testing.fake_devices import FakeDevices
from weightlift.testing.fake_gpu import FakeGpu, FakeGpuUnavailable, build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    yield
    left = list(patching._active)
    for patch in reversed(left):
        patch.undo()
    assert not left
    gc.collect()


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("fake-gpu"))
    except FakeGpuUnavailable as err:
        pytest.skip(str(err))


@pytest.fixture
def devices(fake_library: Path) -> Iterator[FakeDevices]:
    """A fake GPU that torch knows nothing of: only weightlift's own way to a device works on it."""
    with FakeGpu(fake_library, "cuda", seed=1, memory_bytes=256 << 20) as gpu, FakeDevices(gpu) as fakes:
        yield fakes


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Llama checkpoint; its twelve layers sort differently as text and as numbers."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200KB")
    return folder


def logits(model: Any) -> Any:
    """What a language model makes of a few fixed tokens."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits
