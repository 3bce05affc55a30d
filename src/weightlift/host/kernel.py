"""System calls that Python does not wrap: cachestat, statx's direct-I/O fields, mincore, io_uring's set-up.

Owns the numbers and layouts of the kernel's interface and nothing else: no policy, no fallbacks from one call to
another. Each function answers ``None`` where the system lacks the call and raises ``OSError`` where it failed.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import struct
import sys
from typing import Final, NamedTuple

PAGE_SIZE: Final = mmap.PAGESIZE
"""Size of a page of this machine in bytes; the unit of the page cache."""

MADV_RANDOM: Final = 1
MADV_SEQUENTIAL: Final = 2
MADV_WILLNEED: Final = 3
MADV_DONTNEED: Final = 4
MADV_HUGEPAGE: Final = 14
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
"""Advice numbers of ``madvise``, the same on every Linux architecture but alpha and parisc."""

# Since Linux 5.1 new calls get one number for all architectures; only these families add an offset of their own.
_CACHESTAT: Final = 451
_IO_URING_SETUP: Final = 425
_IO_URING_PARAMETERS_BYTES: Final = 120
_OWN_NUMBERING: Final = ("alpha", "mips")

_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000
_STATX_BYTES: Final = 256
_STATX_BASIC_STATS: Final = 0x7FF
_STATX_MODE_AT: Final = 28
_STATX_MODE: Final = struct.Struct("=H")
_STATX_INODE_AT: Final = 32
_STATX_INODE_SIZE_MODIFIED: Final = struct.Struct("=QQ64xqI")
"""Inode and size; past blocks, attributes and the times of access, birth and change, the time of modification."""
_STATX_DEVICE_AT: Final = 136
_STATX_DEVICE: Final = struct.Struct("=II")
_STATX_MEMORY_ALIGNMENT_AT: Final = 152
_STATX_OFFSET_ALIGNMENT_AT: Final = 156

QUICK_RANGE_BYTES: Final = 64 << 20
"""File ranges up to this length are looked at with the interpreter lock held: it takes about a millisecond at most."""
QUICK_READ_BYTES: Final = 4 << 20
"""Cached parts of files up to this length are read with the interpreter lock held."""
_SMALL_READ_BYTES: Final = 8 << 10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class CacheStat(NamedTuple):
    """What the page cache holds of a range of a file, in pages."""

    cached: int
    dirty: int
    writeback: int
    evicted: int
    recently_evicted: int


@functools.cache
def _libc(*, held: bool = False) -> ctypes.CDLL | None:
    """The C library of this process with the signatures used here, or ``None`` where it is not Linux's.

    Args:
        held: keep the interpreter lock during calls. For calls that return at once: releasing the lock costs a whole
            switch interval (5 ms) to get it back from a busy thread, which is far more than such a call takes.
    """
    if sys.platform != "linux" or os.uname().machine.startswith(_OWN_NUMBERING):
        return None
    libc = ctypes.PyDLL(None, use_errno=True) if held else ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
    # The 64-bit variants exist in glibc under their own names; elsewhere off_t is 64 bits wide anyway.
    map_file = getattr(libc, "mmap64", libc.mmap)
    map_file.restype = ctypes.c_void_p
    map_file.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    for opening in (libc.open, getattr(libc, "open64", libc.open)):
        opening.argtypes = [ctypes.c_char_p, ctypes.c_int]
    libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    libc.read.restype = ctypes.c_ssize_t
    libc.close.argtypes = [ctypes.c_int]
    if hasattr(libc, "pread64"):
        libc.pread64.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
        libc.pread64.restype = ctypes.c_ssize_t
    if hasattr(libc, "posix_fadvise64"):
        libc.posix_fadvise64.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    if hasattr(libc, "preadv64v2"):
        libc.preadv64v2.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
        libc.preadv64v2.restype = ctypes.c_ssize_t
    return libc


def _failure(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def cachestat(fd: int, offset: int, length: int) -> CacheStat | None:
    """Count the pages of a file range that the page cache holds.

    Args:
        fd: an open regular file.
        offset: start of the range in bytes.
        length: length in bytes; 0 means up to the end of the file.

    Returns:
        The counts, or ``None`` where the kernel has no such call.

    Raises:
        OSError: ``EPERM`` for a file that the user neither owns nor may write, ``EOPNOTSUPP`` on hugetlbfs.
    """
    libc = _libc(held=0 < length <= QUICK_RANGE_BYTES)
    if libc is None:
        return None
    file_range = (ctypes.c_uint64 * 2)(offset, length)
    counts = (ctypes.c_uint64 * 5)()
    if libc.syscall(_CACHESTAT, fd, file_range, counts, 0) != 0:
        if ctypes.get_errno() == errno.ENOSYS:
            return None
        raise _failure("cachestat")
    return CacheStat(*counts)


def io_uring_setup() -> int | None:
    """Make the smallest ring that io_uring knows, to find out whether this process may.

    Returns:
        Its descriptor, to be closed; ``None`` where the kernel has no such call.

    Raises:
        OSError: ``EPERM`` where it is switched off (``kernel.io_uring_disabled``) or forbidden by a sandbox.
    """
    libc = _libc(held=True)
    if libc is None:
        return None
    fd = int(libc.syscall(_IO_URING_SETUP, 1, ctypes.create_string_buffer(_IO_URING_PARAMETERS_BYTES), None, 0))
    if fd < 0:
        if ctypes.get_errno() == errno.ENOSYS:
            return None
        raise _failure("io_uring_setup")
    return fd


class FileStatus(NamedTuple):
    """What tells one state of one file from another."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int


