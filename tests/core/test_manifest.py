"""Manifests: their form, what is refused of it, and where they are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import weightlift as wl
from weightlift.errors import CheckpointNotFoundError, ManifestError
from weightlift.formats import describe
from weightlift.manifest import (
    FileEntry,
    Manifest,
    TensorEntry,
    file_names,
    manifest_path,
    read_manifest,
    write_manifest,
)
from weightlift.testing import TensorSpec, write_checkpoint

MANIFEST = Manifest(
    files={"a/model.safetensors": FileEntry(12, "0" * 64)},
    tensors={'odd "name"\n': TensorEntry("a/model.safetensors", "F32", (2, 0), 0, "f" * 32)},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for manifest in (MANIFEST, Manifest(files={}, tensors={})):
        write_manifest(manifest, path)
        assert read_manifest(path) == manifest
        assert os.listdir(tmp_path) == ["manifest.json"]
    content = json.loads(MANIFEST.to_bytes())
    assert content["schema"] == 1
    assert content["files"] == {"a/model.safetensors": {"bytes": 12, "sha256": "0" * 64}}
    assert content["tensors"]['odd "name"\n']["shape"] == [2, 0]
    assert MANIFEST.to_bytes().count(b"\n") == 7


def test_a_manifest_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_manifest(MANIFEST, tmp_path / "taken")
    assert os.listdir(tmp_path) == ["taken"]


Change = tuple[str, dict[str, Any]]


def files(name: str) -> Change:
    return "files", {name: {"bytes": 1, "sha256": "0" * 64}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("top", {"schema": 2}), "schema 2"),
        (("top", {"schema": "1"}), "not a manifest"),
        (("top", {"files": []}), "not a manifest"),
        (("top", {"files": {}}), "a file that it does not list"),
        (("tensor", {"file": "b.safetensors"}), "a file that it does not list"),
        (("tensor", {"xxh3_128": "F" * 32}), "not a manifest"),
        (("tensor", {"xxh3_128": "f" * 31}), "not a manifest"),
        (("tensor", {"bytes": -1}), "not a manifest"),
        (("tensor", {"bytes": 1 << 64}), "not a manifest"),
        (("tensor", {"shape": [True]}), "not a manifest"),
        (("tensor", {"shape": None}), "not a manifest"),
        (files("../model.safetensors"), "leads out of its folder"),
        (files("a/../../model.safetensors"), "leads out of its folder"),
        (files("/etc/passwd"), "an absolute path"),
        (files("C:/model.safetensors"), "an absolute path"),
        (files("a\\b"), "a backslash"),
        (files("a\0b"), "a NUL"),
        (files(""), "an empty name"),
        (files("."), "a folder"),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = tmp_path / "manifest.json"
    content = json.loads(MANIFEST.to_bytes())
    where, fields = change
    if where == "top":
        content |= fields
    elif where == "tensor":
        content["tensors"] = {name: old | fields for name, old in content["tensors"].items()}
    else:
        content |= {"files": fields, "tensors": {}}
    path.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(path)
    assert caught.value.hint
    assert caught.value.path == path


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"version https://git-lfs"])
def test_other_files_are_no_manifests(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match="not a manifest"):
        read_manifest(path)


def test_an_endless_manifest_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(ManifestError, match="above the limit"):
        read_manifest(path)
    with pytest.raises(CheckpointNotFoundError):
        read_manifest(tmp_path / "nothing")


def test_files_are_named_from_the_folder_that_holds_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [TensorSpec(f"t{n}", "U8", (5,)) for n in range(2)]
    folder = write_checkpoint(tmp_path / "model", specs, shards=2)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert file_names(describe(folder)) == names
    assert manifest_path(folder, describe(folder)) == folder / "weightlift-manifest.json"
    index = next(folder.glob("*.index.json"))
    assert manifest_path(index, describe(index)) == folder / "weightlift-manifest.json"
    single = folder / names[0]
    assert file_names(describe(single)) == [names[0]]
    assert manifest_path(single, describe(single)) == folder / f"{names[0]}.manifest.json"
    monkeypatch.chdir(folder)
    assert file_names(describe(Path(names[0]))) == [names[0]]
    (folder / "sub").mkdir()
    (folder / names[1]).rename(folder / "sub" / names[1])
    index.write_text(index.read_text().replace(names[1], f"sub/{names[1]}"))
    assert file_names(describe(index)) == [names[0], f"sub/{names[1]}"]
    assert list(wl.make_manifest(index).files) == [names[0], f"sub/{names[1]}"]
