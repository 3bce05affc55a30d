"""``weightlift.stream``: every tensor once, in file order, with reading held back while the consumer is busy."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch

import weightlift as wl
from weightlift.errors import OptionError, TruncatedFileError
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

SPECS = [
    TensorSpec("embedding", "F32", (9, MIB // 4 + 3)),
    *[TensorSpec(f"norm.{n}", "BF16", (n + 1, 5)) for n in range(40)],
    TensorSpec("empty", "F16", (0, 7)),
    TensorSpec("scalar", "F64", ()),
    *[TensorSpec(f"layer.{n}", "U8", (3 * MIB + n,)) for n in range(6)],
]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors", SPECS)


def _bits(tensor: Any) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _bytes(tensor: Any) -> bytes:
    return bytes(numpy.ascontiguousarray(tensor).tobytes())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["auto", "direct", "buffered"])
@pytest.mark.parametrize("padding", ["reference", 11])
def test_every_tensor_comes_once_in_file_order(tmp_path: Path, engine: str, method: str, padding: Any) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS, padding=padding)
    stream = wl.stream(path, engine=engine, method=method, framework="numpy", host_memory="8MiB")
    by_name = {spec.name: spec for spec in SPECS}
    names = []
    for name, tensor in stream:
        names.append(name)
        assert tensor.shape == by_name[name].shape
        assert _bytes(tensor) == tensor_bytes(by_name[name])
    assert names == list(wl.open(path))
    assert stream.report is not None
    assert stream.report.tensors == len(SPECS)


def test_a_data_type_is_converted_on_the_way(path: Path) -> None:
    plain = wl.load(path, framework="torch")
    for name, tensor in wl.stream(path, framework="torch", dtype="float64"):
        expected = plain[name].double() if plain[name].is_floating_point() else plain[name]
        assert tensor.dtype == expected.dtype
        # Random bytes hold NaN, which equals nothing: compare the bits.
        assert _bits(tensor) == _bits(expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_reading_pauses_while_a_finished_tensor_waits(tmp_path: Path, engine: str) -> None:
    specs = [TensorSpec(f"layer.{n:02}", "U8", (16 * MIB,)) for n in range(16)]
    path = write_checkpoint(tmp_path / "model.safetensors", specs)
    done: list[int] = []
    with wl.stream(path, engine=engine, framework="numpy", progress=lambda now, _: done.append(now)) as stream:
        next(stream)
        transfer, running = stream._transfer, stream._transfer._engine
        assert running is not None
        while transfer.landed_bytes() < running.counters().claimed_bytes:
            running.poll(0.01)
        # One tensor is the consumer's, one waits, one may have landed but for a part that a worker held up, and what
        # was in flight when the first finished was under the window of two before the last was added to it.
        assert transfer.landed_bytes() <= (3 + 2 + 1) * 16 * MIB
        assert transfer.landed_bytes() < sum(spec.nbytes for spec in specs) // 2


@pytest.mark.parametrize("engine", ENGINES)
def test_closing_early_leaves_nothing_behind(path: Path, engine: str) -> None:
    kept, _ = next(wl.stream(path, engine=engine, framework="numpy"))
    gc.collect()
    with nothing_left_behind(path.parent):
        with wl.stream(path, engine=engine, framework="numpy") as stream:
            first, tensor = next(stream)
        assert list(stream) == []
        assert first == kept
        assert _bytes(tensor) == tensor_bytes(SPECS[0] if first == "embedding" else _spec(first))
        del stream, tensor
        gc.collect()


def _spec(name: str) -> TensorSpec:
    return next(spec for spec in SPECS if spec.name == name)


def test_an_error_ends_the_stream_and_releases_everything(path: Path) -> None:
    with nothing_left_behind(path.parent):
        checkpoint = wl.open(path)
        stream = wl.stream(checkpoint, framework="numpy", workers=1, chunk_bytes=64 * 1024)
        next(stream)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(TruncatedFileError, match=r"model\.safetensors"):
            list(stream)
        assert list(stream) == []
        del stream
        gc.collect()


@pytest.mark.parametrize(("options", "words"), [({"device": "null"}, "null"), ({"method": "mmap"}, "mmap")])
def test_what_cannot_stream_says_what_to_use(path: Path, options: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        wl.stream(path, **options)  # type: ignore[arg-type]
    assert "weightlift.load" in caught.value.hint


def test_a_failure_seen_with_finished_tensors_in_hand_ends_the_stream(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = wl.stream(path, framework="numpy")
    next(stream)
    transfer, submit = stream._transfer, stream._submit
    drop = transfer.drop

    def drop_and_fail(target: Any) -> None:
        drop(target)
        monkeypatch.setattr(stream, "_submit", fail)

    def fail() -> None:
        monkeypatch.setattr(stream, "_submit", submit)
        raise TruncatedFileError("cut", path=str(path), tensor="", offset=0, length=1)

    monkeypatch.setattr(transfer, "drop", drop_and_fail)
    with pytest.raises(TruncatedFileError):
        list(stream)
    assert list(stream) == []
