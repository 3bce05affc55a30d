from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from weightlift.host import kernel, residency, storage
from weightlift.host.kernel import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.host.conftest import CachedFile

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")


class TestDirect:
    @linux_only
    def test_what_the_probe_allows_works(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(64 * PAGE_SIZE + 77)
        access = storage.probe_direct(file.path)
        if not access.supported:
            pytest.skip(f"no direct reads under {file.path}: {access.reason}")
        assert str(access.offset_alignment) in access.reason
        assert kernel.cachestat(file.fd, 0, 0) == (0, 0, 0, 0, 0), "the trial read filled the page cache"
        fd = os.open(file.path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 8 * access.offset_alignment + 2 * PAGE_SIZE) as block:
                start = access.memory_alignment
                with memoryview(block)[start : start + 8 * access.offset_alignment] as buffer:
                    assert os.preadv(fd, [buffer], access.offset_alignment) == len(buffer)
                    assert bytes(buffer) == os.pread(file.fd, len(buffer), access.offset_alignment)
        finally:
            os.close(fd)

    @linux_only
    def test_a_file_shorter_than_a_block_is_accepted(self, make_file: Callable[[int], CachedFile]) -> None:
        file, long = make_file(10), make_file(8 * PAGE_SIZE)
        assert storage.probe_direct(file.path).supported == storage.probe_direct(long.path).supported

    @linux_only
    def test_an_empty_file_cannot_be_tried(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(0)
        access = storage.probe_direct(file.path)
        assert not access.supported
        assert "empty" in access.reason or "refuses" in access.reason

    @linux_only
    def test_a_file_system_without_direct_reads_is_named_with_the_error(self) -> None:
        access = storage.probe_direct("/proc/self/status")
        assert (access.supported, access.memory_alignment, access.offset_alignment) == (False, 0, 0)
        assert "proc" in access.reason
        assert "EINVAL" in access.reason

    @linux_only
    def test_a_read_that_fails_after_a_successful_open_is_a_refusal(
        self, make_file: Callable[[int], CachedFile], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # No file system that accepts the flag and then fails the read can be had at will: alignment below what the
        # device takes makes this one fail in the same way.
        file = make_file(8 * PAGE_SIZE)
        if not storage.probe_direct(file.path).supported:
            pytest.skip("no direct reads here")
        monkeypatch.setattr(kernel, "statx_direct_alignment", lambda *_: (1, 1))
        monkeypatch.setattr(storage, "_UNKNOWN_ALIGNMENT", 2)
        access = storage.probe_direct(file.path)
        assert not access.supported
        assert "EINVAL" in access.reason

    @linux_only
    def test_a_statement_that_is_too_fine_is_tried_again_coarser(
        self, make_file: Callable[[int], CachedFile], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = make_file(8 * PAGE_SIZE)
        if not storage.probe_direct(file.path).supported:
            pytest.skip("no direct reads here")
        monkeypatch.setattr(kernel, "statx_direct_alignment", lambda *_: (1, 1))
        assert storage.probe_direct(file.path).offset_alignment == 4096

    @linux_only
    def test_unknown_alignment_means_4096(
        self, make_file: Callable[[int], CachedFile], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = make_file(8 * PAGE_SIZE)
        if not storage.probe_direct(file.path).supported:
            pytest.skip("no direct reads here")
        monkeypatch.setattr(kernel, "statx_direct_alignment", lambda *_: None)
        access = storage.probe_direct(file.path)
        assert (access.memory_alignment, access.offset_alignment) == (4096, 4096)

    @linux_only
    def test_the_kernel_saying_no_is_final(
        self, make_file: Callable[[int], CachedFile], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = make_file(8 * PAGE_SIZE)
        monkeypatch.setattr(kernel, "statx_direct_alignment", lambda *_: (0, 0))
        assert not storage.probe_direct(file.path).supported

    def test_a_missing_file_is_an_error(self, tmp_path: Path) -> None:
        if not hasattr(os, "O_DIRECT"):
            pytest.skip("without O_DIRECT no file is opened")
        with pytest.raises(FileNotFoundError):
            storage.probe_direct(tmp_path / "nothing")

    def test_a_system_without_the_flag_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
        access = storage.probe_direct(tmp_path)
        assert not access.supported
        assert "O_DIRECT" in access.reason

    @linux_only
    def test_probing_leaves_no_descriptor_open(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(PAGE_SIZE)
        before = sorted(os.listdir("/proc/self/fd"))
        storage.probe_direct(file.path)
        assert sorted(os.listdir("/proc/self/fd")) == before


class TestDontCache:
    @linux_only
    def test_the_probe_agrees_with_a_real_read(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(4 * PAGE_SIZE)
        answer = storage.probe_dontcache(file.fd)
        try:
            os.preadv(file.fd, [bytearray(PAGE_SIZE)], 0, 0x80)
            works = True
        except OSError:
            works = False
        assert answer == works

    @linux_only
    def test_the_probe_neither_fills_nor_empties_the_cache(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(64 * PAGE_SIZE)
        # A descriptor of its own, with read-ahead as every new one has it.
        fd = os.open(file.path, os.O_RDONLY)
        try:
            storage.probe_dontcache(fd)
            assert residency.residency(fd, file.size_bytes) == 0
            file.warm(0, file.size_bytes)
            storage.probe_dontcache(fd)
        finally:
            os.close(fd)
        assert residency.residency(file.fd, file.size_bytes) == file.size_bytes

    @linux_only
    def test_tmpfs_does_not_take_such_reads(self) -> None:
        folder = Path("/dev/shm")  # noqa: S108 - wanted because it is tmpfs
        if storage.file_system(folder) != "tmpfs":
            pytest.skip(f"{folder} is not tmpfs")
        path = folder / f"weightlift-test-{os.getpid()}"
        path.write_bytes(bytes(PAGE_SIZE))
        fd = os.open(path, os.O_RDONLY)
        try:
            works = True
            try:
                os.preadv(fd, [bytearray(PAGE_SIZE)], 0, 0x80)
            except OSError:
                works = False
            assert storage.probe_dontcache(fd) == works
        finally:
            os.close(fd)
            path.unlink()

    def test_a_descriptor_that_cannot_be_read_is_no(self, tmp_path: Path) -> None:
        fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
        try:
            assert not storage.probe_dontcache(fd)
        finally:
            os.close(fd)


class TestFileSystem:
    @linux_only
    def test_known_mounts(self) -> None:
        assert storage.file_system("/proc/self/status") == "proc"
        assert storage.file_system("/sys") == "sysfs"

    @linux_only
    def test_the_device_number_decides(self, tmp_path: Path) -> None:
        device = os.stat(tmp_path).st_dev
        table = tmp_path / "mountinfo"
        table.write_text(
            "27 1 254:99 / / rw,relatime - ext4 /dev/vda rw\n"
            f"28 27 {os.major(device)}:{os.minor(device)} / /elsewhere rw shared:1 - fuse.sshfs host:/ rw\n"
        )
        assert storage.file_system(tmp_path, table) == "fuse.sshfs"

    @linux_only
    def test_without_it_the_longest_mount_point_decides(self, tmp_path: Path) -> None:
        inside = tmp_path / "with space" / "model"
        inside.mkdir(parents=True)
        escaped = str(tmp_path / "with space").replace(" ", r"\040")
        table = tmp_path / "mountinfo"
        table.write_text(
            f"28 27 0:99999 / {escaped} rw - btrfs /dev/vdb rw\n"
            f"29 27 0:99998 / {tmp_path}/with rw - xfs /dev/vdc rw\n"
            "27 1 254:9999 / / rw,relatime - ext4 /dev/vda rw\n"
        )
        assert storage.file_system(inside, table) == "btrfs"
        assert storage.file_system(tmp_path, table) == "ext4"

    def test_no_table_means_unknown(self, tmp_path: Path) -> None:
        assert storage.file_system(tmp_path, tmp_path / "nothing") == "unknown"
        assert storage.file_system(tmp_path / "nothing") == "unknown"
