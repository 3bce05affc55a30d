"""The figures that are looked at again and again while a load runs, read as cheaply as the system allows.

Owns which files have to be read for them: control groups are found once and asked only if they limit something, and
swap is only counted where there is some. Keeps no history and judges nothing. Every figure is ``None`` where the system
does not tell it; the root of the file system is a parameter, so that recorded trees can be read.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from weightlift.host import kernel
from weightlift.host.cgroup import ROOT
from weightlift.host.limits import memory_limits
from weightlift.host.memory import ProcessMemory, swap_counters

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.host.cgroup import CgroupLevel

_MEMINFO: Final = re.compile(rb"^(MemTotal|MemAvailable|Cached|Shmem|SwapTotal|SwapFree):\s+(\d+) kB$", re.MULTILINE)
_RESIDENT: Final = re.compile(rb"^Rss(?:Anon|File|Shmem):\s+(\d+) kB$", re.MULTILINE)
_STALLED: Final = re.compile(rb"^some .*total=(\d+)", re.MULTILINE)
_STALLS_EVERY: Final = 4
_USAGE_FILE: Final = {1: "memory.usage_in_bytes", 2: "memory.current"}
_PREFIX: Final = {1: "total_", 2: ""}
_CACHE_NAME: Final = {1: "total_cache", 2: "file"}
_SHARED_NAME: Final = {1: "total_shmem", 2: "shmem"}


class HostFigures(NamedTuple):
    """Memory of this process and what is left for it, at one moment.

    Attributes:
        process: resident memory of this process by kind.
        available_bytes: memory left without taking anything from anybody, as the machine and all control groups see it.
        last_resort_bytes: the same with file pages that are in use, which the kernel drops before it kills.
        total_bytes: the machine's memory, or the limit of the group that leaves the least.
        group: the name of that group; empty for the machine.
        page_cache_bytes: file pages cached in the machine, or in that group.
        swap_free_bytes: swap that is left.
        swapped: bytes the machine has swapped in and out since it was started.
        machine_stall_seconds: time in which some task of the machine waited for memory, since it was started.
        group_stall_seconds: the same for this process's control group, where the kernel keeps it (version 2).
    """

    process: ProcessMemory | None
    available_bytes: int | None
    last_resort_bytes: int | None
    total_bytes: int | None
    group: str
    page_cache_bytes: int | None
    swap_free_bytes: int
    swapped: tuple[int, int] | None
    machine_stall_seconds: float | None
    group_stall_seconds: float | None


class HostGauges:
    """Reads :class:`HostFigures`.

    Args:
        root: root of the file system.
    """

    _swaps: ClassVar[dict[Path, tuple[int, int] | None]] = {}

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._meminfo, self._status, self._machine_pressure = (
            os.fspath(root / name) for name in ("proc/meminfo", "proc/self/status", "proc/pressure/memory")
        )
        limits = memory_limits(root)
        self._limited, self._pressure = limits.binding, limits.pressure
        self._stalls: tuple[float | None, float | None] = (None, None)
        self._reads = 0

    def read(self, *, fresh: bool = False) -> HostFigures:
        """The figures now; takes some 0.1 ms.

        Args:
            fresh: look at pressure too, which is dear and otherwise looked at only every fourth time.
        """
        if fresh or self._reads % _STALLS_EVERY == 0:
            own = None if self._pressure is None else _stalled(self._pressure)
            self._stalls = _stalled(self._machine_pressure), own
        self._reads += 1
        machine = self._machine()
        available, total = machine.get("MemAvailable"), machine.get("MemTotal")
        cache = machine["Cached"] - machine["Shmem"] if {"Cached", "Shmem"} <= machine.keys() else None
        last_resort, group = available, ""
        for level, limit in self._limited:
            seen = _look(level, limit)
            if seen is None or available is None or last_resort is None:
                continue
            left, left_at_last, cached = seen
            last_resort = min(last_resort, left_at_last)
            if left < available:
                available, total, group, cache = left, limit, level.name, cached
        return HostFigures(
            process=self._process(),
            available_bytes=available,
            last_resort_bytes=last_resort,
            total_bytes=total,
            group=group,
            page_cache_bytes=cache,
            swap_free_bytes=self._swap_free(machine),
            swapped=self._swapped(machine),
            machine_stall_seconds=self._stalls[0],
            group_stall_seconds=self._stalls[1],
        )

    def _machine(self) -> dict[str, int]:
        return _machine_rows(self._meminfo)

    def _process(self) -> ProcessMemory | None:
        # The kernel writes the three lines one behind the other, in this order.
        found = _RESIDENT.findall(kernel.read_small(self._status) or b"")
        return ProcessMemory(*(int(value) * 1024 for value in found)) if len(found) == 3 else None

    def _swap_free(self, machine: dict[str, int]) -> int:
        free = machine.get("SwapFree", 0)
        for level, _ in self._limited if free else ():
            limit, used = level.read_int("memory.swap.max"), level.read_int("memory.swap.current")
            if limit is not None and used is not None:
                free = min(free, max(0, limit - used))
        return free

    def _swapped(self, machine: dict[str, int]) -> tuple[int, int] | None:
        """The counters; they stand still where there is no swap, and reading them is the dearest of all."""
        if self._root not in self._swaps or machine.get("SwapTotal", 1):
            self._swaps[self._root] = swap_counters(self._root)
        return self._swaps[self._root]


def _machine_rows(meminfo: str) -> dict[str, int]:
    return {name.decode(): int(value) * 1024 for name, value in _MEMINFO.findall(kernel.read_small(meminfo) or b"")}


def _look(level: CgroupLevel, limit: int) -> tuple[int, int, int] | None:
    """What a group leaves, what it leaves at last, and the page cache charged to it."""
    usage = level.read_int(_USAGE_FILE[level.version])
    if usage is None:
        return None
    table, prefix = level.read_table("memory.stat"), _PREFIX[level.version]
    inactive, active = table.get(f"{prefix}inactive_file", 0), table.get(f"{prefix}active_file", 0)
    left = max(0, limit - max(0, usage - inactive))
    cached = table.get(_CACHE_NAME[level.version], 0) - table.get(_SHARED_NAME[level.version], 0)
    return left, max(0, limit - max(0, usage - inactive - active)), max(0, cached)


def _stalled(path: str) -> float | None:
    found = _STALLED.search(kernel.read_small(path) or b"")
    # The kernel counts in microseconds.
    return int(found[1]) / 1e6 if found else None
