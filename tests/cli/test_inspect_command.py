"""``weightlift inspect``: JSON, filters and limits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.cli.inspect import TENSORS_SHOWN
from weightlift.cli.main import main
from weightlift.testing import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

SPECS = [TensorSpec(f"layer.{number:02}.weight", "F16", (number + 1, 4)) for number in range(60)]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(write_checkpoint(tmp_path / "model", SPECS, shards=3, metadata={"format": "pt"}))


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["inspect", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(output(capsys, *words, "--json"))
    return value


def test_json_tells_everything(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, path)
    assert (found["schema"], found["path"], found["tensors"], found["tensors_total"]) == (1, path, 60, 60)
    assert found["parameters"] == sum(4 * (number + 1) for number in range(60))
    assert found["bytes"] == 2 * found["parameters"]
    assert found["metadata"] == {"format": "pt"}
    assert found["dtypes"] == [
        {"dtype": "F16", "tensors": 60, "parameters": found["parameters"], "bytes": found["bytes"]}
    ]
    assert len(found["files"]) == 3
    assert sum(file["tensors"] for file in found["files"]) == 60
    listed = {entry["name"]: (entry["dtype"], tuple(entry["shape"]), entry["bytes"]) for entry in found["list"]}
    assert listed == {spec.name: ("F16", spec.shape, spec.nbytes) for spec in SPECS}


def test_names_and_limits_filter(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(
        capsys, path, "--names", "layer.0?.*", "--names", "layer.59.weight", "--sort", "size", "--limit", "2"
    )
    assert (found["tensors"], found["tensors_total"]) == (11, 60)
    assert [entry["name"] for entry in found["list"]] == ["layer.59.weight", "layer.09.weight"]
    assert answer(capsys, path, "--no-tensors")["list"] is None


def test_text_is_short_unless_all_is_wanted(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, path).count("layer.") == TENSORS_SHOWN
    assert output(capsys, path, "--limit", "0").count("layer.") == len(SPECS)
    assert output(capsys, path, "--no-tensors").count("layer.") == 0
    assert "format" in output(capsys, path)


def test_an_empty_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = str(write_checkpoint(tmp_path / "empty.safetensors", []))
    assert answer(capsys, empty)["list"] == []
    assert "0 in 0 files" in output(capsys, empty)


@pytest.mark.parametrize("limit", ["-1", "many", "1.5", "²"])
def test_a_bad_limit_is_a_usage_error(path: str, capsys: pytest.CaptureFixture[str], limit: str) -> None:
    assert main(["inspect", path, f"--limit={limit}"]) == 2
    assert "whole number" in capsys.readouterr().err


def test_strict_rules_are_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f'{{"a":{entry},"a":{entry}}}'.encode()
    file = tmp_path / "twice.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    assert main(["inspect", str(file)]) == 0
    assert main(["inspect", str(file), "--header", "strict"]) == 1
    assert "error: " in capsys.readouterr().err
