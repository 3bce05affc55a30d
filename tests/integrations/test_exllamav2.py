"""The real ExLlamaV2 over weightlift, its compiled extension replaced by one that does nothing."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
import transformers

from weightlift.errors import FormatError, OptionError, UnsupportedError
from weightlift.integrations import exllamav2 as integration
from weightlift.integrations import versions
from weightlift.testing.fake_devices import FakeDevices
from weightlift.testing.fake_gpu import FakeGpu

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from weightlift.integrations.installing import Installed

LINEAR = {
    "q_weight": torch.arange(64 * 32, dtype=torch.int32).reshape(64, 32),
    "q_invperm": torch.randperm(256, generator=torch.Generator().manual_seed(0)).to(torch.int32),
    "q_scale": torch.arange(32, dtype=torch.int32).reshape(8, 4),
    "q_scale_max": torch.linspace(0, 1, 8, dtype=torch.float16),
    "q_groups": torch.arange(16, dtype=torch.int16),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in half precision, in several files."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    path = tmp_path_factory.mktemp("exllamav2")
    transformers.LlamaForCausalLM(config).half().save_pretrained(path, max_shard_size="150KB")
    return path


@pytest.fixture
def stored(folder: Path) -> dict[str, Any]:
    return {
        name: tensor
        for shard in folder.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(shard).items()
    }


@pytest.fixture
def installed(exllamav2: Any) -> Iterator[Installed]:
    with integration.install() as found:
        yield found


def weights(model: Any) -> dict[str, Any]:
    """The weights that a model's modules hold, by the names that they have in its files."""
    found: dict[str, Any] = {}
    for module in model.modules_dict.values():
        for holder in ("linear", "embedding"):
            inner = getattr(module, holder, None)
            if isinstance(inner, torch.nn.Module):
                found[f"{module.key}.weight"] = inner.weight
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            found[f"{module.key}.weight"] = module.weight
    return found


def make(exllamav2: Any, folder: Path, **settings: Any) -> Any:
    config = exllamav2.ExLlamaV2Config(str(folder))
    for name, value in settings.items():
        setattr(config, name, value)
    return exllamav2.ExLlamaV2(config)


def load(model: Any, device: int) -> Any:
    for module in model.modules:
        module.set_device_idx(-1 if module is model.modules[0] else device)
        module.load()
    return model


def test_every_weight_on_the_cpu(
    exllamav2: Any, folder: Path, stored: dict[str, Any], installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(make(exllamav2, folder), -1)
    found = weights(model)
    assert found.keys() == stored.keys()
    # The embedding is padded with one row of its own.
    assert all(torch.equal(found[name][: len(tensor)], tensor) for name, tensor in stored.items())
    assert installed.loads >= len(stored)


def test_every_weight_on_a_device_and_neighbours_of_a_file_in_one_load(
    exllamav2: Any, folder: Path, stored: dict[str, Any], devices: FakeDevices, installed: Installed
) -> None:
    model = load(make(exllamav2, folder), 0)
    devices.memories[0]._gpu.settle()
    found = weights(model)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name][: len(tensor)], tensor) for name, tensor in stored.items())
    exllamav2.stloader.cleanup_stfiles()
    assert installed.report is not None
    assert installed.report.device == "cuda:0"
    # Attention, MLP and norms of two layers, last norm and head, fewer where neighbours are in one file; the embedding.
    assert installed.loads < 9


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    state = {
        f"model.layers.{layer}.{linear}.{name}": tensor + layer if name == "q_weight" else tensor.clone()
        for layer in range(2)
        for linear in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
        for name, tensor in LINEAR.items()
    }
    path = tmp_path / "exl2.safetensors"
    safetensors.torch.save_file(state, path)
    return path


