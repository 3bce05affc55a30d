"""What is read from GGUF files is what the package ``gguf`` reads."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weightlift as wl
from weightlift.dtypes import GGML, GGML_QUANTISED
from weightlift.errors import FileChangedError, FormatError, IndexFileError
from weightlift.formats import describe
from weightlift.formats.gguf_values import GGUFMetadata
from weightlift.testing import GGUFSpec, TensorSpec, write_checkpoint, write_gguf, write_llama_gguf
from weightlift.testing.gguf_bytes import ARRAY, NUMBERS, STRING, entry, tensor
from weightlift.testing.gguf_bytes import gguf_file as file
from weightlift.units import KIB

if TYPE_CHECKING:
    from collections.abc import Iterator

METHODS = ["auto", "direct", "buffered", "mmap"]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
SPECS = [
    GGUFSpec(f"{dtype.name.lower()}.{rows}", dtype.name, (rows, 512)) for dtype in GGML.values() for rows in (1, 37)
]
SPECS += [GGUFSpec("vector", "F32", (7,)), GGUFSpec("cube", "Q4_0", (3, 5, 64)), GGUFSpec("four", "F16", (2, 3, 4, 5))]
SPECS += [GGUFSpec("large", "Q4_K", (700, 4096)), GGUFSpec("blocks", "Q6_K", (256,))]


def theirs(path: Path) -> dict[str, Any]:
    return {item.name: item for item in gguf.GGUFReader(path).tensors}


def test_the_table_of_types_is_theirs() -> None:
    assert {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType} == {
        number: (dtype.name, dtype.block_elements, dtype.block_bytes) for number, dtype in GGML.items()
    }


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_every_way_delivers_what_the_package_reads(tmp_path: Path, method: str, engine: str, framework: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", SPECS)
    state = wl.load(path, method=method, engine=engine, framework=framework, host_memory="8MiB")
    expected = theirs(path)
    assert list(state) == list(expected)
    for name, item in expected.items():
        found = state[name]
        kind = item.tensor_type.name
        assert bytes(_bytes(found)) == item.data.tobytes(), name
        if kind in GGML_QUANTISED:
            assert (str(found.dtype).removeprefix("torch."), tuple(found.shape)) == ("uint8", item.data.shape)
        else:
            assert tuple(found.shape) == tuple(reversed(item.shape.tolist()))


def _bytes(found: Any) -> Any:
    if hasattr(found, "numpy"):
        import torch

        return found.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found.tobytes()


def test_type_and_logical_shape_are_kept(tmp_path: Path) -> None:
    checkpoint = wl.open(write_gguf(tmp_path / "m.gguf", SPECS))
    assert {name: (info.dtype.name, info.shape) for name, info in checkpoint.items()} == {
        spec.name: (spec.kind, spec.shape) for spec in SPECS
    }


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", SPECS, alignment=alignment)
    expected = theirs(path)
    for info in describe(path):
        assert info.offset == expected[info.name].data_offset
        assert info.offset % alignment == 0


def test_streams_and_modules(tmp_path: Path) -> None:
    import torch

    path = write_gguf(tmp_path / "m.gguf", SPECS)
    state = wl.load(path)
    streamed = dict(wl.stream(path, host_memory="8MiB"))
    assert all(torch.equal(streamed[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)
    target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    wl.load_into(target, path)
    assert all(torch.equal(target[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    values = {
        "long": "x" * 100_000,
        "odd": b"\xff\xfe",
        "strings": ["a", "", "é" * 70_000, "z" * 3_000_000, "last"],
        "floats": [0.5, -1.25],
        "flags": [True, False],
        "none": [],
        "nested": [[1, 2], [], [3]],
    }
    entries = [
        *(entry(f"number{kind}", kind, 1) for kind in NUMBERS),
        entry("long", STRING, values["long"]),
        entry("odd", STRING, values["odd"]),
        entry("strings", ARRAY, (STRING, values["strings"])),
        entry("floats", ARRAY, (6, values["floats"])),
        entry("flags", ARRAY, (7, values["flags"])),
        entry("none", ARRAY, (STRING, [])),
        entry("nested", ARRAY, (ARRAY, [(4, items) for items in [[1, 2], [], [3]]])),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(file([tensor("a")], entries))
    found = wl.open(path).metadata
    assert set(found) == {*values, *(f"number{kind}" for kind in NUMBERS)}
    for key, value in values.items():
        expected = os.fsdecode(value) if isinstance(value, bytes) else value
        assert found[key] == expected, key
    assert all(found[f"number{kind}"] == 1 for kind in NUMBERS)
    assert found["number7"] is True
    assert "absent" not in found


def test_metadata_is_what_the_package_reads(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "m.gguf")
    found = wl.open(path).metadata
    fields = {name: field for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}
    assert list(found) == list(fields)
    for name, field in fields.items():
        assert found[name] == field.contents(), name


def test_arrays_stay_in_the_file_until_asked_for(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "m.gguf")
    metadata = describe(path).shards[0].metadata
    assert isinstance(metadata, GGUFMetadata)
    assert str(metadata.stored("tokenizer.ggml.tokens")) == "512 × string"
    assert metadata.stored("llama.context_length") is None
    assert repr(metadata) == f"<GGUFMetadata of {len(list(metadata))} keys in m.gguf>"
    assert len(dict(metadata)) == len(metadata)
    with path.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(FileChangedError, match=r"tokenizer\.ggml\.tokens"):
        metadata["tokenizer.ggml.tokens"]
    assert metadata["llama.context_length"] == 256


def test_parts_are_found_by_any_of_them_and_by_their_folder(tmp_path: Path) -> None:
    specs = [GGUFSpec(f"t{number}", "Q4_0", (3, 64)) for number in range(7)]
    whole = describe(write_gguf(tmp_path / "whole.gguf", specs))
    folder = tmp_path / "split"
    folder.mkdir()
    first = write_gguf(folder / "m.gguf", specs, split_tensors=3)
    paths = sorted(folder.iterdir())
    assert (first, len(paths)) == (paths[0], 3)
    for named in (*paths, folder):
        found = describe(named)
        assert found.names == whole.names
        assert [shard.path for shard in found.shards] == paths
    state, expected = wl.load(folder), wl.load(tmp_path / "whole.gguf")
    # The same seed, so the same bytes, however they are spread.
    assert all(bytes(state[name].numpy().tobytes()) == expected[name].numpy().tobytes() for name in expected)


def test_a_folder_with_several_models(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / f"{name}.gguf", [GGUFSpec("t", "F32", (1,))])
    with pytest.raises(IndexFileError, match=r"2 GGUF files .*: a\.gguf, b\.gguf\nhint: name the one"):
        describe(tmp_path)
    (tmp_path / "b.gguf").unlink()
    assert describe(tmp_path).names == ["t"]


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", [GGUFSpec("t", "F32", (1,))])
    renamed = path.rename(tmp_path / "m.safetensors")
    assert (describe(renamed).names, describe(renamed).file_format) == (["t"], "GGUF")
    assert describe(tmp_path).file_format == "GGUF"
    other = write_checkpoint(tmp_path / "x.safetensors", [TensorSpec("s", "U8", (1,))]).rename(tmp_path / "x.gguf")
    assert describe(other).file_format == "safetensors"


def test_safetensors_come_before_other_kinds(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", [GGUFSpec("t", "F32", (1,))])
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    write_checkpoint(tmp_path / "m.safetensors", [TensorSpec("s", "U8", (1,))])
    checkpoint = wl.open(tmp_path)
    assert list(checkpoint) == ["s"]
    assert checkpoint.notes == (
        "the folder also holds weight files of another kind (1 of GGUF, 1 of PyTorch): safetensors was taken",
    )
    assert wl.load(tmp_path).report.reason.endswith("safetensors was taken")
    (tmp_path / "m.safetensors").unlink()
    assert describe(tmp_path).file_format == "GGUF"


def test_many_texts_are_kept_only_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file([tensor("a")], [entry(f"k{number}", STRING, "x" * 60_000) for number in range(300)]))
    metadata = describe(path).shards[0].metadata
    assert isinstance(metadata, GGUFMetadata)
    stored = [key for key in metadata if metadata.stored(key)]
    assert len(stored) == 300 - (16 << 20) // 60_000
    assert set(map(len, metadata.values())) == {60_000}


def test_a_vocabulary_costs_no_objects(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "m.gguf"
    tokens = [f"token{number}" for number in range(100_000)]
    path.write_bytes(file([tensor("a")], [entry("tokens", ARRAY, (STRING, tokens))]))
    tracemalloc.start()
    try:
        checkpoint = wl.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 1024 * KIB
    assert checkpoint.metadata["tokens"] == tokens


# Headers at random: both refuse, or both read the same. The package checks less, so only what both read is compared.

names = st.sampled_from(["a", "b", "é", "blk.0.w"])
keys = st.sampled_from(["general.architecture", "k", "general.alignment"])
scalars = st.one_of(
    st.tuples(st.just(4), st.sampled_from([0, 1, 8, 32, 64])),
    st.tuples(st.just(STRING), st.sampled_from(["", "x", "é"])),
    st.tuples(st.just(7), st.booleans()),
    st.tuples(st.just(ARRAY), st.tuples(st.just(STRING), st.lists(st.sampled_from(["", "yy"]), max_size=3))),
    st.tuples(st.just(ARRAY), st.tuples(st.just(5), st.lists(st.integers(-3, 3), max_size=3))),
)
# Without dimensions, which llama.cpp takes for one element, the package fails for types that it has no array type for.
shapes = st.lists(st.sampled_from([0, 1, 2, 32, 256]), min_size=1, max_size=5)
tensors = st.tuples(names, shapes, st.sampled_from([0, 1, 2, 12, 30, 24, 99]), st.sampled_from([0, 32, 64, 4, 1 << 40]))


@pytest.fixture(scope="module")
def odd() -> Iterator[Path]:
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - only a fast place for a small file
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder) / "odd.gguf"


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    entries=st.lists(st.tuples(keys, scalars), max_size=3),
    described=st.lists(tensors, max_size=3),
    data=st.sampled_from([0, 16, 128, 4096]),
    cut=st.integers(0, 40),
)
def test_what_both_read_is_the_same(odd: Path, entries: Any, described: Any, data: int, cut: int) -> None:
    raw = file(
        [tensor(name, tuple(ne), kind, offset) for name, ne, kind, offset in described],
        [entry(key, kind, content) for key, (kind, content) in entries],
        data=data,
    )
    odd.write_bytes(raw[: len(raw) - cut] if cut < 4 else raw)
    ours = None
    with contextlib.suppress(FormatError):
        ours = describe(odd)
    try:
        expected = theirs(odd)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error):
        expected = None
    if ours is None:
        return
    assert expected is not None, "the package refuses what we read"
    assert sorted(ours.names) == sorted(expected)
    for info in ours:
        item = expected[info.name]
        assert (info.offset, info.nbytes) == (item.data_offset, item.n_bytes)
        assert info.shape == tuple(reversed(item.shape.tolist()))
        assert item.data.tobytes() == odd.read_bytes()[info.offset : info.offset + info.nbytes]


def test_rows_of_blocks_are_counted_exactly() -> None:
    for dtype in GGML.values():
        elements = 3 * dtype.block_elements
        assert dtype.storage_bytes(elements) == 3 * dtype.block_bytes
        assert math.prod(numpy.zeros(3).shape) == 3