def file_status(fd: int) -> FileStatus:
    """The status of an open file, as ``os.fstat`` gives it; the interpreter lock is held, see :func:`_libc`.

    Raises:
        OSError: the file cannot be asked.
    """
    return file_status_and_mode(fd)[0]


def file_status_and_mode(fd: int) -> tuple[FileStatus, int]:
    """The same with the file's mode, as ``stat.S_ISREG`` takes it.

    Raises:
        OSError: the file cannot be asked.
    """
    statx = getattr(_libc(held=True), "statx", None)
    if statx is not None:
        buffer = ctypes.create_string_buffer(_STATX_BYTES)
        if statx(fd, b"", _AT_EMPTY_PATH, _STATX_BASIC_STATS, buffer) == 0:
            inode, size, *_, seconds, nanoseconds = _STATX_INODE_SIZE_MODIFIED.unpack_from(buffer, _STATX_INODE_AT)
            major, minor = _STATX_DEVICE.unpack_from(buffer, _STATX_DEVICE_AT)
            (mode,) = _STATX_MODE.unpack_from(buffer, _STATX_MODE_AT)
            return FileStatus(os.makedev(major, minor), inode, size, seconds * 10**9 + nanoseconds), mode
    status = os.fstat(fd)
    return FileStatus(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns), status.st_mode


def statx_direct_alignment(fd: int) -> tuple[int, int] | None:
    """Ask the file system how direct reads of a file must be aligned.

    Returns:
        Alignment of the buffer and of the file offset, in bytes; ``(0, 0)`` if the kernel says that the file cannot be
        read directly; ``None`` if it does not say.

    Raises:
        OSError: the file cannot be asked.
    """
    libc = _libc(held=True)
    statx = getattr(libc, "statx", None)
    if statx is None:
        return None
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        if ctypes.get_errno() == errno.ENOSYS:
            return None
        raise _failure("statx")
    known = int.from_bytes(buffer.raw[:4], sys.byteorder)
    if not known & _STATX_DIOALIGN:
        return None
    memory, offset = (
        int.from_bytes(buffer.raw[at : at + 4], sys.byteorder)
        for at in (_STATX_MEMORY_ALIGNMENT_AT, _STATX_OFFSET_ALIGNMENT_AT)
    )
    return memory, offset


