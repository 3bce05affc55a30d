from __future__ import annotations

import errno
import mmap
import os
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.host import kernel
from weightlift.host.kernel import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.host.conftest import CachedFile

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")


@linux_only
def test_cachestat_counts_the_pages_of_a_range(make_file: Callable[[int], CachedFile]) -> None:
    file = make_file(64 * PAGE_SIZE)
    file.warm(16 * PAGE_SIZE, 8 * PAGE_SIZE)
    whole = kernel.cachestat(file.fd, 0, 0)
    inside = kernel.cachestat(file.fd, 17 * PAGE_SIZE, 3 * PAGE_SIZE)
    outside = kernel.cachestat(file.fd, 40 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert whole is not None
    assert (whole.cached, whole.dirty, whole.writeback) == (8, 0, 0)
    assert inside is not None
    assert inside.cached == 3
    assert outside is not None
    assert outside.cached == 0


@linux_only
def test_cachestat_counts_dirty_pages(make_file: Callable[[int], CachedFile]) -> None:
    file = make_file(8 * PAGE_SIZE)
    os.pwrite(file.fd, bytes(PAGE_SIZE), 2 * PAGE_SIZE)
    found = kernel.cachestat(file.fd, 0, 0)
    assert found is not None
    # The kernel may begin to write the page back at any moment.
    assert (found.cached, found.dirty + found.writeback) in {(1, 1), (1, 0)}


@linux_only
def test_cachestat_of_a_closed_descriptor_is_an_error(make_file: Callable[[int], CachedFile]) -> None:
    make_file(PAGE_SIZE)
    reader, writer = os.pipe()
    os.close(writer)
    os.close(reader)
    with pytest.raises(OSError, match="cachestat") as caught:
        kernel.cachestat(reader, 0, 0)
    assert caught.value.errno == errno.EBADF


@linux_only
def test_resident_pages_tells_page_by_page(make_file: Callable[[int], CachedFile]) -> None:
    file = make_file(12 * PAGE_SIZE + 100)
    file.warm(3 * PAGE_SIZE, 2 * PAGE_SIZE)
    file.warm(12 * PAGE_SIZE, 100)
    assert kernel.resident_pages(file.fd, 0, 12 * PAGE_SIZE + 100) == bytes([0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1])
    assert kernel.resident_pages(file.fd, 4 * PAGE_SIZE, 2 * PAGE_SIZE) == bytes([1, 0])


@linux_only
def test_resident_pages_refuses_an_offset_inside_a_page(make_file: Callable[[int], CachedFile]) -> None:
    file = make_file(2 * PAGE_SIZE)
    with pytest.raises(OSError, match="mmap") as caught:
        kernel.resident_pages(file.fd, 100, PAGE_SIZE)
    assert caught.value.errno == errno.EINVAL


@linux_only
def test_stated_alignment_is_none_or_a_power_of_two(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_SIZE))
    fd = os.open(path, os.O_RDONLY)
    try:
        stated = kernel.statx_direct_alignment(fd)
    finally:
        os.close(fd)
    if stated is None:
        pytest.skip("this kernel or file system does not state its alignment")
    assert all(value & (value - 1) == 0 and 0 <= value <= 1 << 20 for value in stated)
    assert (stated[0] == 0) == (stated[1] == 0)


@linux_only
def test_a_pipe_states_no_alignment() -> None:
    reader, writer = os.pipe()
    try:
        assert kernel.statx_direct_alignment(reader) in {None, (0, 0)}
    finally:
        os.close(reader)
        os.close(writer)


@linux_only
def test_advise_drops_clean_pages(make_file: Callable[[int], CachedFile]) -> None:
    file = make_file(8 * PAGE_SIZE)
    file.warm(0, 8 * PAGE_SIZE)
    kernel.advise_dont_need(file.fd, 2 * PAGE_SIZE, 3 * PAGE_SIZE)
    vector = kernel.resident_pages(file.fd, 0, 8 * PAGE_SIZE)
    # The kernel may have cached several pages as one unit, which goes only as a whole.
    assert vector in {bytes([1, 1, 0, 0, 0, 1, 1, 1]), bytes([1] * 8)}
    kernel.advise_dont_need(file.fd, 0, 0)
    assert kernel.resident_pages(file.fd, 0, 8 * PAGE_SIZE) == bytes(8)


@linux_only
def test_advice_to_populate_is_understood_by_the_kernel() -> None:
    with mmap.mmap(-1, 4 * PAGE_SIZE) as memory:
        try:
            memory.madvise(kernel.MADV_POPULATE_WRITE)
            memory.madvise(kernel.MADV_POPULATE_READ)
        except OSError as err:
            pytest.skip(f"this kernel cannot populate on request: {err}")
    assert kernel.MADV_HUGEPAGE == mmap.MADV_HUGEPAGE
    assert kernel.MADV_DONTNEED == mmap.MADV_DONTNEED


