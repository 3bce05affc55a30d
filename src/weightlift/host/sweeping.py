"""Leaving the page cache of a file as it was found: drops ranges again that were absent before.

Knows nothing of why they were brought in; :mod:`weightlift.host.residency` looks at what is there.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from weightlift.host import kernel, residency
from weightlift.units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_SWEEPS_MAX: Final = 20
_SWEEP_PAUSE_SECONDS: Final = 0.005

SWEPT_BYTES: Final = 64 << 10
"""What may be left after a sweep and still count as nothing."""


def sweep(fd: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Drop ranges of a file from the page cache; pages in use elsewhere stay, so check residency afterwards.

    Pages that a range covers only in part are left alone, except the last page of the file.

    Args:
        fd: an open file.
        ranges: offset and length in bytes of each range, in file order.
    """
    size = kernel.file_status(fd).size_bytes
    # The kernel passes over a large folio that does not lie wholly inside one call's range: neighbours go as one.
    for offset, end in _joined(ranges):
        start = align_up(offset, kernel.PAGE_SIZE)
        stop = align_up(size, kernel.PAGE_SIZE) if end >= size else align_down(end, kernel.PAGE_SIZE)
        if stop > start:
            kernel.advise_dont_need(fd, start, stop - start)


def sweep_until_settled(fd: int, ranges: Sequence[tuple[int, int]]) -> int | None:
    """Drop ranges like :func:`sweep`, again and again for a moment, until nothing to speak of is left.

    Read-ahead that is still under way is passed over by the kernel and arrives afterwards.

    Returns:
        How many bytes of the ranges are still cached; ``None`` if the system will not tell.
    """
    left: int | None = 0
    for _ in range(_SWEEPS_MAX if ranges else 0):
        sweep(fd, ranges)
        left = residency.cached_in(fd, ranges)
        if left is None or left <= SWEPT_BYTES:
            break
        time.sleep(_SWEEP_PAUSE_SECONDS)
    return left


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Start and end of the ranges, those that touch joined into one."""
    first = last = 0
    for offset, length in ranges:
        if offset != last:
            yield first, last
            first = offset
        last = offset + length
    yield first, last
