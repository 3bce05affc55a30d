"""Generated checkpoints are what they claim to be, to the safetensors library as to us."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from weightlift.errors import OptionError
from weightlift.formats import describe
from weightlift.testing import (
    TensorSpec,
    every_dtype_specs,
    exl2_specs,
    exl3_specs,
    header_bytes,
    llama_70b_specs,
    llama_specs,
    make_checkpoint,
    moe_specs,
    tensor_bytes,
    tensor_digest,
    write_checkpoint,
)
from weightlift.testing.factory import BLOCK_BYTES

if TYPE_CHECKING:
    from pathlib import Path

SMALL = every_dtype_specs()
LONG = TensorSpec("long", "U8", (3 * BLOCK_BYTES + 5,))


@pytest.mark.parametrize("padding", ["reference", "none", 0, 1, 4095])
@pytest.mark.parametrize("sort", [True, False])
def test_the_reference_reads_the_same_bytes(tmp_path: Path, padding: str | int, sort: bool) -> None:
    safetensors = pytest.importorskip("safetensors", reason="the reference library is not installed")
    specs = [*SMALL, LONG]
    path = write_checkpoint(tmp_path / "x.safetensors", specs, padding=padding, sort=sort, seed=9)  # type: ignore[arg-type]
    views = dict(safetensors.deserialize(path.read_bytes()))
    assert len(views) == len(specs)
    for spec in specs:
        view = views[spec.name]
        assert (view["dtype"], tuple(view["shape"])) == (spec.dtype, spec.shape)
        assert bytes(view["data"]) == tensor_bytes(spec, seed=9)


def test_the_reference_writes_the_same_file(tmp_path: Path) -> None:
    """Order and padding are those of the reference's own writer."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    reference = pytest.importorskip("safetensors.numpy", reason="the reference library is not installed")
    names = {"F32": "float32", "I16": "int16", "U8": "uint8", "F64": "float64", "BOOL": "bool"}
    specs = [TensorSpec(f"{n}.{name}", name, (3, n)) for n in (2, 1, 0) for name in names]
    path = write_checkpoint(tmp_path / "x.safetensors", specs, metadata={"format": "pt"})
    tensors = {spec.name: numpy.frombuffer(tensor_bytes(spec), names[spec.dtype]).reshape(spec.shape) for spec in specs}
    assert path.read_bytes() == reference.save(tensors, metadata={"format": "pt"})


def test_contents_depend_on_seed_and_name_only(tmp_path: Path) -> None:
    one = TensorSpec("one", "U8", (100_000,))
    assert tensor_bytes(one) == tensor_bytes(TensorSpec("one", "F32", (25_000,)))
    assert tensor_bytes(one) != tensor_bytes(TensorSpec("two", "U8", (100_000,)))
    assert tensor_bytes(one) != tensor_bytes(one, seed=1)
    assert tensor_bytes(one, start=500, stop=700) == tensor_bytes(one)[500:700]
    first = write_checkpoint(tmp_path / "a.safetensors", [one], seed=3).read_bytes()
    assert write_checkpoint(tmp_path / "b.safetensors", [one], seed=3).read_bytes() == first


def test_chunks_of_a_tensor_differ() -> None:
    spec = TensorSpec("t", "U8", (64 << 20,))
    for chunk in (4096, 1 << 20, 4 << 20):
        starts = range(0, min(spec.nbytes, 16 * chunk), chunk)
        samples = {tensor_bytes(spec, start=start, stop=start + 32) for start in starts}
        assert len(samples) == len(starts)


def test_booleans_are_zero_or_one() -> None:
    assert set(tensor_bytes(TensorSpec("b", "BOOL", (1000,)))) == {0, 1}


def test_digest() -> None:
    xxhash = pytest.importorskip("xxhash", reason="xxhash is not installed")
    assert tensor_digest(LONG, seed=2) == xxhash.xxh3_128(tensor_bytes(LONG, seed=2)).hexdigest()
    assert tensor_digest(LONG, fill="zeros") == xxhash.xxh3_128(bytes(LONG.nbytes)).hexdigest()


def test_zeros(tmp_path: Path) -> None:
    full = write_checkpoint(tmp_path / "a.safetensors", [LONG], fill="zeros").read_bytes()
    assert write_checkpoint(tmp_path / "b.safetensors", [LONG], sparse=True).read_bytes() == full


def test_a_giant_takes_no_space(tmp_path: Path) -> None:
    specs = llama_70b_specs()
    path = write_checkpoint(tmp_path / "giant", specs, shards=30, sparse=True)
    description = describe(path)
    assert len(description) == 723
    assert 140e9 < description.total_bytes < 142e9
    assert len(description.shards) == 30
    assert sum(file.stat().st_blocks * 512 for file in path.iterdir()) < 10_000_000


@pytest.mark.parametrize("total_bytes", [10_000_000, 2 << 30, 16 << 30])
def test_llama_size(total_bytes: int) -> None:
    specs = llama_specs(total_bytes)
    assert 180 <= len(specs) <= 300
    assert sum(spec.nbytes for spec in specs) == pytest.approx(total_bytes, rel=0.001)


def test_shapes_of_quantised_models() -> None:
    exl2, exl3 = exl2_specs(), exl3_specs()
    assert (len(exl2), len(exl3), sum(spec.nbytes == 4 for spec in exl3)) == (2967, 2406, 561)
    assert {spec.dtype for spec in exl2 if spec.name.endswith("q_scale_max")} == {"F16"}
    assert len(moe_specs()) > 200_000
    for specs in (exl2, exl3, SMALL, moe_specs(8, layers=2)):
        assert len({spec.name for spec in specs}) == len(specs)


def test_sorted_layout_parts_the_tensors_of_a_layer() -> None:
    specs = exl2_specs(layers=2, hidden=64, keys=16, inner=128, vocabulary=64)
    header = header_bytes(sorted(specs, key=lambda spec: spec.name))
    assert header.index(b"q_scale_max") < header.index(b"q_weight")


@pytest.mark.parametrize("shards", [1, 2, 5, 7])
def test_shards_are_never_empty(tmp_path: Path, shards: int) -> None:
    sizes = [1, 1000, 0, 0, 1, 1, 1]
    for number, order in enumerate(itertools.islice(itertools.permutations(sizes), 0, 5040, 500)):
        specs = [TensorSpec(f"t{n}", "U8", (size,)) for n, size in enumerate(order)]
        folder = write_checkpoint(tmp_path / str(number), specs, shards=shards)
        files = list(folder.glob("*.safetensors"))
        assert len(files) == shards
        assert all(len(describe(file)) for file in files)


def test_without_index(tmp_path: Path) -> None:
    path, specs = make_checkpoint(tmp_path / "a", shards=2, shape=(3,))
    assert (path / "model.safetensors.index.json").exists()
    write_checkpoint(tmp_path / "b", specs, shards=2, index=False)
    assert sorted(file.suffix for file in (tmp_path / "b").iterdir()) == [".safetensors"] * 2


def test_impossible_requests(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="F4 of shape"):
        TensorSpec("x", "F4", (3,))
    with pytest.raises(OptionError, match="F7"):
        TensorSpec("x", "F7", (3,))
    with pytest.raises(OptionError, match="one file"):
        write_checkpoint(tmp_path / "x.safetensors", SMALL, shards=2)
    with pytest.raises(OptionError, match="shards=3 for 1"):
        write_checkpoint(tmp_path / "x", [LONG], shards=3)
