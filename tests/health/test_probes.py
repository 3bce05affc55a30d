"""Speed probes: bounded, honest about what they could not try, and the page cache as it was."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from page_cache import kept

import weightlift as wl
from weightlift import ceilings
from weightlift.health import probes
from weightlift.host import residency, storage
from weightlift.host.memory import Headroom
from weightlift.host.storage import DirectAccess
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into the page cache")


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    ceilings.forget()
    yield
    ceilings.forget()


class Model:
    """A file on a disk and what the page cache holds of it."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.path = write_checkpoint(folder / "m.safetensors", [TensorSpec("t", "U8", (nbytes,))])
        self.fd = os.open(self.path, os.O_RDWR)
        os.fsync(self.fd)
        self.size = os.fstat(self.fd).st_size

    def drop(self) -> None:
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if self.cached() != 0:
            pytest.skip("the file system keeps pages it is asked to drop, or will not tell")

    def cached(self) -> int | None:
        return residency.residency(self.fd, self.size)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    found = Model(tmp_path, 128 * MIB)
    yield found
    os.close(found.fd)


class TestStorage:
    def test_a_cold_file_is_cold_afterwards(self, model: Model) -> None:
        model.drop()
        speeds = probes.storage_speeds(model.path, seconds=0.1)
        assert model.cached() == 0
        assert {"buffered", "mmap", "cached"} <= speeds.storage.keys()
        assert all(speed > 0 for speed in speeds.storage.values())
        assert set(speeds.storage) | set(speeds.notes) >= {"direct", "uncached", "buffered", "mmap"}

    def test_a_half_cached_file_stays_half_cached(self, model: Model) -> None:
        model.drop()
        os.posix_fadvise(model.fd, 0, 0, os.POSIX_FADV_RANDOM)
        half = 32 * MIB
        os.pread(model.fd, half, 0)
        before = model.cached()
        assert before is not None
        probes.storage_speeds(model.path, seconds=0.05)
        assert model.cached() == kept(before)

    def test_a_cached_file_stays_cached_and_is_measured_out_of_memory(self, model: Model) -> None:
        os.pread(model.fd, model.size, 0)
        before = model.cached()
        if before != model.size:
            pytest.skip("the file did not stay in the page cache")
        speeds = probes.storage_speeds(model.path, seconds=0.05)
        assert model.cached() == kept(model.size)
        assert speeds.storage["cached"] > 0
        assert "buffered" not in speeds.storage
        assert "page cache" in speeds.notes["buffered"]

    def test_no_more_than_the_file_is_read(self, model: Model) -> None:
        model.drop()
        # A second of a path would read the file many times over, if that were allowed.
        speeds = probes.storage_speeds(model.path, seconds=1.0)
        parts = list(probes._divide([(0, model.size)], 4))
        assert len(parts) == 4
        assert sum(part.length for part in parts) < model.size
        ends = [part.offset + part.length for part in parts]
        assert all(part.offset >= end for part, end in zip(parts[1:], ends, strict=False))
        assert speeds.storage

    def test_what_the_cache_holds_is_unknown_so_only_direct_reads_are_tried(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model.drop()
        monkeypatch.setattr(residency, "residency_map", lambda *_: None)
        speeds = probes.storage_speeds(model.path, seconds=0.05)
        assert model.cached() == 0
        assert speeds.storage.keys() <= {"direct"}
        assert "unknown" in speeds.notes["buffered"]

    def test_without_direct_reads_the_reason_is_told(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        refused = DirectAccess(supported=False, memory_alignment=0, offset_alignment=0, reason="it refuses")
        monkeypatch.setattr(storage.DirectTrial, "judge", lambda *_: refused)
        model.drop()
        speeds = probes.storage_speeds(model.path, seconds=0.05)
        assert speeds.notes["direct"] == "it refuses"
        assert "direct" not in speeds.storage

    def test_small_and_empty_files_are_too_small_to_tell(self, tmp_path: Path) -> None:
        for name, size in (("small", 4096), ("empty", 0)):
            path = tmp_path / name
            path.write_bytes(bytes(size))
            speeds = probes.storage_speeds(path, seconds=0.01)
            assert "direct" not in speeds.storage
            assert speeds.notes

    def test_probing_leaves_no_descriptor_open(self, model: Model) -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        probes.storage_speeds(model.path, seconds=0.01)
        assert sorted(os.listdir("/proc/self/fd")) == before


class TestMemory:
    def test_it_copies(self) -> None:
        speed = probes.memory_copy_speed(seconds=0.02)
        assert speed is not None
        assert speed > 0

    def test_threads_that_begin_late_are_counted_too(self) -> None:
        speed = probes.memory_copy_speed(seconds=0.0)
        assert speed is not None
        assert speed > 0

    def test_where_little_memory_is_free_nothing_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tight = Headroom(64 * MIB, "machine", 1 << 30, 0, "little is left")
        monkeypatch.setattr(probes, "headroom", lambda: tight)
        assert probes.memory_copy_speed() is None


class TestCeilings:
    def test_a_load_reports_what_was_probed_in_this_process_and_null_otherwise(self, model: Model) -> None:
        unknown = wl.load(model.path, framework="numpy").report
        assert unknown.ceilings == {"storage": None, "memory_copy": None, "link": None}
        model.drop()
        speeds = probes.storage_speeds(model.path, seconds=0.1)
        copied = probes.memory_copy_speed(seconds=0.02)
        report = wl.load(model.path, framework="numpy").report
        assert speeds.fastest is not None
        assert report.ceilings["storage"] == speeds.fastest[1]
        assert report.ceilings["memory_copy"] == copied
        assert report.ceilings["link"] is None

    def test_a_file_on_another_device_has_no_ceiling(self) -> None:
        ceilings.remember_storage(7, 3.0)
        ceilings.remember_storage(7, 2.0)
        assert ceilings.known_ceilings([7, 7], "cpu")["storage"] == 3.0
        assert ceilings.known_ceilings([8], "cpu")["storage"] is None
        ceilings.remember_storage(8, 1.0)
        assert ceilings.known_ceilings([7, 8], "cpu")["storage"] is None
        assert ceilings.known_ceilings([], "null")["storage"] is None

    def test_links_of_several_devices_add_up_if_all_are_known(self) -> None:
        ceilings.remember_link("cuda:0", 25.0)
        assert ceilings.known_ceilings([], "cuda:0")["link"] == 25.0
        assert ceilings.known_ceilings([], "cuda:0, cpu")["link"] == 25.0
        assert ceilings.known_ceilings([], "cuda:0, cuda:1")["link"] is None
        ceilings.remember_link("cuda:1", 12.0)
        assert ceilings.known_ceilings([], "cuda:0, cuda:1")["link"] == 37.0
