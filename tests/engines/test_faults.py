"""Storage that fails: the right error with its numbers, nothing half-loaded, nothing left behind."""

from __future__ import annotations

import errno
import itertools
import threading
from typing import TYPE_CHECKING, Any

import pytest

from weightlift import failures, pipeline, supervision
from weightlift.errors import ReadError, TruncatedFileError, WeightliftError
from weightlift.formats import describe
from weightlift.options import LoadOptions
from weightlift.pipeline import Transfer
from weightlift.reach import reach_of
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.host import HostTarget
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.testing.faults import FaultingReader, Faults
from weightlift.testing.leaks import nothing_left_behind
from weightlift.types import Framework
from weightlift.units import KIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from weightlift.operations import ReadPath

SPECS = [
    TensorSpec("first", "F32", (100, 333)),
    TensorSpec("long", "BF16", (700, 999)),
    TensorSpec("odd", "U8", (10_001,)),
]


@pytest.fixture(params=["reference", 5])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS, padding=request.param)
    with nothing_left_behind(tmp_path):
        yield path
        # Whatever went wrong, the next load works.
        require_contents(load(path, None)[0])


def load(path: Path, reader: FaultingReader | None, **keywords: Any) -> tuple[dict[str, Any], Transfer]:
    options = LoadOptions(workers=3, chunk_bytes=64 * KIB, engine="python", **keywords)  # type: ignore[arg-type]
    description = describe(path)
    rows = range(len(description))
    target = HostTarget(description, rows, pick_framework(Framework.NUMPY))
    transfer = Transfer(
        description, reach_of(description, rows), options, destination_bytes=target.host_bytes, reader=reader
    )
    transfer.run(target)
    tensors = dict(transfer.tensors(target))
    transfer.finish()
    return tensors, transfer


def require_contents(tensors: dict[str, Any]) -> None:
    assert {name: tensor.tobytes() for name, tensor in tensors.items()} == {
        spec.name: tensor_bytes(spec) for spec in SPECS
    }


def tensor_around(path: Path, offset: int) -> str | None:
    return describe(path).tensor_at(0, offset)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_short_and_interrupted_reads_are_finished(checkpoint: Path, method: str, seed: int) -> None:
    reader = FaultingReader(seed, Faults(short_reads=0.7, interruptions=0.5))
    tensors, _ = load(checkpoint, reader, method=method)
    require_contents(tensors)
    assert reader.shortened > 5, reader
    assert reader.interrupted > 5, reader


def test_the_same_seed_makes_the_same_faults(checkpoint: Path) -> None:
    readers = [FaultingReader(seed, Faults(short_reads=0.5, interruptions=0.3)) for seed in (9, 9, 10)]
    for reader in readers:
        load(checkpoint, reader, method="buffered")
    counts = [(reader.reads, reader.shortened, reader.interrupted) for reader in readers]
    assert counts[0] == counts[1] != counts[2]
    assert "seed=9" in repr(readers[0])


@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_a_failed_read_names_file_tensor_and_numbers(checkpoint: Path, method: str, number: int) -> None:
    reader = FaultingReader(0, Faults(fail_at_read=number))
    with pytest.raises(ReadError, match="EIO") as caught:
        load(checkpoint, reader, method=method)
    error = caught.value
    assert (error.errno, error.path) == (errno.EIO, checkpoint)
    assert error.offset is not None
    assert error.tensor == tensor_around(checkpoint, error.offset)
    assert error.tensor is not None
    assert error.tensor in str(error)
    assert f"{error.offset:,}" in str(error)
    assert "smartctl" in error.hint


@pytest.mark.parametrize(("number", "hint"), [(errno.ESTALE, "mount"), (errno.ETIMEDOUT, "network")])
def test_the_hint_follows_from_the_error(checkpoint: Path, number: int, hint: str) -> None:
    with pytest.raises(ReadError) as caught:
        load(checkpoint, FaultingReader(0, Faults(fail_at_read=3, error_number=number)))
    assert caught.value.errno == number
    assert hint in caught.value.hint


@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_an_early_end_of_file_is_told_where_it_is(checkpoint: Path, method: str) -> None:
    end = describe(checkpoint).offsets[0] + 500_001
    with pytest.raises(TruncatedFileError) as caught:
        load(checkpoint, FaultingReader(0, Faults(end_of_file_at=end)), method=method)
    assert caught.value.path == checkpoint
    # Chunks behind the end may be read before the one that holds it.
    assert caught.value.offset is not None
    assert end <= caught.value.offset < end + 3 * 64 * KIB
    assert caught.value.tensor == tensor_around(checkpoint, caught.value.offset)


@pytest.mark.parametrize("after", [0, 300_000])
def test_direct_reads_refused_on_the_way_are_read_through_the_cache_and_counted(checkpoint: Path, after: int) -> None:
    tensors, untouched = load(checkpoint, None, method="direct")
    if not untouched.uses[0].direct_bytes:
        pytest.skip(untouched.shards.facts[0].direct_reason)
    reader = FaultingReader(0, Faults(refuse_direct_from=after))
    tensors, transfer = load(checkpoint, reader, method="direct")
    require_contents(tensors)
    use = transfer.uses[0]
    total = sum(spec.nbytes for spec in SPECS)
    assert use.direct_bytes + use.buffered_bytes == total
    assert (use.refused_bytes, use.refused_errno) == (use.buffered_bytes, errno.EINVAL)
    assert total - after <= use.refused_bytes <= total
    assert (use.direct_bytes > 0) == (after > 0)


def test_the_order_in_which_chunks_finish_does_not_matter(checkpoint: Path) -> None:
    first, others = threading.Event(), itertools.count(1)
    begin = describe(checkpoint).offsets[0]

    def hold_back(path: ReadPath, offset: int) -> None:
        if offset <= begin:
            assert first.wait(20)
        elif next(others) == 12:
            first.set()

    tensors, _ = load(checkpoint, FaultingReader(0, Faults(before_read=hold_back)), method="buffered")
    require_contents(tensors)


@pytest.mark.parametrize("number", [1, 4])
def test_memory_given_out_before_a_failure_is_not_handed_on(checkpoint: Path, number: int) -> None:
    """A failed load raises; there is no way to a partial result."""
    reader = FaultingReader(0, Faults(fail_at_read=number))
    tensors: dict[str, Any] = {}
    with pytest.raises(WeightliftError):
        tensors, _ = load(checkpoint, reader)
    assert tensors == {}


def test_a_read_that_never_returns_is_named_and_keeps_its_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    monkeypatch.setattr(pipeline, "_STUCK_SECONDS", 0.05)
    abandoned: list[Any] = []
    monkeypatch.setattr(failures, "_abandoned", abandoned)
    server_is_back = threading.Event()
    begin = describe(path).offsets[0]

    def hang(_: ReadPath, offset: int) -> None:
        if offset == begin:
            server_is_back.wait()

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(supervision, "_PROGRESS_SECONDS", 0.0)
    with nothing_left_behind(tmp_path):
        try:
            with pytest.raises(KeyboardInterrupt) as caught:
                load(path, FaultingReader(0, Faults(before_read=hang)), method="buffered", progress=interrupt)
            (note,) = caught.value.__notes__
            assert "1 workers have not returned" in note
            assert f"{path} at byte {begin:,}" in note
            assert len(abandoned) == 1
        finally:
            server_is_back.set()
        engine, _, _, shards = abandoned.pop()
        assert engine.join(20) == 0
        shards.close()
