"""Facts about a file's storage: direct reads, uncached reads, what the page cache holds of it, dropping it again.

Owns the probes and the cache's bookkeeping for one file. Knows nothing of checkpoints, chunks or plans, and never
judges by a kernel's version: every answer comes from a call on the file itself.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import sys
from bisect import bisect_right
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.host import kernel
from weightlift.units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_UNKNOWN_ALIGNMENT: Final = 4096
_RWF_DONTCACHE: Final = 0x80
_BLOCK_GRANULES: Final = 64
_VECTOR_WINDOW_BYTES: Final = 1 << 30
_OCTAL_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


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
        os.close(fd)
    return access


def open_direct(path: str | os.PathLike[str]) -> tuple[DirectAccess, int]:
    """Open a file for direct reads, if a trial read works.

    Args:
        path: a regular file.

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
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as err:
        where = f"the file system {file_system(path)}"
        return _refused(f"{where} refuses to open the file for direct reads ({_named(err)})"), -1
    try:
        access = _try_direct(fd, path)
    except BaseException:
        os.close(fd)
        raise
    if not access.supported:
        os.close(fd)
        fd = -1
    return access, fd


def _try_direct(fd: int, path: str | os.PathLike[str]) -> DirectAccess:
    try:
        stated = kernel.statx_direct_alignment(fd)
    except OSError:
        stated = None
    if stated == (0, 0):
        return _refused(f"the file system {file_system(path)} states that this file cannot be read directly (statx)")
    if os.fstat(fd).st_size == 0:
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
    with mmap.mmap(-1, length + 3 * memory_alignment) as block:
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        start = align_up(address, 2 * memory_alignment) + memory_alignment - address
        with memoryview(block)[start : start + length] as buffer:
            return os.preadv(fd, [buffer], 0)


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
        os.preadv(fd, [bytearray(1)], os.fstat(fd).st_size, _RWF_DONTCACHE)
    except (OSError, NotImplementedError):
        return False
    return True


class Residency(IntEnum):
    """How much of a file range the page cache holds."""

    ABSENT = 0
    PARTIAL = 1
    RESIDENT = 2


class ResidencyRun(NamedTuple):
    """A range of a file whose granules are alike."""

    offset: int
    length: int
    state: Residency


@dataclass(frozen=True, slots=True)
class ResidencyMap:
    """What the page cache held of a file at one moment, granule by granule.

    Attributes:
        granule_bytes: the resolution.
        size_bytes: the file's size.
        cached_bytes: how much of the file was cached.
    """

    granule_bytes: int
    size_bytes: int
    cached_bytes: int
    _runs: tuple[ResidencyRun, ...]

    def runs(self) -> list[ResidencyRun]:
        """Maximal runs of granules in the same state, in file order, covering the file without gaps."""
        return list(self._runs)

    def state(self, offset: int, length: int) -> Residency:
        """The state of a range; ``PARTIAL`` also where it crosses runs of different states.

        Args:
            offset: start in bytes, inside the file.
            length: length in bytes, more than 0.
        """
        index = bisect_right(self._runs, offset, key=lambda run: run.offset) - 1
        run = self._runs[index]
        # Neighbouring runs always differ, so a range that leaves its run is a mixture.
        return run.state if offset + length <= run.offset + run.length else Residency.PARTIAL


def may_see_residency(fd: int) -> bool:
    """Whether ``mincore`` tells this user the truth about a file: it is theirs, or they may write it."""
    if sys.platform != "linux":
        return False
    if os.fstat(fd).st_uid == os.geteuid():
        return True
    return os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True)


def _cached_bytes(fd: int, offset: int, length: int) -> int | None:
    """Cached bytes of a range that starts at a page boundary; ``None`` if the system will not tell."""
    try:
        stat = kernel.cachestat(fd, offset, length)
        if stat is not None:
            return min(stat.cached * kernel.PAGE_SIZE, length)
        if not may_see_residency(fd):
            return None
        pages = 0
        for start in range(offset, offset + length, _VECTOR_WINDOW_BYTES):
            vector = kernel.resident_pages(fd, start, min(_VECTOR_WINDOW_BYTES, offset + length - start))
            if vector is None:
                return None
            pages += sum(vector)
        return min(pages * kernel.PAGE_SIZE, length)
    except OSError:
        # EPERM above all: the user may not know. Asking mincore instead would be told that everything is resident.
        return None


def residency(fd: int, size_bytes: int) -> int | None:
    """How much of a file the page cache holds, in bytes; ``None`` if the system will not tell.

    Args:
        fd: a file open for reading.
        size_bytes: its size.
    """
    return _cached_bytes(fd, 0, size_bytes) if size_bytes > 0 else 0


def _judge(cached_bytes: int, length: int) -> Residency:
    if cached_bytes == 0:
        return Residency.ABSENT
    return Residency.RESIDENT if cached_bytes >= length else Residency.PARTIAL


