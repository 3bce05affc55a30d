"""What inspect says of a model as a whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch

from weightlift.cli.main import main
from weightlift.formats import describe
from weightlift.reports.model_summary import FILE_TYPES, summarise_model
from weightlift.testing import (
    GGUFSpec,
    TensorSpec,
    exl2_specs,
    exl3_specs,
    write_checkpoint,
    write_gguf,
    write_llama_gguf,
)

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"layers": 2, "hidden": 256, "keys": 128, "inner": 512, "vocabulary": 512}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "quantization_config": {"quant_method": "exl2", "bits": 4.0, "head_bits": 6, "version": "0.2.4"},
}
SCREEN_LINES = 50


def matrices() -> int:
    """Elements of the matrices of one model of those sizes."""
    hidden, keys, inner = SIZES["hidden"], SIZES["keys"], SIZES["inner"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    return SIZES["layers"] * layer + hidden * SIZES["vocabulary"]


def others() -> int:
    return SIZES["vocabulary"] * SIZES["hidden"] + (2 * SIZES["layers"] + 1) * SIZES["hidden"]


def screen(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["inspect", *words]) == 0
    return capsys.readouterr().out


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(screen(capsys, *words, "--json"))
    return value


def test_recipes_are_theirs() -> None:
    theirs = {kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    theirs = {number: name for number, name in theirs.items() if number in FILE_TYPES}
    assert theirs == {number: name for number, name in FILE_TYPES.items() if number in theirs}
    assert theirs.keys() == FILE_TYPES.keys()


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_exl3(tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "m", exl3_specs(bits=bits, **SIZES))
    (path / "config.json").write_text(json.dumps(CONFIG))
    summary = summarise_model(describe(path))
    assert summary.kind == "EXL3"
    assert summary.weights == matrices() + others()
    assert [part.linears for part in summary.mix] == [sum(part.linears for part in summary.mix)] or len(summary.mix) > 1
    assert sum(part.linears for part in summary.mix) == 7 * SIZES["layers"] + 1
    assert sum(part.weights for part in summary.mix) == matrices()
    # Scales of the small test matrices weigh some tenths of a bit.
    assert bits < summary.facts["bits_per_weight_of_linears"] < bits + 0.3
    assert summary.facts["architecture"] == "LlamaForCausalLM"
    text = screen(capsys, str(path))
    for words in ("quantised as EXL3", "context length  ", "8,192", "bits a weight", "head bits", "0.2.4"):
        assert words in text
    assert len(text.splitlines()) <= SCREEN_LINES


def test_exl2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "m", exl2_specs(bits=4, **SIZES))
    summary = summarise_model(describe(path))
    assert summary.kind == "EXL2"
    assert summary.weights == matrices() + others()
    assert 4 < summary.facts["bits_per_weight_of_linears"] < 4.6
    assert summary.bits_per_weight == pytest.approx(8 * describe(path).total_bytes / summary.weights, abs=0.001)
    found = answer(capsys, str(path))
    assert found["model"]["kind"] == "EXL2"
    assert sum(part["bytes"] for part in found["model"]["mix"]) < found["bytes"]
    assert len(screen(capsys, str(path)).splitlines()) <= SCREEN_LINES


def test_a_mix_of_bits(tmp_path: Path) -> None:
    specs = [
        TensorSpec("a.trellis", "I16", (64, 64, 16 * 4)),
        TensorSpec("b.trellis", "I16", (64, 64, 16 * 4)),
        TensorSpec("lm_head.trellis", "I16", (64, 64, 16 * 6)),
    ]
    summary = summarise_model(describe(write_checkpoint(tmp_path / "m", specs)))
    assert [(part.bits, part.linears) for part in summary.mix] == [(4.0, 2), (6.0, 1)]
    assert summary.facts["bits_per_weight_of_head"] == 6.0


def test_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_llama_gguf(tmp_path / "m.gguf", context=4096)
    summary = summarise_model(describe(path))
    assert summary.kind == "GGUF"
    facts = summary.facts
    assert (facts["architecture"], facts["context_length"], facts["layers"], facts["vocabulary"]) == (
        "llama",
        4096,
        2,
        512,
    )
    assert facts["bits_per_weight_of_quantised"] == 8.5
    text = screen(capsys, str(path))
    for words in ("format         GGUF", "context length", "4,096", "Q8_0", "8.5", "bits a weight"):
        assert words in text
    assert len(text.splitlines()) <= SCREEN_LINES
    found = answer(capsys, str(path))
    assert found["format"] == "GGUF"
    assert found["metadata"]["tokenizer.ggml.tokens"] == "512 × string"
    assert found["model"]["facts"]["context_length"] == 4096


def test_gguf_recipe_and_numbers_per_layer(tmp_path: Path) -> None:
    metadata = {"general.file_type": 15, "llama.attention.head_count_kv": [4, 8], "llama.context_length": 7}
    path = write_gguf(tmp_path / "m.gguf", [GGUFSpec("t", "Q4_K", (2, 256))], metadata=metadata)
    facts = summarise_model(describe(path)).facts
    assert (facts["file_type"], facts["key_value_heads"], facts["context_length"]) == ("Q4_K_M", "2 × int32", 7)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": 3, "quantization_config": [1], "hidden_size": {}}'])
def test_a_useless_config_is_no_error(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "m", [TensorSpec("a", "F32", (3,))])
    (path / "config.json").write_text(text)
    assert answer(capsys, str(path))["model"]["kind"] == "safetensors"


def test_text_from_files_is_shown_without_its_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"general.name": "\x1b[31mred", "evil\x1b[2J": ["\x1b[0m"], "list\x1b": "\x1b]0;title\x07"}
    path = write_gguf(tmp_path / "m.gguf", [GGUFSpec("t\x1b[1m", "F32", (1,))], metadata=metadata)
    assert "\x1b" not in screen(capsys, str(path))


def test_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"a": torch.ones(3, 4).t()}, "epoch": 3, "key": b"\xff"}, tmp_path / "m.pt")
    found = answer(capsys, str(tmp_path / "m.pt"))
    assert (found["format"], found["model"]["kind"]) == ("PyTorch", "PyTorch")
    assert found["metadata"] == {"epoch": 3, "key": "b'\\xff'"}
    assert found["list"][0]["strides"] == [1, 4]
    assert "epoch" in screen(capsys, str(tmp_path / "m.pt"))


def test_what_was_not_taken_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "m", [TensorSpec("a", "F32", (3,))])
    write_gguf(path / "m.gguf", [GGUFSpec("t", "F32", (1,))])
    assert "1 of GGUF): safetensors was taken" in screen(capsys, str(path))
    assert "1 of GGUF): safetensors was taken" in answer(capsys, str(path))["notes"][0]
