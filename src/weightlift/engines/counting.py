"""Counting what the page cache holds of a file, by several threads of the compiled engine."""

from __future__ import annotations

import ctypes

from weightlift.engines.native import native_library
from weightlift.host import residency
from weightlift.host.kernel import PAGE_SIZE
from weightlift.host.memory import available_processors


def count_cached(fd: int, offset: int, length: int, step: int) -> list[int | None]:
    """Cached bytes of a file range per step, counted by several threads.

    The answers are those of :func:`weightlift.host.residency.count_cached`, and come from it where the kernel lacks the
    call or refuses.
    """
    library = native_library()
    if isinstance(library, str) or length <= step:
        return residency.count_cached(fd, offset, length, step)
    steps = -(-length // step)
    pages = (ctypes.c_int64 * steps)()
    library.wl_count_cached(fd, offset, length, step, pages, available_processors())
    if min(pages) < 0:
        return residency.count_cached(fd, offset, length, step)
    return [min(count * PAGE_SIZE, step, length - index * step) for index, count in enumerate(pages)]