def test_quantised_tensors_are_private_and_arrive_together(
    exllamav2: Any, quantised: Path, devices: FakeDevices, installed: Installed
) -> None:
    """ExLlamaV2 multiplies scales and shuffles weights in place: that may reach nobody else."""
    file = exllamav2.module.STFile(str(quantised))
    got = {
        f"{linear}.{name}": file.get_tensor(f"model.layers.1.self_attn.{linear}.{name}", "cuda:1")
        for linear in ("q_proj", "k_proj")
        for name in LINEAR
    }
    devices.memories[1]._gpu.settle()
    assert torch.equal(got["k_proj.q_weight"], LINEAR["q_weight"] + 1)
    got["q_proj.q_scale_max"] *= 3
    got["q_proj.q_weight"].zero_()
    for name, tensor in LINEAR.items():
        assert torch.equal(got[f"k_proj.{name}"], tensor + 1 if name == "q_weight" else tensor)
        again = file.get_tensor(f"model.layers.1.self_attn.q_proj.{name}", "cuda:1")
        devices.memories[1]._gpu.settle()
        assert torch.equal(again, tensor + 1 if name == "q_weight" else tensor)
    exllamav2.stloader.cleanup_stfiles()
    assert installed.report is not None
    # Both linears of the module, read twice.
    assert (installed.loads, installed.report.tensors) == (1, 4 * len(LINEAR))


def test_linears_that_are_rearranged_on_the_cpu_are_read_once_and_in_one_load_each(
    exllamav2: Any, tmp_path: Path, devices: FakeDevices, installed: Installed
) -> None:
    """ExLlamaV2 puts the rows of gate and up in the order that down wants, on the CPU, in every layer of its own."""
    linears = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(3) for name in ("down", "gate", "up")]
    state = {
        f"{linear}.{name}": tensor + place if name == "q_weight" else tensor.clone()
        for place, linear in enumerate(linears)
        for name, tensor in LINEAR.items()
    }
    path = tmp_path / "exl2.safetensors"
    safetensors.torch.save_file(state, path)
    file = exllamav2.module.STFile(str(path))
    got = {
        f"{linear}.{name}": file.get_tensor(f"{linear}.{name}", "cuda:0" if "down" in linear else "cpu")
        for linear in linears
        for name in LINEAR
    }
    devices.memories[0]._gpu.settle()
    assert all(torch.equal(got[name], tensor) for name, tensor in state.items())
    assert installed.loads == 6
    exllamav2.stloader.cleanup_stfiles()
    assert installed.report is not None
    assert (installed.loads, installed.report.device) == (7, "cuda:0")
    # Of the first layer gate and up came along, of the others no more.
    assert installed.report.tensors == (3 + 1 + 1) * len(LINEAR)


def test_out_of_memory_is_torchs_own_and_the_next_device_gets_everything(
    exllamav2: Any, quantised: Path, installed: Installed, fake_library: Path
) -> None:
    file = exllamav2.module.STFile(str(quantised))
    names = [f"model.layers.0.self_attn.q_proj.{name}" for name in LINEAR]
    with FakeGpu(fake_library, "cuda", seed=1, memory_bytes=64 << 20) as gpu, FakeDevices(gpu) as fakes:
        filling = fakes.memories[0].allocate(torch.uint8, ((64 << 20) - 8192,))
        with pytest.raises(torch.OutOfMemoryError):
            file.get_tensor(names[0], "cuda:0")
        got = [file.get_tensor(name, "cuda:1") for name in names]
        gpu.settle()
        assert all(map(torch.equal, got, LINEAR.values()))
        del filling
        exllamav2.stloader.cleanup_stfiles()
    assert installed.report is not None
    assert (installed.loads, installed.report.device) == (1, "cuda:1")


def test_requests_for_another_device_drop_what_waits(
    exllamav2: Any, quantised: Path, devices: FakeDevices, installed: Installed
) -> None:
    file = exllamav2.module.STFile(str(quantised))
    name = "model.layers.0.self_attn.{}.q_scale"
    file.get_tensor(name.format("q_proj"), "cuda:0")
    file.get_tensor(name.format("k_proj"), "cuda:1")
    assert installed.loads == 1
    file.get_tensor(name.format("k_proj"), "cuda:0")
    assert installed.loads == 2
    exllamav2.stloader.cleanup_stfiles()
    assert installed.loads == 3


def test_names_that_exllamav2_changed(exllamav2: Any, quantised: Path, installed: Installed) -> None:
    file = exllamav2.module.STFile(str(quantised), keymap=[("$model.", "decoder."), ("up_proj", "w3")])
    got = file.get_tensor("decoder.layers.1.mlp.w3.q_weight", "cpu")
    assert torch.equal(got, LINEAR["q_weight"] + 1)


