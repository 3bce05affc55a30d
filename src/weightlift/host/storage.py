"""Facts about a file's storage: direct reads, uncached reads, what the page cache holds of it, dropping it again.

Owns the probes and the cache's bookkeeping for one file. Knows nothing of checkpoints, chunks or plans, and never
judges by a kernel's version: every answer comes from a call on the file itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from weightlift.host import kernel
from weightlift.host.mounts import MOUNTINFO, find_mount
from weightlift.host.probes import Probe, run_probes
from weightlift.units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_UNKNOWN_ALIGNMENT: Final = 4096
_RWF_DONTCACHE: Final = 0x80


class DirectAccess(Struct, frozen=True):
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


def _named(number: int) -> str:
    return f"{errno.errorcode.get(number, 'errno')} {number}: {os.strerror(number)}"


def probe_direct(path: str | os.PathLike[str]) -> DirectAccess:
    """Find out by a trial read whether a file takes direct reads; see :class:`DirectTrial`."""
    trial = DirectTrial(path)
    access = trial.judge(run_probes([trial.probe])[0] if trial.probe else None)
    trial.close()
    return access


class DirectTrial:
    """A file opened for direct reads, and the trial read that says whether it takes them.

    The read is described and not done here, so that it can be asked for together with others.

    Args:
        path: a regular file, which is best open already (see :func:`~weightlift.host.kernel.open_quickly`).
        known: what an earlier trial of this very file has shown, which is then not asked for once more.

    Attributes:
        fd: the descriptor; -1 once it is known that direct reads are out.
        probe: the trial read, or ``None`` where none is needed to know that.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: the user may not read it.
    """

    def __init__(self, path: str | os.PathLike[str], known: DirectAccess | None = None) -> None:
        self._path = path
        self._known = known
        self.fd = -1
        self.probe: Probe | None = None
        self._refusal = ""
        self._alignments: list[tuple[int, int]] = []
        flag = getattr(os, "O_DIRECT", None)
        if flag is None:
            self._refusal = f"{sys.platform} has no direct reads (O_DIRECT)"
            return
        try:
            self.fd = kernel.open_quickly(path, os.O_RDONLY | flag)
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as err:
            where = f"the file system {file_system(path)}"
            self._refusal = f"{where} refuses to open the file for direct reads ({_named(err.errno or 0)})"
            return
        try:
            if known is None:
                self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        try:
            stated = kernel.statx_direct_alignment(self.fd)
        except OSError:
            stated = None
        if stated == (0, 0):
            self._refusal = (
                f"the file system {file_system(self._path)} states that this file cannot be read directly (statx)"
            )
        elif kernel.file_status(self.fd).size_bytes == 0:
            self._refusal = "the file is empty, so a direct read of it cannot be tried"
        else:
            # What statx states is tried as it is; a file system that states less than it takes gets a second, coarser
            # trial.
            coarse = (_UNKNOWN_ALIGNMENT, _UNKNOWN_ALIGNMENT)
            trials = [coarse] if stated is None else [stated, (max(stated[0], coarse[0]), max(stated[1], coarse[1]))]
            self._alignments = list(dict.fromkeys(trials))
            self.probe = self._read_of_one_block(*self._alignments[0])

    def _read_of_one_block(self, memory_alignment: int, offset_alignment: int) -> Probe:
        """A read of the first block into a buffer that is aligned to ``memory_alignment`` and no better."""
        length = align_up(max(offset_alignment, 1), memory_alignment)
        # Ordinary memory, since making and closing a mapping would release the interpreter lock once more each.
        self._block = bytearray(length + 3 * memory_alignment)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._block))
        return Probe(self.fd, 0, length, align_up(address, 2 * memory_alignment) + memory_alignment)

    def judge(self, answer: int | None) -> DirectAccess:
        """The rules for direct reads of the file, or why there are none; the descriptor is closed then.

        Args:
            answer: what came of ``probe``, as from :func:`~weightlift.host.probes.run_probes`.
        """
        if self._known is not None and not self._refusal:
            return self._known
        access = _refused(self._refusal) if answer is None else self._judge_reads(answer)
        if not access.supported:
            self.close()
        return access

    def _judge_reads(self, answer: int) -> DirectAccess:
        outcome = ""
        for (memory, offset), count in zip(self._alignments, self._answers(answer), strict=True):
            if count > 0:
                reason = f"a direct trial read worked (alignment: buffer {memory}, offset {offset})"
                return DirectAccess(supported=True, memory_alignment=memory, offset_alignment=offset, reason=reason)
            outcome = f"failed ({_named(-count)})" if count else "returned nothing"
        where = f"the file system {file_system(self._path)}"
        return _refused(f"{where} accepts direct reads at open but a trial read {outcome}")

    def _answers(self, first: int) -> Iterator[int]:
        yield first
        for alignments in self._alignments[1:]:
            yield run_probes([self._read_of_one_block(*alignments)])[0]

    def close(self) -> None:
        """Close the descriptor, if it is open."""
        if self.fd >= 0:
            kernel.close_quickly(self.fd)
            self.fd = -1


def probe_dontcache(fd: int) -> bool:
    """Find out whether reads of a file may carry ``RWF_DONTCACHE``, without changing what is cached.

    Args:
        fd: a file open for reading.
    """
    if sys.platform != "linux":
        return False
    # A read of one byte at the end of the file is judged by the kernel (0 on ext4, EOPNOTSUPP on tmpfs) and touches no
    # page. A read into an empty buffer returns 0 even on tmpfs, and one byte inside the file starts read-ahead.
    return kernel.takes_read_flags(fd, kernel.file_status(fd).size_bytes, _RWF_DONTCACHE)


def file_system(path: str | os.PathLike[str], mountinfo: Path = MOUNTINFO) -> str:
    """Name of the type of file system that a path is on, as ``ext4`` or ``fuse.sshfs``; ``unknown`` if nobody tells.

    Args:
        path: an existing file or folder.
        mountinfo: the table of mounts to look into.
    """
    mount = find_mount(path, mountinfo)
    return mount.kind if mount else "unknown"
