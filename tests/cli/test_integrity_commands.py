"""``weightlift manifest``, ``weightlift verify`` and ``weightlift load --verify``."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

import weightlift as wl
from weightlift.cli.main import main
from weightlift.testing import TensorSpec, make_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", shape=(256, 300), count=6, shards=2, seed=3)[0]


def damage(folder: Path, tensor: str) -> None:
    info = wl.open(folder)[tensor]
    content = bytearray(info.path.read_bytes())
    content[info.offset] ^= 1
    info.path.write_bytes(content)


def test_the_manifest_goes_beside_the_weights_and_is_found_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["manifest", str(folder), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert made == {
        "schema": 1,
        "manifest": str(folder / "weightlift-manifest.json"),
        "files": 2,
        "tensors": 6,
        "bytes": size,
    }
    assert main(["verify", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("2 files, 6 tensors: as the manifest says")
    # A second look at the folder is not confused by the manifest in it.
    assert main(["load", str(folder), "--device", "null", "--verify", made["manifest"], "--json"]) == 0


def test_a_change_is_named_and_the_exit_code_says_failed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensor = list(wl.open(folder))[3]
    manifest = folder.parent / "known.json"
    assert main(["manifest", str(folder), "--output", str(manifest)]) == 0
    damage(folder, tensor)
    capsys.readouterr()
    assert main(["verify", str(folder), str(manifest), "--host-memory", "8MiB", "--method", "buffered"]) == 1
    captured = capsys.readouterr()
    assert f"tensor '{tensor}' has other bytes" in captured.out
    assert "2 differences" in captured.err
    assert main(["verify", str(folder), str(manifest), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["schema"], answer["ok"]) == (1, False)
    assert {(found["kind"], found["name"]) for found in answer["differences"]} == {
        ("file", wl.open(folder)[tensor].path.name),
        ("tensor", tensor),
    }
    assert main(["load", str(folder), "--device", "null", "--verify", str(manifest), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["tensor"]) == ("IntegrityError", tensor)


def test_a_manifest_can_go_to_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir(folder))
    assert main(["manifest", str(folder), "-o", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1
    assert sorted(os.listdir(folder)) == before


def test_names_out_of_files_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", [TensorSpec("a\x1b[2J", "U8", (4,))])
    assert main(["manifest", str(path)]) == 0
    assert (tmp_path / "model.safetensors.manifest.json").exists()
    damage(path, "a\x1b[2J")
    assert main(["verify", str(path)]) == 1
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["verify", "{folder}"], 1, "CheckpointNotFoundError"),
        (["verify", "{folder}", "{folder}/model.safetensors.index.json"], 1, "ManifestError"),
        (["verify", "{folder}", "--host-memory", "1MiB"], 4, "BudgetError"),
        (["verify", "{folder}", "--names", "*"], 2, "UsageError"),
        (["manifest", "{folder}.missing"], 1, "CheckpointNotFoundError"),
        (["manifest", "{folder}", "--output", "{folder}/no/such/place"], 1, "WriteError"),
    ],
)
def test_errors(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, kind: str) -> None:
    if kind == "BudgetError":
        assert main(["manifest", str(folder)]) == 0
        capsys.readouterr()
    assert main([*(word.format(folder=folder) for word in words), "--json"]) == code
    assert json.loads(capsys.readouterr().out)["error"]["type"] == kind
