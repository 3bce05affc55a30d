"""Manifests over GGUF and PyTorch checkpoints, whose tensors may share bytes or be converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import xxhash

import weightlift as wl
from weightlift.errors import IntegrityError
from weightlift.testing import GGUFSpec, write_gguf
from weightlift.units import KIB

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    base = torch.randn(700, 512)
    saved = {"a": base, "b": base, "rows": base[100:600], "transposed": base[3:].t(), "alone": torch.ones(300, 300)}
    torch.save(saved, tmp_path / "m.pt")
    return tmp_path / "m.pt"


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", [GGUFSpec("q", "Q4_K", (64, 1024)), GGUFSpec("f", "F32", (9,))])


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("chunk_bytes", [64 * KIB, 512 * KIB])
def test_digests_of_tensors_that_share_bytes(shared: Path, chunk_bytes: int) -> None:
    manifest = wl.make_manifest(shared, chunk_bytes=chunk_bytes)
    raw = shared.read_bytes()
    for name, info in wl.open(shared).items():
        expected = xxhash.xxh3_128(raw[info.offset : info.offset + info.nbytes]).hexdigest()
        assert manifest.tensors[name].xxh3_128 == expected, name
    assert wl.verify(shared, manifest).ok


def ways(path: Path, **options: Any) -> list[Any]:
    return [
        lambda: wl.load(path, **options),
        lambda: dict(wl.stream(path, **options)),
        lambda: wl.load(path, method="mmap", **options),
        lambda: wl.load(path, device="null", **options),
    ]


def test_views_are_verified_by_every_call(shared: Path) -> None:
    manifest = wl.make_manifest(shared)
    for way in ways(shared, verify=manifest):
        way()
    flip(shared, wl.open(shared)["rows"].offset + 5)
    for way in ways(shared, verify=manifest):
        with pytest.raises(IntegrityError, match="rows"):
            way()


def test_numbers_made_of_blocks_are_verified_as_stored(quantised: Path) -> None:
    manifest = wl.make_manifest(quantised)
    for way in ways(quantised, verify=manifest, dequantize=True):
        way()
    flip(quantised, wl.open(quantised)["q"].offset + 5)
    for way in ways(quantised, verify=manifest, dequantize=True):
        with pytest.raises(IntegrityError, match="q"):
            way()


def test_what_numbers_take_is_foreseen(quantised: Path, shared: Path) -> None:
    numbers = 64 * 1024 * 4 + 9 * 4
    assert wl.fit(quantised, dequantize=True).tensor_bytes >= numbers
    assert wl.fit(quantised).tensor_bytes < numbers
    # Shared bytes count once.
    assert wl.open(shared).total_bytes <= wl.fit(shared).tensor_bytes < 1.1 * wl.open(shared).total_bytes