def resident_pages(fd: int, offset: int, length: int) -> bytes | None:
    """Tell page by page whether the page cache holds a file range.

    The kernel reports every page as resident for a file that the user neither owns nor may write, without an error.
    The caller must rule that out before.

    Args:
        fd: a file open for reading.
        offset: start of the range in bytes, a multiple of the page size.
        length: length of the range in bytes, more than 0.

    Returns:
        One byte per page, 1 for resident and 0 for absent; ``None`` where the system has no such call.

    Raises:
        OSError: the file cannot be mapped.
    """
    quick, libc = _libc(held=True), _libc(held=length <= QUICK_RANGE_BYTES)
    if quick is None or libc is None:
        return None
    map_file = getattr(quick, "mmap64", quick.mmap)
    address = map_file(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address is None or address == _MAP_FAILED:
        raise _failure("mmap")
    try:
        vector = ctypes.create_string_buffer(-(-length // PAGE_SIZE))
        if libc.mincore(address, length, vector) != 0:
            raise _failure("mincore")
    finally:
        quick.munmap(address, length)
    # Only the lowest bit of an entry is defined.
    return bytes(entry & 1 for entry in vector.raw)


def takes_read_flags(fd: int, offset: int, flags: int) -> bool:
    """Whether a read of one byte may carry some of the flags of ``preadv2``.

    Args:
        fd: an open file.
        offset: where; at or beyond the end of the file, the read returns at once and the interpreter lock is held.
        flags: the flags.
    """
    preadv = getattr(_libc(held=True), "preadv64v2", None)
    if preadv is None:
        try:
            os.preadv(fd, [bytearray(1)], offset, flags)
        except (OSError, NotImplementedError):
            return False
        return True
    byte = ctypes.create_string_buffer(1)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(byte), 1)
    return int(preadv(fd, vector, 1, offset, flags)) >= 0


def advise_dont_need(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to forget a file range; clean pages that no live mapping holds leave the page cache.

    Does nothing where the system has no such call.

    Args:
        fd: an open file.
        offset: start of the range in bytes.
        length: length of the range in bytes; 0 means up to the end of the file.

    Raises:
        OSError: the descriptor is not a file's.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def forget_memory(address: int, length: int) -> None:
    """Give private memory of this process back to the system, where it can; it holds zeros when it is next touched."""
    advise_memory(address, length, MADV_DONTNEED)


def advise_memory(address: int, length: int, advice: int) -> bool:
    """``madvise`` without holding the interpreter lock; false where it was refused or the system has no such call.

    Args:
        address: first byte, at a page boundary.
        length: bytes, whole pages.
        advice: what to do with them, such as :data:`MADV_POPULATE_WRITE`.
    """
    libc = _libc()
    return libc is not None and libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice) == 0


def holds_no_page(address: int) -> bool:
    """Whether there is no memory yet behind an address of this process; false where that cannot be known.

    A page that was swapped out counts as none.
    """
    libc, found = _libc(held=True), ctypes.c_ubyte(1)
    first = address // PAGE_SIZE * PAGE_SIZE
    return (
        libc is not None
        and libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(1), ctypes.byref(found)) == 0
        and not found.value & 1
    )


def read_small(path: str | os.PathLike[str]) -> bytes | None:
    """A small file of ``/proc`` or ``/sys``, whose reads never wait; ``None`` if it cannot be read.

    The interpreter lock is held, see :func:`_libc`.
    """
    libc = _libc(held=True)
    if libc is None:
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError:
            return None
    fd = libc.open(os.fsencode(path), os.O_RDONLY | os.O_CLOEXEC)
    if fd < 0:
        return None
    try:
        parts: list[bytes] = []
        buffer = ctypes.create_string_buffer(_SMALL_READ_BYTES)
        while (count := libc.read(fd, buffer, _SMALL_READ_BYTES)) > 0:
            parts.append(ctypes.string_at(buffer, count))
        return None if count < 0 else b"".join(parts)
    finally:
        libc.close(fd)


def read_cached(fd: int, offset: int, length: int) -> bytes | None:
    """Read a range that the page cache is known to hold, holding the interpreter lock, see :func:`_libc`.

    Returns:
        At most ``length`` bytes; ``None`` where they have to be read in another way.
    """
    pread = getattr(_libc(held=True), "pread64", None)
    if pread is None or length > QUICK_READ_BYTES:
        return None
    buffer = ctypes.create_string_buffer(length)
    count = pread(fd, buffer, length, offset)
    return None if count < 0 else ctypes.string_at(buffer, count)


def read_ahead_nothing(fd: int) -> None:
    """Have reads of this descriptor bring into the page cache what they read and no more; where known, else nothing."""
    advise = getattr(_libc(held=True), "posix_fadvise64", None)
    if advise is not None:
        advise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def open_quickly(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file that this process has open already, holding the interpreter lock, see :func:`_libc`.

    Its name and status are at hand then, so that only a network file system takes a moment.

    Args:
        path: the file.
        flags: as for ``os.open``; the descriptor is not inherited.

    Raises:
        OSError: the file cannot be opened so, as from ``os.open``.
    """
    libc = _libc(held=True)
    if libc is None:
        return os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    open_file = getattr(libc, "open64", libc.open)
    while (fd := open_file(name, flags | os.O_CLOEXEC)) < 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), os.fspath(path))
    return int(fd)


def close_quickly(fd: int) -> None:
    """Close a descriptor that was only read from, holding the interpreter lock, see :func:`_libc`."""
    libc = _libc(held=True)
    if libc is None:
        os.close(fd)
    else:
        libc.close(fd)
