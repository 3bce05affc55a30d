"""Facts about a file's storage: direct reads, uncached reads, what the page cache holds of it, dropping it again.

Owns the probes and the cache's bookkeeping for one file. Knows nothing of checkpoints, chunks or plans, and never
judges by a kernel's version: every answer comes from a call on the file itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weightlift.host import kernel
from weightlift.host.mounts import MOUNTINFO, find_mount
from weightlift.units import align_up

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    CountCached = Callable[[int, int, int, int], list[int | None]]

_UNKNOWN_ALIGNMENT: Final = 4096
_RWF_DONTCACHE: Final = 0x80


@dataclass(frozen=True, slots=True)
class DirectAccess:
    """Whether a file can be read past the page cache, and under which rules.

    Attributes:
        supported: a trial read worked.
        memory_alignment: what a buffer's address must be a multiple of, in bytes; 0 if not supported.
        offset_alignment: the same for the file offset and the length of a read.
        reason: why, in one sentence.
    """

    supported: bool
    memory_alignment: int
    offset_alignment: int
    reason: str


def _refused(reason: str) -> DirectAccess:
    return DirectAccess(supported=False, memory_alignment=0, offset_alignment=0, reason=reason)


def _named(err: OSError) -> str:
    return f"{errno.errorcode.get(err.errno or 0, 'errno')} {err.errno}: {os.strerror(err.errno or 0)}"


def probe_direct(path: str | os.PathLike[str]) -> DirectAccess:
    """Find out by a trial read whether a file takes direct reads; see :func:`open_direct`."""
    access, fd = open_direct(path)
    if fd >= 0:
        kernel.close_quickly(fd)
    return access


def open_direct(path: str | os.PathLike[str]) -> tuple[DirectAccess, int]:
    """Open a file for direct reads, if a trial read works.

    Args:
        path: a regular file, which is best open already (see :func:`~weightlift.host.kernel.open_quickly`).

    Returns:
        The rules to follow and the descriptor; or the reason why direct reads are out, and -1.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: the user may not read it.
    """
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return _refused(f"{sys.platform} has no direct reads (O_DIRECT)"), -1
    try:
        fd = kernel.open_quickly(path, os.O_RDONLY | flag)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as err:
        where = f"the file system {file_system(path)}"
        return _refused(f"{where} refuses to open the file for direct reads ({_named(err)})"), -1
    try:
        access = _try_direct(fd, path)
    except BaseException:
        kernel.close_quickly(fd)
        raise
    if not access.supported:
        kernel.close_quickly(fd)
        fd = -1
    return access, fd


def _try_direct(fd: int, path: str | os.PathLike[str]) -> DirectAccess:
    try:
        stated = kernel.statx_direct_alignment(fd)
    except OSError:
        stated = None
    if stated == (0, 0):
        return _refused(f"the file system {file_system(path)} states that this file cannot be read directly (statx)")
    if kernel.file_status(fd).size_bytes == 0:
        return _refused("the file is empty, so a direct read of it cannot be tried")
    # What statx states is tried as it is; a file system that states less than it takes gets a second, coarser trial.
    coarse = (_UNKNOWN_ALIGNMENT, _UNKNOWN_ALIGNMENT)
    trials = [coarse] if stated is None else [stated, (max(stated[0], coarse[0]), max(stated[1], coarse[1]))]
    outcome = ""
    for memory, offset in dict.fromkeys(trials):
        try:
            count = _read_one_block(fd, memory, offset)
        except OSError as err:
            outcome = f"failed ({_named(err)})"
            continue
        if count == 0:
            outcome = "returned nothing"
            continue
        reason = f"a direct trial read worked (alignment: buffer {memory}, offset {offset})"
        return DirectAccess(supported=True, memory_alignment=memory, offset_alignment=offset, reason=reason)
    where = f"the file system {file_system(path)}"
    return _refused(f"{where} accepts direct reads at open but a trial read {outcome}")


def _read_one_block(fd: int, memory_alignment: int, offset_alignment: int) -> int:
    """Read the first block into a buffer that is aligned to ``memory_alignment`` and no better."""
    if sys.platform != "linux":
        return 0
    length = align_up(max(offset_alignment, 1), memory_alignment)
    # Ordinary memory, since making and closing a mapping would release the interpreter lock once more each.
    block = bytearray(length + 3 * memory_alignment)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    start = align_up(address, 2 * memory_alignment) + memory_alignment - address
    return os.preadv(fd, [memoryview(block)[start : start + length]], 0)


def probe_dontcache(fd: int) -> bool:
    """Find out whether reads of a file may carry ``RWF_DONTCACHE``, without changing what is cached.

    Args:
        fd: a file open for reading.
    """
    if sys.platform != "linux":
        return False
    # A read of one byte at the end of the file is judged by the kernel (0 on ext4, EOPNOTSUPP on tmpfs) and touches no
    # page. A read into an empty buffer returns 0 even on tmpfs, and one byte inside the file starts read-ahead.
    try:
        os.preadv(fd, [bytearray(1)], kernel.file_status(fd).size_bytes, _RWF_DONTCACHE)
    except (OSError, NotImplementedError):
        return False
    return True


def file_system(path: str | os.PathLike[str], mountinfo: Path = MOUNTINFO) -> str:
    """Name of the type of file system that a path is on, as ``ext4`` or ``fuse.sshfs``; ``unknown`` if nobody tells.

    Args:
        path: an existing file or folder.
        mountinfo: the table of mounts to look into.
    """
    mount = find_mount(path, mountinfo)
    return mount.kind if mount else "unknown"
