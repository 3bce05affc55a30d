"""The limits that control groups set on this process's memory, found once for several that ask within a second.

Knows which files hold them, and nothing of what is used or left: :mod:`weightlift.host.memory` and
:mod:`weightlift.host.gauges` look at that, each as closely as it needs to.
"""

from __future__ import annotations

import functools
import os
import re
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.host import kernel
from weightlift.host.cgroup import ROOT, CgroupLevel, cgroup_levels, own_groups

if TYPE_CHECKING:
    from pathlib import Path

_TOTAL: Final = re.compile(rb"^MemTotal:\s+(\d+) kB$", re.MULTILINE)

# Above memory.high nothing is killed, but every allocation waits for reclaim: that is the freeze to stay clear of.
_LIMIT_FILES: Final = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}


class MemoryLimits(NamedTuple):
    """Where this process stands, and what is allowed there.

    Attributes:
        levels: all its groups that may limit memory, its own first.
        binding: those that allow less than the machine has, and how many bytes.
        pressure: the file in which its own group tells of pressure, if there is one.
    """

    levels: tuple[CgroupLevel, ...]
    binding: tuple[tuple[CgroupLevel, int], ...]
    pressure: str | None


def memory_limits(root: Path) -> MemoryLimits:
    """The limits now, or those of less than a second ago while the process stays where it was.

    Args:
        root: root of the file system to read.
    """
    return _find(root) if root != ROOT else _this_second(own_groups(), int(time.monotonic()))


def _find(root: Path) -> MemoryLimits:
    found = _TOTAL.search(kernel.read_small(root / "proc/meminfo") or b"")
    total_bytes = int(found[1]) * 1024 if found else 0
    levels = tuple(cgroup_levels("memory", root))
    limits = ((level, _limit(level)) for level in levels)
    pressures = (os.fspath(level.folder / "memory.pressure") for level in levels if level.version == 2)
    return MemoryLimits(
        levels,
        tuple((level, limit) for level, limit in limits if limit is not None and limit < total_bytes),
        next((path for path in pressures if os.path.exists(path)), None),
    )


@functools.lru_cache(maxsize=1)
def _this_second(_groups: str, _second: int) -> MemoryLimits:
    """Looking for them takes longer than a small load."""
    return _find(ROOT)


def _limit(level: CgroupLevel) -> int | None:
    limits = (level.read_int(file) for file in _LIMIT_FILES[level.version])
    return min((limit for limit in limits if limit is not None), default=None)
