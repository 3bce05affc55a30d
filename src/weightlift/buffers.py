"""Host memory that a load uses: the region destination tensors lie in, and the fixed pool of staging slots.

A region is one anonymous mapping, advised to use huge pages, in which every tensor (or run of small tensors) has a
lease. What the caller holds keeps its lease alive; when a lease dies its whole pages go back to the system at once,
though the rest of the region lives on. Nothing in a region is ever used twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from weightlift.device_operations import SlotMemory
from weightlift.errors import InsufficientMemoryError
from weightlift.host import kernel
from weightlift.host.memory import available_processors
from weightlift.units import PAGE_BYTES, align_down, align_up, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

LeaseBuffer = ctypes.Array[ctypes.c_ubyte]
"""A writable buffer over one lease; whoever holds it (or a view of it) keeps the memory alive."""

_HUGE_PAGE_BYTES: Final = 2 << 20

_ARENA_REGION_BYTES: Final = 32 << 20
_ARENA_TENSOR_BYTES: Final = 64 << 10
"""Tensors below this size are not worth a lease."""

_KEPT_TENSORS: Final = 4

_AHEAD_OF_READER_BYTES: Final = _HUGE_PAGE_BYTES
"""Two threads that clear the same huge page at the same time do it twice."""


def _map_anonymous(nbytes: int, purpose: str) -> mmap.mmap:
    try:
        if sys.platform == "win32":
            return mmap.mmap(-1, nbytes)
        # Python's own default is a shared mapping, which takes no huge pages and counts as shared memory.
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as err:
        raise InsufficientMemoryError(
            f"the system would not reserve {format_bytes(nbytes)} for {purpose} ({err})",
            hint='load fewer tensors (names=…), use method="mmap", or add swap',
        ) from err
    if sys.platform == "linux" and nbytes >= _HUGE_PAGE_BYTES:
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            # A kernel without transparent huge pages: slower to touch, otherwise the same.
            return mapping
    return mapping


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(mapping))


def _give_back(weak_mapping: Callable[[], mmap.mmap | None], first: int, end: int) -> None:
    mapping = weak_mapping()
    if mapping is not None and end > first and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, first, end - first)


def prepare_untouched(address: int, nbytes: int) -> bool:
    """Have a caller's memory take huge pages if it was never touched, as a new tensor's may be; whether that is so.

    Args:
        address: first byte.
        nbytes: how many; where no huge page fits in, nothing is done.
    """
    first, end = align_up(address, _HUGE_PAGE_BYTES), align_down(address + nbytes, _HUGE_PAGE_BYTES)
    if first >= end or not (kernel.holds_no_page(first) and kernel.holds_no_page(end - 1)):
        return False
    kernel.advise_memory(first, end - first, kernel.MADV_HUGEPAGE)
    return True


class HostRegion:
    """Fresh, private, writable memory for destination tensors.

    Args:
        nbytes: size; rounded up to whole pages.

    Raises:
        InsufficientMemoryError: the system refuses to reserve that much.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = align_up(max(nbytes, 1), mmap.PAGESIZE)
        self._mapping = _map_anonymous(self.nbytes, "tensors")
        self.address = _address(self._mapping)

    def lease(self, start: int, length: int) -> LeaseBuffer:
        """A buffer over ``length`` bytes from ``start``, whose whole pages are freed as soon as nobody holds it."""
        buffer = (ctypes.c_ubyte * length).from_buffer(self._mapping, start)
        if sys.platform == "linux":
            first, end = align_up(start, mmap.PAGESIZE), align_down(start + length, mmap.PAGESIZE)
            finalizer = weakref.finalize(buffer, _give_back, weakref.ref(self._mapping), first, end)
            finalizer.atexit = False
        return buffer


class LeaseArena:
    """Memory for tensors that are read one at a time: leases in regions with huge pages while tensors are kept.

    Page faults of 4 KiB cost such reads more time than the copy does. A caller that lets go of one tensor before it
    asks for the next is better served by ordinary memory, which the allocator hands out again while it is warm; so a
    lease is given only where the latest few tensors are all alive. May be used from several threads.

    A thread clears a region while the first tensors are read into it, as far as the caller allows for memory that is
    not asked for in the end.

    Args:
        total_bytes: as much as will be asked for at most; no region is larger.
        ordinary: makes a buffer of ordinary memory.
        ahead_bytes: how much may be cleared before it is asked for.
    """

    def __init__(self, total_bytes: int, ordinary: Callable[[int], Any], *, ahead_bytes: int = 0) -> None:
        self._left = total_bytes
        self._ordinary = ordinary
        self._ahead_bytes = ahead_bytes
        self._region: HostRegion | None = None
        self._used = 0
        self._latest: deque[weakref.ref[Any]] = deque(maxlen=_KEPT_TENSORS)
        self._lock = threading.Lock()

    def take(self, length: int) -> Any:
        """A writable buffer of that many bytes, not cleared where that can be avoided.

        Raises:
            InsufficientMemoryError: the system refuses to reserve a region.
        """
        if not _ARENA_TENSOR_BYTES <= length <= _ARENA_REGION_BYTES:
            return self._ordinary(length)
        with self._lock:
            latest = self._latest
            kept = len(latest) == _KEPT_TENSORS and all(held() is not None for held in latest)
            made = self._lease(length) if kept else self._ordinary(length)
            # A bytearray, where there is no numpy, cannot be watched: its memory was cleared, and so touched, already.
            with contextlib.suppress(TypeError):
                latest.append(weakref.ref(made))
        return made

    def _lease(self, length: int) -> LeaseBuffer:
        region = self._region
        if region is None or region.nbytes - self._used < length:
            region = self._region = HostRegion(min(_ARENA_REGION_BYTES, max(self._left, length)))
            self._used = 0
            self._clear_ahead(region)
        start = self._used
        self._used = align_up(start + length, mmap.PAGESIZE)
        self._left -= length
        return region.lease(start, length)

    def _clear_ahead(self, region: HostRegion) -> None:
        """Begin behind the first pages, which the caller is about to touch; a thread of its own keeps the region."""
        nbytes = align_down(min(region.nbytes, self._ahead_bytes) - _AHEAD_OF_READER_BYTES, PAGE_BYTES)
        if nbytes <= 0 or available_processors() < 2:
            return

        def clear() -> None:
            kernel.advise_memory(region.address + _AHEAD_OF_READER_BYTES, nbytes, kernel.MADV_POPULATE_WRITE)

        # No more threads may be had: then whoever touches a page clears it.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=clear, name="weightlift-clear", daemon=True).start()


class SlotPool:
    """The fixed pool an engine stages in, made once per load and never grown.

    Args:
        count: how many slots; 0 makes an empty pool.
        slot_bytes: bytes of each, a multiple of the page size.

    Raises:
        InsufficientMemoryError: the system refuses to reserve that much.
    """

    def __init__(self, count: int, slot_bytes: int) -> None:
        self.nbytes = count * slot_bytes
        self._mapping = _map_anonymous(self.nbytes, "staging slots") if self.nbytes else None
        address = _address(self._mapping) if self._mapping is not None else 0
        self.memory = SlotMemory(address, slot_bytes, count)

    def close(self) -> None:
        """Return the memory; no engine may be using it any more."""
        if self._mapping is not None:
            if sys.platform == "linux":
                # Beside a busy Python thread a call that lets go of the interpreter lock gets it back 5 ms later if the
                # other thread woke up meanwhile. Advice holds on to it, and of what is empty closing makes short work.
                self._mapping.madvise(mmap.MADV_DONTNEED)
            self._mapping.close()
            self._mapping = None