def test_types_are_converted_and_refused_as_before(exllamav2: Any, tmp_path: Path, installed: Installed) -> None:
    path = tmp_path / "odd.safetensors"
    tensors = {"a.b.weight": torch.linspace(0, 1, 8, dtype=torch.bfloat16), "a.b.long": torch.arange(3)}
    safetensors.torch.save_file(tensors, path)
    file = exllamav2.module.STFile(str(path))
    half = file.get_tensor("a.b.weight", "cpu", torch.half)
    assert torch.equal(half, tensors["a.b.weight"].half())
    with pytest.raises(ValueError, match="I64"):
        file.get_tensor("a.b.long", "cpu")
    with pytest.raises(KeyError):
        file.get_tensor("a.b.nothing", "cpu")


@pytest.mark.parametrize("way", ["config", "argument", "environment", "nothing", "own method"])
def test_its_settings_for_direct_reads(exllamav2: Any, folder: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from exllamav2 import model_init

    if way == "environment":
        monkeypatch.setenv("EXLLAMA_FASTTENSORS", "1")
    keywords: Any = {"method": "buffered"} if way == "own method" else {}
    with integration.install(**keywords) as installed:
        if way == "argument":
            arguments = type("Arguments", (), {"fast_safetensors": True})
            with pytest.raises(AttributeError):  # it goes on to read the other arguments
                model_init.init(arguments)
        model = make(exllamav2, folder, fasttensors=way in {"config", "own method"})
        norm = model.modules[-2]
        norm.set_device_idx(-1)
        norm.load()
        assert installed.report is not None
        expected = {"nothing": "auto", "own method": "buffered"}.get(way, "direct")
        assert installed.report.method_requested == expected


def test_threads(exllamav2: Any, quantised: Path, installed: Installed) -> None:
    file = exllamav2.module.STFile(str(quantised))
    names = [name for name in file.get_dict() if name.endswith(("q_weight", "q_scale"))]

    def read(seed: int) -> bool:
        own = names.copy()
        random.Random(seed).shuffle(own)
        expected = {name: LINEAR[name.rpartition(".")[2]] for name in own}
        return all(
            torch.equal(file.get_tensor(name, "cpu"), tensor + (".1." in name) * name.endswith("q_weight"))
            for name, tensor in expected.items()
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(8)))


def test_a_damaged_file_is_named(exllamav2: Any, quantised: Path, installed: Installed) -> None:
    file = exllamav2.module.STFile(str(quantised))
    quantised.write_bytes(quantised.read_bytes()[:-10])
    with pytest.raises(Exception, match=r"exl2\.safetensors.*cut off") as failure:
        file.get_tensor("model.layers.0.self_attn.q_proj.q_weight", "cpu")
    assert isinstance(failure.value.__cause__, FormatError)


def test_everything_is_put_back(exllamav2: Any, quantised: Path) -> None:
    from exllamav2 import config, model, model_init, module, stloader

    names = (
        *((stloader, "cleanup_stfiles"), (config, "cleanup_stfiles"), (model, "cleanup_stfiles")),
        *((model_init, "init"), (stloader.STFile, "get_tensor"), (module.ExLlamaV2Module, "load_multi")),
    )
    before = [owner.__dict__[name] for owner, name in names]
    with integration.install() as installed:
        assert all(owner.__dict__[name] is not kept for (owner, name), kept in zip(names, before, strict=True))
        assert "exllamav2.stloader.STFile.get_tensor" in installed.replaced
        assert "exllamav2.model.cleanup_stfiles" in repr(installed)
        stloader.STFile(str(quantised)).get_tensor("model.layers.0.mlp.up_proj.q_scale", "cpu")
        model.cleanup_stfiles()
    assert [owner.__dict__[name] for owner, name in names] == before


def test_versions_and_options_are_judged_first(exllamav2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError):
        integration.install(method="fast")
    monkeypatch.setattr(versions, "installed_version", lambda _: "0.4.0")
    with pytest.raises(UnsupportedError, match=r"exllamav2 0\.4\.0 .* 0\.3\.2"):
        integration.install()
    integration.install(allow_untested=True).undo()
