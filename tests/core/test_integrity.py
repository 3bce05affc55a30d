"""What a manifest vouches for is what gets loaded, and nothing else is handed out."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
import torch

import weightlift as wl
from weightlift.errors import IntegrityError, ManifestError, OptionError
from weightlift.manifest import write_manifest
from weightlift.testing import TensorSpec, tensor_digest, write_checkpoint
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

SPECS = [
    TensorSpec("large", "BF16", (3, MIB + 77)),
    TensorSpec("empty", "F32", (0, 3)),
    TensorSpec("odd", "U8", (7,)),
    TensorSpec("small", "F32", (5, 5)),
    TensorSpec("last", "F32", (2, MIB)),
]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", SPECS, shards=2, padding=8 + 3)


def damage(checkpoint: Path, tensor: str, *, byte: int = 0) -> None:
    """Change one byte of a tensor."""
    info = wl.open(checkpoint)[tensor]
    with info.path.open("r+b") as file:
        file.seek(info.offset + byte)
        old = file.read(1)
        file.seek(info.offset + byte)
        file.write(bytes([old[0] ^ 1]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["auto", "direct", "buffered", "mmap"])
def test_a_manifest_holds_the_digests_of_files_and_tensors(checkpoint: Path, method: str, engine: str) -> None:
    manifest = wl.make_manifest(checkpoint, method=method, engine=engine, host_memory="8MiB")
    assert {name: entry.xxh3_128 for name, entry in manifest.tensors.items()} == {
        spec.name: tensor_digest(spec) for spec in SPECS
    }
    files = sorted(checkpoint.glob("*.safetensors"))
    assert {name: (entry.bytes, entry.sha256) for name, entry in manifest.files.items()} == {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files
    }
    described = wl.open(checkpoint)
    for name, entry in manifest.tensors.items():
        info = described[name]
        found = (entry.file, entry.dtype, entry.shape, entry.bytes)
        assert found == (info.path.name, info.dtype.name, info.shape, info.nbytes)
    verified = wl.verify(checkpoint, manifest, method=method, engine=engine)
    assert verified.ok
    assert (verified.files, verified.tensors) == (2, len(SPECS))


def test_a_file_without_tensors_is_hashed_too(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", [])
    manifest = wl.make_manifest(path)
    assert manifest.files["model.safetensors"].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert wl.verify(path, manifest).ok
    with path.open("ab") as file:
        file.write(b" ")
    head = path.read_bytes()
    path.write_bytes((int.from_bytes(head[:8], "little") + 1).to_bytes(8, "little") + head[8:])
    assert [(found.kind, found.name) for found in wl.verify(path, manifest).differences] == [
        ("file", "model.safetensors")
    ]


def test_verifying_lists_everything_that_differs(checkpoint: Path) -> None:
    manifest = wl.make_manifest(checkpoint)
    damage(checkpoint, "large", byte=6 * MIB)
    found = wl.verify(checkpoint, manifest)
    assert not found.ok
    large_in = wl.open(checkpoint)["large"].path.name
    assert [(difference.kind, difference.name) for difference in found.differences] == [
        ("file", large_in),
        ("tensor", "large"),
    ]
    answer = found.to_json()
    assert (answer["schema"], answer["ok"], len(answer["differences"])) == (1, False, 2)


def test_a_checkpoint_of_other_tensors_is_told_apart(tmp_path: Path) -> None:
    def one(name: str, *specs: TensorSpec) -> Path:
        return write_checkpoint(tmp_path / name / "model.safetensors", specs)

    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    old = one("old", TensorSpec("a", "F32", (4,)), TensorSpec("gone", "U8", (2,)), TensorSpec("c", "F16", (2, 3)))
    new = one("new", TensorSpec("a", "I32", (4,)), TensorSpec("c", "F16", (3, 2)), TensorSpec("more", "U8", (1,)))
    manifest = wl.make_manifest(old)
    problems = {found.name: found.problem for found in wl.verify(new, manifest).differences}
    assert problems.pop("model.safetensors")
    assert problems == {
        "a": "has data type I32, and F32 in the manifest",
        "c": "has shape [3, 2], and [2, 3] in the manifest",
        "gone": "is in the manifest and not in the checkpoint",
        "more": "is not in the manifest",
    }
    with pytest.raises(IntegrityError, match="so with 3 more") as caught:
        wl.load(new, verify=manifest, device="null")
    assert set(caught.value.tensors) == {"a", "c", "gone", "more"}
    with pytest.raises(IntegrityError, match="'c' has shape"):
        wl.load(new, verify=manifest, names=["c"])
    assert list(wl.load(old, verify=manifest, names=["gone"])) == ["gone"]


LOADS: list[dict[str, Any]] = [
    {"device": "null"},
    {"framework": "torch"},
    {"framework": "numpy", "method": "direct"},
    {"method": "mmap"},
    {"method": "mmap", "readonly": True, "framework": "numpy"},
    {"dtype": "float32"},
    {"device": {"large": "cpu", "*": "cpu"}},
    {"device": "meta"},
]


@pytest.mark.filterwarnings("ignore:.*not writable:UserWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", LOADS, ids=str)
def test_a_load_refuses_a_changed_tensor_by_name(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], engine: str
) -> None:
    manifest = wl.make_manifest(checkpoint)
    good = wl.load(checkpoint, verify=manifest, engine=engine, **options)
    assert len(good) == (0 if options.get("device") == "null" else len(SPECS))
    assert not good.report.digests
    del good
    damage(checkpoint, "last", byte=8 * MIB - 1)
    with nothing_left_behind(tmp_path), pytest.raises(IntegrityError, match="tensor 'last' has other bytes") as caught:
        wl.load(checkpoint, verify=manifest, engine=engine, **options)
    error = caught.value
    assert (error.tensor, error.tensors, error.path) == ("last", ("last",), wl.open(checkpoint)["last"].path)
    assert "weightlift verify" in error.hint
    del caught, error
    assert "large" in (wl.load(checkpoint, verify=manifest, names=["large"], engine=engine))


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}], ids=str)
def test_a_stream_stops_before_a_changed_tensor(checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    manifest = wl.make_manifest(checkpoint)
    assert [name for name, _ in wl.stream(checkpoint, verify=manifest, **options)] == list(wl.open(checkpoint))
    damage(checkpoint, "last")
    before = []
    with nothing_left_behind(tmp_path), pytest.raises(IntegrityError, match="'last'"):  # noqa: PT012 - it may be either
        for name, _ in wl.stream(checkpoint, verify=manifest, **options):
            before.append(name)
    assert "last" not in before


def test_a_module_is_unchanged_if_a_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(wl.make_manifest(checkpoint), path)
    module = {name: torch.zeros_like(tensor) for name, tensor in wl.load(checkpoint).items()}
    damage(checkpoint, "last")
    with pytest.raises(IntegrityError, match="'last'"):
        wl.load_into(module, checkpoint, verify=path)
    assert not any(tensor.any() for tensor in module.values())
    damage(checkpoint, "last")
    wl.load_into(module, checkpoint, verify=path)
    assert module["last"].any()


def test_what_is_no_manifest_is_refused(checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="verify=True"):
        wl.load(checkpoint, verify=True)  # type: ignore[arg-type]
    with pytest.raises(ManifestError):
        wl.load(checkpoint, verify=wl.open(checkpoint)["odd"].path)