def residency_map(fd: int, size_bytes: int, granule_bytes: int) -> ResidencyMap | None:
    """Record what the page cache holds of a file.

    The file is looked at in blocks of 64 granules, and only mixed blocks granule by granule: a call takes some 2 µs where
    nothing is cached and time in proportion to the pages found elsewhere, so that a cold or a warm file is walked once,
    where halving would walk the cached pages of a mixed file once per level.

    Args:
        fd: a file open for reading.
        size_bytes: its size.
        granule_bytes: resolution, a multiple of the page size.

    Returns:
        The map, or ``None`` if the system will not tell.
    """
    assert granule_bytes > 0, granule_bytes
    assert granule_bytes % kernel.PAGE_SIZE == 0, granule_bytes
    runs: list[ResidencyRun] = []
    total = 0
    for block, cached in _looked_at(fd, 0, size_bytes, granule_bytes * _BLOCK_GRANULES):
        if cached is None:
            return None
        if block.state is not Residency.PARTIAL:
            runs.append(block)
            total += cached
            continue
        for granule, part in _looked_at(fd, block.offset, block.length, granule_bytes):
            runs.append(granule)
            total += part or 0
    return ResidencyMap(granule_bytes, size_bytes, total, tuple(_merged(runs)))


def _looked_at(fd: int, offset: int, length: int, step: int) -> Iterator[tuple[ResidencyRun, int | None]]:
    """The state and cached bytes of a range in steps; ``None`` bytes where the system will not tell."""
    end = offset + length
    for start in range(offset, end, step):
        size = min(step, end - start)
        cached = _cached_bytes(fd, start, size)
        yield ResidencyRun(start, size, _judge(cached or 0, size)), cached


def _merged(pieces: Iterable[ResidencyRun]) -> Iterator[ResidencyRun]:
    """Join neighbouring runs of the same state."""
    current: ResidencyRun | None = None
    for piece in pieces:
        if current is not None and current.state is piece.state:
            current = current._replace(length=current.length + piece.length)
            continue
        if current is not None:
            yield current
        current = piece
    if current is not None:
        yield current


def absent_ranges(fd: int, cached: ResidencyMap) -> list[tuple[int, int]]:
    """The exact ranges of a file that are not cached, to be swept after a load that shall leave no trace.

    Granules found absent are taken as they were recorded; those found partial are looked at page by page now, so call
    this right after recording and before the first read. Pages whose state cannot be found out count as cached.

    Returns:
        Offset and length in bytes of each maximal range, in file order.
    """
    exact: list[ResidencyRun] = []
    for run in cached.runs():
        if run.state is not Residency.PARTIAL:
            exact.append(run)
            continue
        exact.extend(_page_runs(fd, run.offset, run.length))
    return [(run.offset, run.length) for run in _merged(exact) if run.state is Residency.ABSENT]


def _page_runs(fd: int, offset: int, length: int) -> Iterator[ResidencyRun]:
    """Runs of absent and resident pages in a range that starts at a page boundary."""
    end = offset + length
    trusted = may_see_residency(fd)
    for start in range(offset, end, _VECTOR_WINDOW_BYTES):
        window = min(_VECTOR_WINDOW_BYTES, end - start)
        try:
            vector = kernel.resident_pages(fd, start, window) if trusted else None
        except OSError:
            vector = None
        if vector is None:
            yield ResidencyRun(start, window, Residency.RESIDENT)
            continue
        first = 0
        while first < len(vector):
            after = vector.find(1 - vector[first], first)
            after = len(vector) if after < 0 else after
            begin = start + first * kernel.PAGE_SIZE
            stop = min(start + after * kernel.PAGE_SIZE, end)
            yield ResidencyRun(begin, stop - begin, Residency.RESIDENT if vector[first] else Residency.ABSENT)
            first = after


def sweep(fd: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Drop ranges of a file from the page cache; pages in use elsewhere stay, so check residency afterwards.

    Pages that a range covers only in part are left alone, except the last page of the file.

    Args:
        fd: an open file.
        ranges: offset and length in bytes of each range, in file order.
    """
    size = os.fstat(fd).st_size
    # The kernel passes over a large folio that does not lie wholly inside one call's range: neighbours go as one.
    for offset, end in _joined(ranges):
        start = align_up(offset, kernel.PAGE_SIZE)
        stop = align_up(size, kernel.PAGE_SIZE) if end >= size else align_down(end, kernel.PAGE_SIZE)
        if stop > start:
            kernel.advise_dont_need(fd, start, stop - start)


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Start and end of the ranges, those that touch joined into one."""
    first = last = 0
    for offset, length in ranges:
        if offset != last:
            yield first, last
            first = offset
        last = offset + length
    yield first, last


def file_system(path: str | os.PathLike[str], mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """Name of the type of file system that a path is on, as ``ext4`` or ``fuse.sshfs``; ``unknown`` if nobody tells.

    Args:
        path: an existing file or folder.
        mountinfo: the table of mounts to look into.
    """
    try:
        device = os.stat(path).st_dev
        lines = mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "unknown"
    if sys.platform == "win32":
        return "unknown"
    number = f"{os.major(device)}:{os.minor(device)}"
    real = os.path.realpath(path)
    best, kind = -1, "unknown"
    for line in lines:
        mount, _, source = line.partition(" - ")
        fields = mount.split()
        if fields[2] == number:
            return source.split(" ", 1)[0]
        # btrfs gives its subvolumes device numbers that the table does not know: there the place decides.
        point = _OCTAL_ESCAPE.sub(lambda found: chr(int(found[1], 8)), fields[4])
        if len(point) > best and (real + "/").startswith(point.rstrip("/") + "/"):
            best, kind = len(point), source.split(" ", 1)[0]
    return kind