class TestFileStatus:
    def test_it_is_what_fstat_says(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"seventeen bytes.!")
        fd = os.open(path, os.O_RDONLY)
        try:
            before = os.fstat(fd)
            assert kernel.file_status(fd) == (before.st_dev, before.st_ino, 17, before.st_mtime_ns)
            os.utime(path, ns=(1, 1_234_567_890_123_456_789))
            assert kernel.file_status(fd).modified_ns == 1_234_567_890_123_456_789
        finally:
            os.close(fd)

    def test_without_statx_fstat_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"four")
        fd = os.open(path, os.O_RDONLY)
        try:
            known = kernel.file_status(fd)
            monkeypatch.setattr(kernel, "_libc", lambda **_: None)
            assert kernel.file_status(fd) == known
        finally:
            os.close(fd)


class TestOpening:
    def test_the_descriptor_reads_the_file_and_is_not_inherited(self, tmp_path: Path) -> None:
        path = tmp_path / "Gewichte ä"
        path.write_bytes(b"seven..")
        fd = kernel.open_quickly(path, os.O_RDONLY)
        try:
            assert os.read(fd, 100) == b"seven.."
            assert not os.get_inheritable(fd)
        finally:
            kernel.close_quickly(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    @pytest.mark.parametrize(
        ("name", "flags", "error"),
        [
            ("nothing", os.O_RDONLY, FileNotFoundError),
            ("file/below", os.O_RDONLY, NotADirectoryError),
            ("", os.O_WRONLY, IsADirectoryError),
        ],
    )
    def test_failures_are_those_of_os_open(self, tmp_path: Path, name: str, flags: int, error: type[OSError]) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(error) as usual:
            os.open(tmp_path / name, flags)
        with pytest.raises(error) as quick:
            kernel.open_quickly(tmp_path / name, flags)
        assert (quick.value.args, quick.value.filename) == (usual.value.args, str(tmp_path / name))

    def test_a_name_is_not_cut_at_a_null_character(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ValueError, match="null"):
            kernel.open_quickly(f"{tmp_path}/file\0.safetensors", os.O_RDONLY)

    def test_a_system_without_the_calls_opens_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"four")
        monkeypatch.setattr(kernel, "_libc", lambda **_: None)
        fd = kernel.open_quickly(path, os.O_RDONLY)
        assert os.read(fd, 4) == b"four"
        kernel.close_quickly(fd)


@pytest.mark.parametrize("size", [0, 1, 8 << 10, (8 << 10) + 1, 50_000])
def test_a_small_file_is_read_to_its_end(tmp_path: Path, size: int) -> None:
    contents = bytes(index % 251 for index in range(size))
    (tmp_path / "file").write_bytes(contents)
    assert kernel.read_small(tmp_path / "file") == contents


def test_a_small_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert kernel.read_small(tmp_path / "nothing") is None


class TestQuickCalls:
    def test_what_is_read_is_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(range(200)))
        fd = kernel.open_quickly(path, os.O_RDONLY)
        try:
            kernel.read_ahead_nothing(fd)
            assert kernel.read_cached(fd, 10, 20) in {bytes(range(10, 30)), None}
            assert kernel.read_cached(fd, 190, 20) in {bytes(range(190, 200)), None}
            assert kernel.read_cached(fd, 0, kernel.QUICK_READ_BYTES + 1) is None
            status, mode = kernel.file_status_and_mode(fd)
            assert (status, mode) == (kernel.file_status(fd), path.stat().st_mode)
        finally:
            kernel.close_quickly(fd)
        assert kernel.read_cached(fd, 0, 10) is None

    def test_unknown_flags_of_a_read_are_not_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"1234")
        unknown = 1 << 30
        with path.open("rb") as file:
            fd = file.fileno()
            assert not kernel.takes_read_flags(fd, 4, unknown)
            assert kernel.takes_read_flags(fd, 4, 0) == hasattr(os, "preadv")
            monkeypatch.setattr(kernel, "_libc", lambda **_: None)
            assert not kernel.takes_read_flags(fd, 4, unknown)
            assert kernel.takes_read_flags(fd, 4, 0) == hasattr(os, "preadv")
        assert not kernel.takes_read_flags(fd, 0, 0)


def test_advice_about_memory_that_is_not_there_is_refused() -> None:
    assert not kernel.advise_memory(0, kernel.PAGE_SIZE, kernel.MADV_DONTNEED)
