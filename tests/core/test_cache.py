"""What a load leaves in the page cache."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import weightlift as wl
from weightlift.compat.safetensors import safe_open
from weightlift.host import kernel, residency, sweeping
from weightlift.testing import TensorSpec, tensor_digest, write_checkpoint
from weightlift.testing.fast_disk import FastDiskUnavailable, fast_disk
from weightlift.units import MIB, PAGE_BYTES, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs("posix_fadvise", "cachestat")

SPECS = [TensorSpec(f"layer.{n}", "BF16", (6, MIB + 12345)) for n in range(4)]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]


class Cold:
    """A checkpoint on a disk that gives up pages when asked, none of it in the page cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.descriptor = os.open(path, os.O_RDWR)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.fsync(self.descriptor)
        sweeping.sweep(self.descriptor, [(0, self.size)])

    def evict(self) -> wl.Checkpoint:
        """Empty the page cache of the file, and open it: what reading its header brings in is not the load's doing."""
        sweeping.sweep(self.descriptor, [(0, self.size)])
        return wl.open(self.path)

    def cached(self) -> int | None:
        return residency.residency(self.descriptor, self.size)

    def warm(self, offset: int, length: int) -> None:
        assert len(os.pread(self.descriptor, length, offset)) == length

    def pages(self) -> bytes:
        """One byte per page: whether it is cached."""
        vector = kernel.resident_pages(self.descriptor, 0, self.size)
        assert vector is not None
        return vector


@pytest.fixture(scope="module", params=["here", "fast disk"])
def cold(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cold]:
    """The checkpoint on the file system of temporary files, and on ext4 over memory where that can be had."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot drop files from the page cache")
    if request.param == "here":
        yield from _cold(tmp_path_factory.mktemp("cache"))
        return
    try:
        disk = fast_disk(96 * MIB)
        folder = disk.__enter__()
    except FastDiskUnavailable as err:
        pytest.skip(str(err))
    try:
        yield from _cold(folder)
    finally:
        disk.__exit__(None, None, None)


def _cold(folder: Path) -> Iterator[Cold]:
    file = Cold(write_checkpoint(folder / "model.safetensors", SPECS, padding=8 + 3))
    try:
        if file.cached() != 0:
            pytest.skip(f"the file system under {folder} keeps pages it is asked to drop, or will not tell")
        yield file
    finally:
        os.close(file.descriptor)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ["auto", "direct", "buffered"])
def test_drop_leaves_the_cache_as_it_was_found(cold: Cold, method: str, workers: int, engine: str) -> None:
    checkpoint = cold.evict()
    # Every second stretch, with odd ends in the middle of what the plan looks at.
    for start in range(5 * MIB + 3 * PAGE_BYTES, cold.size - 4 * MIB, 8 * MIB):
        cold.warm(start, 3 * MIB + 5 * PAGE_BYTES)
    before = cold.pages()
    state = wl.load(checkpoint, device="null", method=method, cache="drop", workers=workers, engine=engine)
    after = cold.pages()
    lost = [page for page, was in enumerate(before) if was and not after[page]]
    gained = sum(now & ~was & 1 for was, now in zip(before, after, strict=True))
    # The kernel itself may take or move a page now and then.
    few = sum(before) // 250
    assert len(lost) <= few, f"of {sum(before)} pages that were cached these are gone: {lost}"
    assert gained * PAGE_BYTES < cold.size // 100
    report = state.report
    assert report.cache_decided == "drop"
    assert report.page_cache_before_bytes == pytest.approx(sum(before) * PAGE_BYTES, abs=few * PAGE_BYTES)
    assert report.page_cache_after_bytes == pytest.approx(sum(after) * PAGE_BYTES, abs=few * PAGE_BYTES)
    if method == "auto":
        resident = sum(before) * PAGE_BYTES
        through_cache = report.method_used["buffered"]
        assert resident - 8 * MIB <= through_cache <= resident or not report.method_used["direct"]


@pytest.mark.parametrize("method", ["auto", "direct", "buffered"])
def test_drop_leaves_no_page_of_the_header(cold: Cold, method: str) -> None:
    cold.evict()
    sweeping.sweep(cold.descriptor, [(0, cold.size)])
    report = wl.load(cold.path, device="null", method=method, cache="drop", names=["layer.3"]).report
    if method == "direct" and not report.method_used["direct"]:
        pytest.skip(report.reason)
    assert not any(cold.pages())


def test_opening_reads_no_further_than_the_header_and_keeps_what_was_there(cold: Cold) -> None:
    sweeping.sweep(cold.descriptor, [(0, cold.size)])
    shard = wl.open(cold.path).description.shards[0]
    whole_pages = align_up(shard.data_offset, PAGE_BYTES)
    assert residency.united(shard.brought_in) == [(0, whole_pages)]
    assert cold.cached() == whole_pages
    checkpoint = wl.open(cold.path)
    assert checkpoint.description.shards[0].brought_in == ()
    wl.load(checkpoint, device="null", method="buffered", cache="drop")
    assert cold.pages()[0]


@pytest.mark.parametrize("method", ["auto", "buffered"])
def test_keep_lets_the_file_stay_and_the_next_load_uses_it(cold: Cold, method: str) -> None:
    checkpoint = cold.evict()
    first = wl.load(checkpoint, device="null", method=method, cache="keep").report
    assert first.page_cache_before_bytes is not None
    assert first.page_cache_before_bytes < cold.size // 100
    assert first.cache_decided == "keep"
    cached = cold.cached()
    assert cached is not None
    assert cached > 0.98 * cold.size
    second = wl.load(checkpoint, device="null").report
    assert second.method_used["direct"] <= 0.03 * cold.size
    assert "page cache" in second.reason


@pytest.mark.parametrize("engine", ENGINES)
def test_direct_reads_do_not_fill_the_cache(cold: Cold, engine: str) -> None:
    checkpoint = cold.evict()
    report = wl.load(checkpoint, device="null", method="direct", cache="keep", engine=engine, digest=True).report
    if not report.method_used["direct"]:
        pytest.skip(report.reason)
    assert report.digests == {spec.name: tensor_digest(spec) for spec in SPECS}
    cached = cold.cached()
    assert cached is not None
    assert cached < cold.size // 100


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("header", ["cold", "warm"])
def test_a_row_of_a_cold_tensor_brings_its_own_pages_into_the_cache(cold: Cold, suffix: str, header: str) -> None:
    path = cold.path.with_name(f"other name{suffix}")
    path.unlink(missing_ok=True)
    path.hardlink_to(cold.path)
    length = int.from_bytes(os.pread(cold.descriptor, 8, 0), "little")
    sweeping.sweep(cold.descriptor, [(0, cold.size)])
    if header == "warm":
        cold.warm(0, 8 + length)
    with safe_open(path, framework="pt") as file:
        opened = cold.pages()
        row = file.get_slice("layer.2")[3]
    assert len(row) == MIB + 12345
    begin = wl.open(path)["layer.2"].offset + 3 * row.nbytes
    pages = cold.pages()
    expected = bytearray(len(pages))
    for page in range(align_up(8 + length, PAGE_BYTES) // PAGE_BYTES):
        expected[page] = 1
    assert opened == bytes(expected)
    for page in range(begin // PAGE_BYTES, align_up(begin + row.nbytes, PAGE_BYTES) // PAGE_BYTES):
        expected[page] = 1
    assert pages == bytes(expected)
