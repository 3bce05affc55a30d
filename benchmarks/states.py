"""Putting files into a known page-cache state, and looking at which pages are resident.

Owns what "cold", "warm" and "half-warm" mean; a state that was not reached raises. It asks the kernel itself
(``mincore``) and not weightlift, so that the library is not its own witness.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1 << 20
STRIPE_BYTES = 16 * MIB
READERS = 4
COLD_RESIDENT_MAX = 0.005
WARM_RESIDENT_MIN = 0.995
HALF_TOLERANCE = 0.03


class CacheState(enum.StrEnum):
    """Which part of the files is in the page cache before a load."""

    COLD = "cold"
    WARM = "warm"
    HALF = "half-warm"
    AS_LEFT = "as left by the previous load"


class CacheStateError(RuntimeError):
    """The page cache could not be brought into the state that a measurement claims."""


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def residency(files: Sequence[str]) -> numpy.ndarray:
    """One boolean per page of all files in turn: is it in the page cache?

    Raises:
        CacheStateError: the caller may not write the files, and ``mincore`` would call every page resident.
    """
    return numpy.concatenate([_file_residency(file) for file in files])


def _file_residency(file: str) -> numpy.ndarray:
    if not os.access(file, os.W_OK):
        raise CacheStateError(f"{file}: residency of files that this user may not write is not to be had")
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        pages = numpy.zeros(-(-size // mmap.PAGESIZE), dtype=numpy.uint8)
        with mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ) as mapping:
            view = numpy.frombuffer(mapping, dtype=numpy.uint8)
            failed = _libc.mincore(view.ctypes.data, size, pages.ctypes.data)
            del view
        if failed:
            raise CacheStateError(f"{file}: mincore: {os.strerror(ctypes.get_errno())}")
    return (pages & 1).astype(bool)


def evict(files: Sequence[str]) -> None:
    """Write dirty pages back and drop every page of the files that can be dropped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def prepare(files: Sequence[str], state: CacheState) -> numpy.ndarray:
    """Bring the files into ``state`` and return the residency that was verified.

    Raises:
        CacheStateError: the state was not reached, with the fraction that was.
    """
    if state is CacheState.AS_LEFT:
        return residency(files)
    if state is not CacheState.WARM:
        _evict_until_cold(files)
    if state is CacheState.HALF:
        for file in files:
            _read_in(file, every_second=True)
    if state is CacheState.WARM:
        _read_until_warm(files)
    pages = residency(files)
    fraction = float(pages.mean())
    wanted, reached = {
        CacheState.COLD: (f"at most {COLD_RESIDENT_MAX:.1%}", fraction <= COLD_RESIDENT_MAX),
        CacheState.WARM: (f"at least {WARM_RESIDENT_MIN:.1%}", fraction >= WARM_RESIDENT_MIN),
        CacheState.HALF: ("half", abs(fraction - 0.5) <= HALF_TOLERANCE),
    }[state]
    if not reached:
        raise CacheStateError(f"{state}: {fraction:.2%} of {len(files)} file(s) is resident, wanted {wanted}")
    return pages


def _evict_until_cold(files: Sequence[str]) -> None:
    # Pages that are still on their way through per-processor lists escape the first call.
    for _ in range(20):
        evict(files)
        if residency(files).mean() <= COLD_RESIDENT_MAX / 10:
            return
        time.sleep(0.05)


def _read_until_warm(files: Sequence[str]) -> None:
    # Pages that an earlier load marked to be dropped behind it may still go after they were read once more.
    for _ in range(5):
        if residency(files).mean() >= WARM_RESIDENT_MIN:
            return
        for file in files:
            _read_in(file, every_second=False)


def _read_in(file: str, *, every_second: bool) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    own = threading.local()
    size = os.fstat(descriptor).st_size

    def read(offset: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(STRIPE_BYTES)
        done, length = 0, min(STRIPE_BYTES, size - offset)
        while done < length:
            done += os.preadv(descriptor, [memoryview(own.buffer)[done:length]], offset + done) or _truncated(file)

    try:
        # Read-ahead would bring in what is to stay absent.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        offsets = range(0, size, STRIPE_BYTES * (2 if every_second else 1))
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, offsets))
    finally:
        os.close(descriptor)


def _truncated(file: str) -> int:
    raise CacheStateError(f"{file} became shorter while it was read")
