"""What is read from PyTorch checkpoints is what ``torch.load`` with ``weights_only=True`` gives."""

from __future__ import annotations

import collections
import contextlib
import json
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weightlift as wl
from weightlift.dtypes import PYTORCH
from weightlift.errors import IndexFileError, NotACheckpointError
from weightlift.formats import describe
from weightlift.testing.leaks import nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

METHODS = ["auto", "direct", "buffered", "mmap"]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]


def bits(tensor: Any) -> bytes:
    # A copy, because views of one element pass for contiguous with any stride.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from flattened(inner, f"{prefix}.{key}" if prefix else str(key))


def theirs(path: Path) -> dict[str, Any]:
    return dict(flattened(torch.load(path, weights_only=True)))


def content() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    base, tied = random(100, 64), random(8, 16)
    state = collections.OrderedDict(
        base=base,
        rows=base[10:20],
        transposed=base.t(),
        every_second=base[:, ::2],
        permuted=random(5, 6, 7).permute(2, 0, 1),
        large=random(600, 700),
        large_transposed=random(300, 400).t(),
        expanded=torch.ones(1).expand(4, 5),
        tied=tied,
        tied_too=tied,
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(3.5),
        parameter=torch.nn.Parameter(random(2, 2)),
        chunks=list(random(9, 4).chunk(3)),
    )
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return {
        "state_dict": state,
        "module": module.state_dict(),
        "kinds": {name: torch.arange(6).to(getattr(torch, name)) for name in PYTORCH if not name.startswith("float8")},
        "small": {name: random(6).to(getattr(torch, name)) for name in PYTORCH if name.startswith("float8")},
        "optimizer": {"state": {0: {"momentum": random(3)}}, "groups": [{"lr": 0.1, "params": [0, 1]}]},
        "epoch": 3,
        "done": False,
        "betas": (0.9, 0.99),
        "name": "trial\n1",
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda", 1),
        "bytes": b"\x00\xff",
        "nothing": None,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pytorch") / "model.pt"
    torch.save(content(), path)
    return path


def require_the_same(state: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sorted(state) == sorted(expected)
    for name, tensor in expected.items():
        found = state[name]
        assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        assert bits(found) == bits(tensor), name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cache", ["auto", "drop"])
def test_every_way_delivers_what_torch_loads(saved: Path, method: str, engine: str, cache: str) -> None:
    # Mapped tensors keep their mapping.
    with contextlib.nullcontext() if method == "mmap" else nothing_left_behind(saved.parent):
        state = wl.load(saved, method=method, engine=engine, cache=cache, host_memory="8MiB")
    require_the_same(state, theirs(saved))
    assert state.report.tensors == len(state)


def test_what_shared_memory_does_so_again(saved: Path) -> None:
    state = wl.load(saved)
    state["state_dict.tied"][0, 0] = 7
    assert state["state_dict.tied_too"][0, 0] == 7
    state["state_dict.base"][10, 0] = 8
    assert state["state_dict.rows"][0, 0] == state["state_dict.transposed"][0, 10] == 8
    assert state["state_dict.every_second"][10, 0] == 8
    untouched = state["state_dict.large"].clone()
    state["state_dict.base"].zero_()
    assert torch.equal(state["state_dict.large"], untouched)


def test_shared_bytes_are_read_once(tmp_path: Path) -> None:
    base = torch.randn(1000, 1000)
    torch.save({"a": base, "b": base, "c": base.t(), "d": base[:500]}, tmp_path / "m.pt")
    state = wl.load(tmp_path / "m.pt")
    assert state.report.nbytes == base.nbytes
    assert wl.open(tmp_path / "m.pt").total_bytes == base.nbytes
    assert sum(state.report.method_used.values()) < 1.01 * base.nbytes


def test_streams_in_file_order(saved: Path) -> None:
    with wl.stream(saved, host_memory="8MiB") as stream:
        state = dict(stream)
        assert stream.report is not None
        assert stream.report.tensors == len(state)
    require_the_same(state, theirs(saved))
    assert list(state) == list(wl.load(saved))


def test_numpy_arrays(saved: Path) -> None:
    state = wl.load(saved, framework="numpy")
    for name, tensor in theirs(saved).items():
        assert state[name].shape == tuple(tensor.shape), name
        assert state[name].tobytes() == bits(tensor), name
        steps = tuple(step // state[name].itemsize for step in state[name].strides)
        assert not tensor.numel() or tensor.dim() == 0 or steps == tensor.stride(), name


def test_conversion(saved: Path) -> None:
    state = wl.load(saved, dtype="float64", names=["state_dict.*"])
    for name, tensor in theirs(saved).items():
        if name in state:
            assert torch.equal(state[name], tensor.double()), name
    state["state_dict.tied"][0, 0] = 7
    assert state["state_dict.tied_too"][0, 0] == 7


def test_a_module_is_filled(saved: Path) -> None:
    expected = theirs(saved)
    targets = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in expected.items()}
    targets["state_dict.large_transposed"] = torch.empty(300, 400).t()
    targets["state_dict.permuted"] = torch.empty(7, 5, 6, dtype=torch.float64)
    assert not wl.load_into(targets, saved).missing_keys
    for name, tensor in expected.items():
        assert bits(targets[name].to(tensor.dtype)) == bits(tensor), name


def test_digests_are_of_the_bytes_as_stored(saved: Path) -> None:
    import xxhash

    found = wl.load(saved, digest=True).report.digests
    assert found == wl.load(saved, device="null", digest=True).report.digests
    raw = saved.read_bytes()
    for info in describe(saved):
        assert found[info.name] == xxhash.xxh3_128(raw[info.offset : info.offset + info.nbytes]).hexdigest()


def test_the_null_device_reads_shared_bytes_once(saved: Path) -> None:
    report = wl.load(saved, device="null").report
    assert report.nbytes == wl.open(saved).total_bytes
    assert report.tensors == len(theirs(saved))


def test_some_of_the_tensors(saved: Path) -> None:
    state = wl.load(saved, names=["state_dict.rows", "state_dict.transposed", "state_dict.empty"])
    expected = theirs(saved)
    require_the_same(state, {name: expected[name] for name in state})
    assert len(state) == 3
    (alone,) = wl.load(saved, names=["state_dict.rows"]).values()
    assert alone.untyped_storage().nbytes() < expected["state_dict.base"].nbytes


def test_values_that_are_no_tensors(saved: Path) -> None:
    assert dict(wl.open(saved).metadata) == {
        "optimizer.groups.0.lr": 0.1,
        "optimizer.groups.0.params": [0, 1],
        "epoch": 3,
        "done": False,
        "betas": (0.9, 0.99),
        "name": "trial\n1",
        "dtype": "torch.float16",
        "size": (1, 2),
        "device": "cuda:1",
        "bytes": b"\x00\xff",
        "nothing": None,
    }


def test_a_lone_tensor_and_lists(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    torch.save(tensor, tmp_path / "lone.pt")
    assert torch.equal(wl.load(tmp_path / "lone.pt")["tensor"], tensor)
    torch.save([tensor, (tensor + 1, {"a": tensor + 2})], tmp_path / "list.pt")
    state = wl.load(tmp_path / "list.pt")
    assert {name: float((found - tensor).mean().round()) for name, found in state.items()} == {
        "0": 0.0,
        "1.0": 1.0,
        "1.1.a": 2.0,
    }


def test_tensors_with_attributes_and_of_optimisers(tmp_path: Path) -> None:
    marked = torch.randn(4)
    marked.note = "kept by torch, not here"  # type: ignore[attr-defined]
    module = torch.nn.Linear(5, 6)
    optimiser = torch.optim.AdamW(module.parameters())
    module(torch.ones(5)).sum().backward()
    optimiser.step()
    torch.save({"marked": marked, "optimizer": optimiser.state_dict(), "model": module.state_dict()}, tmp_path / "m.pt")
    require_the_same(wl.load(tmp_path / "m.pt"), theirs(tmp_path / "m.pt"))


def test_shards_with_an_index(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((3,), float(number)) for number in range(4)}
    for number, names in enumerate((["t0", "t1"], ["t2", "t3"]), 1):
        torch.save({name: tensors[name] for name in names}, tmp_path / f"pytorch_model-{number:05}-of-00002.bin")
    index = {name: f"pytorch_model-{1 + int(name[1]) // 2:05}-of-00002.bin" for name in tensors}
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"other things")
    assert sorted(describe(tmp_path).names) == sorted(tensors)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert describe(tmp_path).file_format == "PyTorch"
    assert all(torch.equal(found, tensors[name]) for name, found in wl.load(tmp_path).items())
    (tmp_path / "other.bin").write_bytes(b"")
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(IndexFileError, match=r"3 PyTorch files: other\.bin"):
        describe(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").rename(tmp_path / "pytorch_model.bin")
    assert describe(tmp_path).names == ["t0", "t1"]


def test_legacy_formats_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(NotACheckpointError, match=r"before 2020.*\nhint: load it with torch\.load"):
        describe(path)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is not supported:DeprecationWarning")
def test_a_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))  # type: ignore[no-untyped-call]
    with pytest.raises(NotACheckpointError, match="TorchScript archive"):
        describe(path)


def views(draw: Any) -> Any:
    base = torch.arange(
        draw(st.integers(1, 60)), dtype=draw(st.sampled_from([torch.float32, torch.int16, torch.uint8]))
    )
    found = {}
    for number in range(draw(st.integers(1, 4))):
        rank = draw(st.integers(0, 3))
        shape = [draw(st.integers(0, 3)) for _ in range(rank)]
        strides = [draw(st.integers(0, 9)) for _ in range(rank)]
        reach = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if all(shape) else 0
        if reach > len(base):
            continue
        offset = draw(st.integers(0, len(base) - reach))
        found[f"v{number}"] = torch.as_strided(base, shape, strides, offset)
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(saved_views=st.composite(views)(), method=st.sampled_from(["direct", "buffered", "mmap"]))
def test_views_at_random(tmp_path: Path, saved_views: dict[str, Any], method: str) -> None:
    path = tmp_path / "views.pt"
    torch.save(saved_views, path)
    state = wl.load(path, method=method)
    assert sorted(state) == sorted(saved_views)
    for name, tensor in saved_views.items():
        assert (state[name].shape, state[name].dtype, bits(state[name])) == (tensor.shape, tensor.dtype, bits(tensor))
    for name, tensor in saved_views.items():
        # What is written through one view is seen through the others, as before.
        if tensor.numel() == 0 or any(step == 0 for step in tensor.stride()):
            continue
        tensor.add_(1)
        state[name].add_(1)
    assert all(bits(state[name]) == bits(tensor) for name, tensor in saved_views.items())
    arrays = wl.load(path, framework="numpy")
    assert all(isinstance(found, numpy.ndarray) for found in arrays.values())
