"""transformers itself, on tiny models of real architectures: loading over weightlift changes nothing but the way."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
import transformers

import weightlift
from weightlift.errors import OptionError, UnsupportedError
from weightlift.integrations import sessions, versions
from weightlift.integrations.pretrained import from_pretrained
from weightlift.testing.differential import comparable

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.testing.fake_devices import FakeDevices


@pytest.fixture
def delivered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that came through a stream, in the order in which they came."""
    seen: list[str] = []
    original = sessions.Session._deliver

    def deliver(self: sessions.Session) -> None:
        before = set(self._waiting)
        original(self)
        seen.extend(before - set(self._waiting))

    monkeypatch.setattr(sessions.Session, "_deliver", deliver)
    return seen


def state(model: Any) -> dict[str, Any]:
    return {name: comparable(tensor) for name, tensor in model.state_dict().items()}


def answers(model: Any) -> Any:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}},
    ],
    ids=str,
)
def test_a_sharded_model(
    llama: Path, delivered: list[str], monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(sessions, "_UNIT_BYTES", 1)
    stock = transformers.AutoModelForCausalLM.from_pretrained(llama, **arguments)
    assert not delivered
    with weightlift.patch() as patch:
        mine = transformers.AutoModelForCausalLM.from_pretrained(llama, **arguments)
    assert state(mine) == state(stock)
    assert torch.equal(answers(mine), answers(stock))
    assert len(delivered) == len(list(stock.state_dict()))
    assert patch.reports[-1].tensors == len(delivered)
    # One stream in the order in which transformers uses them: by number, not by text.
    layers = [int(name.split(".")[2]) for name in delivered if ".layers." in name]
    assert layers == sorted(layers)


def test_tied_weights_stay_tied(tmp_path: Path, delivered: list[str]) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    stock = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    with weightlift.patch():
        mine = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert mine.lm_head.weight.data_ptr() == mine.transformer.wte.weight.data_ptr()
    assert state(mine) == state(stock)
    assert "lm_head.weight" not in delivered


def test_weights_that_are_merged_while_loading(tmp_path: Path, delivered: list[str]) -> None:
    """Experts are stored one by one and used as one tensor: many requests for one result."""
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=128,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    stock = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    with weightlift.patch():
        mine = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    assert state(mine) == state(stock)
    assert len(delivered) == len(stored) > len(mine.state_dict())


def test_a_base_model_of_a_larger_one(llama: Path) -> None:
    """Weights that are not wanted are not read, and a prefix is taken off the names of the others."""
    stock = transformers.AutoModel.from_pretrained(llama)
    with weightlift.patch() as patch:
        mine = transformers.AutoModel.from_pretrained(llama)
    assert state(mine) == state(stock)
    assert patch.reports[-1].tensors == len(stock.state_dict())


def test_missing_weights_are_made_as_before(tmp_path: Path, llama: Path) -> None:
    class Longer(transformers.LlamaForCausalLM):  # type: ignore[misc] # transformers is not typed here
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.more = torch.nn.Linear(4, 4)

    with weightlift.patch():
        mine, info = Longer.from_pretrained(llama, output_loading_info=True)
    assert {"more.weight", "more.bias"} == set(info["missing_keys"])
    assert not any(tensor.is_meta for tensor in mine.state_dict().values())


@pytest.mark.parametrize("setting", ["HF_DEACTIVATE_ASYNC_LOAD"])
def test_without_its_pool_of_threads(
    llama: Path, delivered: list[str], monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    stock = transformers.AutoModelForCausalLM.from_pretrained(llama)
    monkeypatch.setenv(setting, "1")
    with weightlift.patch():
        mine = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert state(mine) == state(stock)
    assert len(delivered) == len(stock.state_dict())


def test_with_weights_offloaded_to_disk(llama: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map["lm_head"] = "cpu"
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        llama, device_map=dict(device_map), offload_folder=tmp_path / "stock"
    )
    with weightlift.patch():
        mine = transformers.AutoModelForCausalLM.from_pretrained(
            llama, device_map=dict(device_map), offload_folder=tmp_path / "mine"
        )
        assert torch.equal(answers(mine), answers(stock))


def test_mapped_views_where_they_are_asked_for(llama: Path, delivered: list[str]) -> None:
    stock = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with weightlift.patch(method="mmap"):
        mine = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert state(mine) == state(stock)
    assert not delivered


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
    ids="".join,
)
def test_a_quantised_model(llama: Path, tmp_path: Path, delivered: list[str], options: dict[str, Any]) -> None:
    """While bitsandbytes quantises it, and once it is stored so."""
    kind, arguments = transformers.LlamaForCausalLM, {"device_map": "cpu", "dtype": torch.float32}
    config = transformers.BitsAndBytesConfig(**options)
    quantising = kind.from_pretrained(llama, quantization_config=config, **arguments)
    with weightlift.patch() as patch:
        mine = kind.from_pretrained(llama, quantization_config=config, **arguments)
    assert torch.equal(answers(mine), answers(quantising))
    assert len(delivered) == patch.reports[-1].tensors
    assert "model.layers.3.mlp.up_proj.weight" in delivered
    quantising.save_pretrained(tmp_path)
    delivered.clear()
    stock = kind.from_pretrained(tmp_path, **arguments)
    with weightlift.patch() as patch:
        mine = kind.from_pretrained(tmp_path, **arguments)
    assert torch.equal(answers(mine), answers(stock))
    assert len(delivered) == patch.reports[-1].tensors
    assert any("quant_state" in name or name.endswith(".SCB") for name in delivered)


@pytest.fixture
def damaged(llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(llama, folder)
    shard = sorted(folder.glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-100])
    return folder


def test_a_damaged_shard_is_refused_in_the_librarys_own_class(damaged: Path) -> None:
    with pytest.raises(safetensors.SafetensorError):
        transformers.AutoModelForCausalLM.from_pretrained(damaged)
    with weightlift.patch(), pytest.raises(safetensors.SafetensorError, match="cut off"):
        transformers.AutoModelForCausalLM.from_pretrained(damaged)


def test_a_failure_while_reading_is_no_half_loaded_model(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that shrinks after its header was read."""
    original = sessions.Session._begin

    def begin(self: sessions.Session) -> None:
        original(self)
        raise OSError("the storage went away")

    monkeypatch.setattr(sessions.Session, "_begin", begin)
    with weightlift.patch(), pytest.raises(OSError, match="went away"):
        transformers.AutoModelForCausalLM.from_pretrained(llama)


def test_requests_go_straight_to_their_devices(llama: Path, devices: FakeDevices) -> None:
    """What the adapter asks for lands on the (fake) GPU without torch knowing of it, converted as asked."""
    expected = {
        name: tensor
        for shard in sorted(llama.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(shard).items()
    }
    with weightlift.patch():
        session = sessions.Session({})
        handles = [safetensors.safe_open(shard, framework="pt") for shard in sorted(llama.glob("*.safetensors"))]
        pending = {
            name: session.request(handle.get_slice(name), f"cuda:{number % 2}", torch.Tensor.contiguous)
            for number, handle in enumerate(handles)
            for name in reversed(handle.keys())
        }
        got = {name: future.result() for name, future in pending.items()}
    for fakes in devices.memories:
        fakes._gpu.settle()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert session.report is not None
    assert session.report.device == "cuda:0, cuda:1"
    assert session.report.staging in {"pinned", "pageable"}


def test_what_is_not_asked_for_is_cancelled(llama: Path) -> None:
    session = sessions.Session({})
    with weightlift.patch():
        handle = safetensors.safe_open(min(llama.glob("*.safetensors")), framework="pt")
        first, *rest = [session.request(handle.get_slice(name), "cpu", torch.clone) for name in handle.keys()]  # noqa: SIM118
    first.result()
    session.close()
    assert all(pending.cancelled() or pending.done() for pending in rest)
    assert any(pending.cancelled() for pending in rest)


def test_one_call_without_a_patch_of_ones_own(llama: Path, delivered: list[str]) -> None:
    stock = transformers.AutoModelForCausalLM.from_pretrained(llama)
    mine = from_pretrained(transformers.AutoModelForCausalLM, llama, weightlift={"method": "buffered"})
    assert state(mine) == state(stock)
    assert delivered
    with pytest.raises(OptionError):
        from_pretrained(transformers.AutoModelForCausalLM, llama, weightlift={"method": "fast"})


def test_versions_that_were_not_tried(llama: Path, monkeypatch: pytest.MonkeyPatch, delivered: list[str]) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda _: "6.0.1")
    with pytest.raises(UnsupportedError, match=r"transformers 6\.0\.1 .* 5\.x.*\n.*allow_untested"):
        from_pretrained(transformers.AutoModelForCausalLM, llama)
    with weightlift.patch() as patch:
        transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert "6.0.1" in patch.skipped["transformers"]
    assert not delivered
    from_pretrained(transformers.AutoModelForCausalLM, llama, allow_untested=True)
    monkeypatch.setenv("WEIGHTLIFT_UNTESTED_VERSIONS", "1")
    with weightlift.patch():
        transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert delivered
