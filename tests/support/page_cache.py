"""How much of a file the page cache may hold where the kernel takes pages back by itself.

Where proactive reclaim runs (DAMON's, which judges ranges of physical memory), a page that was just read may lie in a
range that nobody has used for seconds, and be gone a moment later, whoever read it. Counts of cached bytes are then a
few pages too low now and then.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

_TAKEN_BYTES = 256 << 10
_SWITCHES = ("sys/kernel/mm/damon/admin/kdamonds/*/state", "sys/module/damon_*/parameters/enabled")


@functools.cache
def takes_pages() -> bool:
    """Whether this kernel reclaims proactively."""
    return any(file.read_text().strip() in {"on", "Y"} for name in _SWITCHES for file in Path("/").glob(name))


class _Nearly:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and self.nbytes - _TAKEN_BYTES <= other <= self.nbytes

    def __hash__(self) -> int:
        raise TypeError("equal to many numbers")

    def __repr__(self) -> str:
        return f"{self.nbytes}, or a few pages less"


def kept(nbytes: int) -> Any:
    """Equal to a count of so many cached bytes: exactly, or where pages are taken back to one a few pages lower."""
    return _Nearly(nbytes) if takes_pages() else nbytes
