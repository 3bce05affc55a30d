"""The page cache of the model's files: put back as it was found, from cold and from warm."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from page_cache import kept

from weightlift.bench.cache_states import ModelFiles
from weightlift.health.cache.files import find_files
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Shards = Callable[[Path], list[Path]]
    Cached = Callable[[Path], int | None]

PART_BYTES = 4 * MIB


@pytest.fixture
def files(cold_model: Path, shards: Shards, cached_bytes: Cached) -> ModelFiles:
    """The model with 4 MiB in the middle of its first file cached."""
    descriptor = os.open(shards(cold_model)[0], os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(descriptor, PART_BYTES, PART_BYTES)
    finally:
        os.close(descriptor)
    assert [cached_bytes(file) for file in shards(cold_model)] == [PART_BYTES, 0]
    return ModelFiles(find_files(shards(cold_model)), may_drop=True, brought_in=[[], []])


@pytest.mark.parametrize("state", ["make_cold", "make_warm"])
def test_what_was_cached_comes_back_and_the_rest_goes(
    files: ModelFiles, cold_model: Path, shards: Shards, cached_bytes: Cached, state: str
) -> None:
    getattr(files, state)()
    assert files.cached_bytes() == (0 if state == "make_cold" else kept(files.total_bytes))
    restored = files.restore(read_again=True)
    assert (restored.before_bytes, restored.after_bytes, restored.note) == (PART_BYTES, PART_BYTES, "")
    assert [cached_bytes(file) for file in shards(cold_model)] == [PART_BYTES, 0]


def test_without_time_to_read_it_is_said_what_was_lost(files: ModelFiles) -> None:
    files.make_cold()
    restored = files.restore(read_again=False)
    assert (restored.before_bytes, restored.after_bytes) == (PART_BYTES, 0)
    assert restored.note == ("4.00 MiB that were cached before are not any more; there was no time to read them again")


def test_files_that_are_gone_meanwhile_are_told_and_no_failure(files: ModelFiles, cold_model: Path) -> None:
    (cold_model / "model-00001-of-00002.safetensors").unlink()
    restored = files.restore(read_again=True)
    assert restored.after_bytes is None
    assert "model-00001-of-00002.safetensors: No such file" in restored.note


def test_headers_that_were_just_read_do_not_count_as_cached(cold_model: Path, shards: Shards) -> None:
    first = shards(cold_model)[0]
    with first.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 4096, 0)
    files = ModelFiles(find_files([first]), may_drop=True, brought_in=[[(0, 4096)]])
    assert files.cached_bytes() == 4096
    assert files.restore(read_again=True).after_bytes == 0


def test_what_came_and_went_since_is_told_apart(files: ModelFiles, cold_model: Path, shards: Shards) -> None:
    before = files.snapshot()
    assert (before.cached_bytes, files.added_bytes(before)) == (PART_BYTES, 0)
    descriptor = os.open(shards(cold_model)[0], os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, PART_BYTES, PART_BYTES // 2, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(descriptor, MIB, 0)
    finally:
        os.close(descriptor)
    assert (files.cached_bytes(), files.added_bytes(before)) == (kept(PART_BYTES // 2 + MIB), kept(MIB))
