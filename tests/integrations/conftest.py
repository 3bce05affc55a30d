"""Tiny models of real architectures with random weights, and no network."""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.util
import os
import sys
import types
from typing import TYPE_CHECKING, Any, cast

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


def _stand_in(name: str) -> types.ModuleType:
    """A compiled extension that does nothing; what looks at it takes it for a built one."""

    def attribute(wanted: str) -> Any:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return lambda *_, **__: 0

    module = types.ModuleType(name)
    path = f"/nowhere/{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    module.__file__ = path
    module.__spec__ = importlib.machinery.ModuleSpec(name, cast(Any, importlib.machinery.BuiltinImporter), origin=path)
    module.__dict__["__getattr__"] = attribute
    return module


@pytest.fixture(scope="session")
def exllamav2() -> Any:
    """The real package over a stand-in for its compiled extension."""
    sys.modules.setdefault("exllamav2_ext", _stand_in("exllamav2_ext"))
    return pytest.importorskip("exllamav2", reason="exllamav2 is not installed")


@pytest.fixture(scope="session")
def exllamav3_loader() -> Any:
    """The real package's loader over a stand-in for its compiled extension.

    Its ``__init__`` imports all models and with them triton, which comes with torch for GPUs only; it is passed by.
    """
    spec = importlib.util.find_spec("exllamav3")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("exllamav3 is not installed")
    sys.modules.setdefault("exllamav3_ext", _stand_in("exllamav3_ext"))
    package = types.ModuleType("exllamav3")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules.setdefault("exllamav3", package)
    return importlib.import_module("exllamav3.loader.safetensors")
