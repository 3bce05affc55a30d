"""Residency, warming and evicting of any files, on a real disk."""

from __future__ import annotations

import mmap
import os
import sys
from typing import TYPE_CHECKING

import pytest
from page_cache import kept

from weightlift.errors import AccessError, CheckpointNotFoundError, InsufficientMemoryError, NotACheckpointError
from weightlift.health.cache import warm as warm_module
from weightlift.health.cache.evict import evict
from weightlift.health.cache.files import find_files
from weightlift.health.cache.residency import CELLS, file_residency, residencies, total_cached
from weightlift.health.cache.warm import beyond, warm, within
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cold = Callable[[str, int], Path]
    Cached = Callable[[Path], int | None]


class TestFindFiles:
    def test_links_of_the_hub_cache_come_once_by_their_real_names(self, tmp_path: Path) -> None:
        model = tmp_path / "models--a--b"
        for folder in ("blobs", "snapshots/x", "refs"):
            (model / folder).mkdir(parents=True)
        (model / "blobs/0a1b").write_bytes(b"weights")
        (model / "blobs/ffff.incomplete").write_bytes(b"wei")
        (model / "refs/main").write_text("x")
        (model / "snapshots/x/model.gguf").symlink_to("../../blobs/0a1b")
        (model / "snapshots/x/gone.bin").symlink_to("../../blobs/nothing")
        found = [str(file.path.relative_to(model)) for file in find_files([model])]
        assert found == ["snapshots/x/model.gguf", "blobs/ffff.incomplete", "refs/main"]

    def test_circles_and_repeats_end(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a/file").write_bytes(b"x")
        (tmp_path / "a/up").symlink_to("..")
        (tmp_path / "again").symlink_to("a")
        (tmp_path / "empty").touch()
        assert [file.path for file in find_files([tmp_path, tmp_path / "a/file"])] == [tmp_path / "a/file"]

    def test_the_order_is_the_users(self, tmp_path: Path) -> None:
        for name in "abc":
            (tmp_path / name).write_bytes(b"x")
        paths = [tmp_path / name for name in "cab"]
        assert [file.path for file in find_files(paths)] == paths

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFoundError):
            find_files([tmp_path / "nothing"])

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_pipes_are_refused_and_in_folders_passed_over(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert find_files([tmp_path]) == []
        with pytest.raises(NotACheckpointError):
            find_files([tmp_path / "pipe"])

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list everything")
    def test_a_folder_one_may_not_list(self, tmp_path: Path) -> None:
        (tmp_path / "closed").mkdir(mode=0)
        with pytest.raises(AccessError):
            find_files([tmp_path])


class TestResidency:
    def test_where_a_file_is_cached(self, cold_file: Cold) -> None:
        path = cold_file("weights", 24 * MIB)
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(descriptor, 2 * MIB + 512 * KIB, 6 * MIB)
        os.close(descriptor)
        (entry,) = residencies(find_files([path]))
        assert entry.cached_bytes == kept(2 * MIB + 512 * KIB)
        assert entry.cells == tuple([0.0] * 6 + [1.0, 1.0, 0.5] + [0.0] * 15)

    def test_a_small_file_has_few_cells(self, cold_file: Cold) -> None:
        (entry,) = residencies(find_files([cold_file("small", 10_000)]))
        assert entry.cells == (0.0, 0.0, 0.0)
        assert len(entry.cells) < CELLS

    def test_a_file_that_is_gone_is_unknown(self, cold_file: Cold) -> None:
        path = cold_file("small", 10_000)
        (found,) = find_files([path])
        path.unlink()
        entry = file_residency(found)
        assert (entry.cached_bytes, entry.cells) == (None, ())
        assert total_cached([entry]) is None


class TestWarm:
    def test_everything(self, cold_file: Cold, count_cached: Cached) -> None:
        paths = [cold_file("a", 20 * MIB + 123), cold_file("b", 5000)]
        calls: list[tuple[int, int]] = []
        result = warm(find_files(paths), progress=lambda done, total: calls.append((done, total)))
        assert [count_cached(path) for path in paths] == [kept(20 * MIB + 123), 5000]
        assert (result.read_bytes, result.bound) == (20 * MIB + 5123, "")
        assert (total_cached(result.before), total_cached(result.after)) == (0, kept(20 * MIB + 5123))
        assert calls[-1] == (20 * MIB + 5123, 20 * MIB + 5123)

    def test_what_is_cached_is_not_read_again(self, cold_file: Cold) -> None:
        files = find_files([cold_file("a", 20 * MIB)])
        warm(files)
        assert warm(files).read_bytes == 0

    def test_a_budget_is_kept_to_the_page(self, cold_file: Cold, count_cached: Cached) -> None:
        paths = [cold_file("a", 12 * MIB), cold_file("b", 48 * MIB), cold_file("c", 12 * MIB)]
        result = warm(find_files(paths), budget_bytes=20 * MIB)
        assert [count_cached(path) for path in paths] == [kept(12 * MIB), kept(8 * MIB), 0]
        assert (result.read_bytes, result.room_bytes, result.bound) == (20 * MIB, 20 * MIB, "budget")

    def test_so_is_what_memory_has_room_for(self, cold_file: Cold, count_cached: Cached) -> None:
        path = cold_file("a", 48 * MIB)
        result = warm(find_files([path]), budget_bytes=40 * MIB, spare=lambda: 16 * MIB)
        assert count_cached(path) == kept(16 * MIB)
        assert (result.room_bytes, result.bound) == (16 * MIB, "memory")

    def test_it_ends_when_memory_gets_short_meanwhile(self, cold_file: Cold) -> None:
        path = cold_file("a", 48 * MIB)
        answers = iter([100 * MIB])
        result = warm(find_files([path]), spare=lambda: next(answers, 0))
        assert result.bound == "memory"

    def test_no_room_at_all(self, cold_file: Cold) -> None:
        with pytest.raises(InsufficientMemoryError, match="room for 0 B more"):
            warm(find_files([cold_file("a", 48 * MIB)]), spare=lambda: 0)

    def test_many_files_are_not_all_open_at_once(
        self, cold_file: Cold, count_cached: Cached, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(warm_module, "_FILES_AT_ONCE", 2)
        paths = [cold_file(f"f{number}", 10_000) for number in range(5)]
        result = warm(find_files(paths))
        assert [count_cached(path) for path in paths] == [10_000] * 5
        assert result.read_bytes == 50_000

    def test_room_is_shared_out_in_order(self) -> None:
        ranges = [(0, 4 * MIB), (8 * MIB, 4 * MIB), (20 * MIB, 4 * MIB)]
        assert within(ranges, 100 * MIB) == ranges
        assert within(ranges, 6 * MIB + 5) == [(0, 4 * MIB), (8 * MIB, 2 * MIB)]
        assert beyond(ranges, [(0, 4 * MIB), (8 * MIB, 2 * MIB)]) == [(10 * MIB, 2 * MIB), (20 * MIB, 4 * MIB)]
        assert within(ranges, 5) == []
        assert beyond(ranges, []) == ranges
        assert beyond(ranges, ranges) == []


class TestEvict:
    def test_everything_is_gone_afterwards(self, cold_file: Cold, count_cached: Cached) -> None:
        paths = [cold_file("a", 20 * MIB), cold_file("b", 5000)]
        warm(find_files(paths))
        results = evict(find_files(paths))
        assert [(one.before_bytes, one.after_bytes, one.gone) for one in results] == [
            (20 * MIB, 0, True),
            (5000, 0, True),
        ]
        assert [count_cached(path) for path in paths] == [0, 0]

    def test_what_was_just_written_goes_too(self, cold_file: Cold, count_cached: Cached) -> None:
        path = cold_file("a", 4 * MIB)
        path.write_bytes(bytes(4 * MIB))
        assert evict(find_files([path]))[0].gone
        assert count_cached(path) == 0
        assert path.read_bytes() == bytes(4 * MIB)

    @pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
    def test_what_is_mapped_stays_and_its_holder_is_named(self, cold_file: Cold) -> None:
        path = cold_file("a", 4 * MIB)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            mapping.madvise(22)  # MADV_POPULATE_READ
            (result,) = evict(find_files([path]))
        assert not result.gone
        assert result.after_bytes == 4 * MIB
        assert f"({os.getpid()})" in result.reason

    def test_a_file_of_another_user_is_left_alone(
        self, cold_file: Cold, count_cached: Cached, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = cold_file("a", 4 * MIB)
        warm(find_files([path]))
        monkeypatch.setattr("weightlift.host.residency.residency", lambda *_: None)
        (result,) = evict(find_files([path]))
        monkeypatch.undo()
        assert (result.before_bytes, result.gone) == (None, False)
        assert "another user" in result.reason
        assert count_cached(path) == kept(4 * MIB)
