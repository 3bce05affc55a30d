"""Facts about host memory and processors: what this process uses, what is left for it, how much the machine suffers.

Owns the reading of ``/proc``, ``/sys`` and control groups. Knows nothing of budgets or checkpoints. Every function
answers ``None`` where the system does not tell; the root of the file system is a parameter, so that recorded trees can
be read.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Final, Literal

from msgspec import Struct

from weightlift.host import kernel
from weightlift.host.cgroup import ROOT, CgroupLevel, cgroup_levels, own_groups, read_text
from weightlift.host.limits import memory_limits
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

_SWAPPED: Final = re.compile(rb"^pswpin (\d+)\npswpout (\d+)$", re.MULTILINE)


class ProcessMemory(Struct, frozen=True):
    """Resident memory of this process by kind, in bytes.

    Attributes:
        anonymous_bytes: private memory, which only swap can take back.
        file_bytes: pages of mapped files, which the kernel can drop while they are clean.
        shared_bytes: shared memory and tmpfs pages.
    """

    anonymous_bytes: int
    file_bytes: int
    shared_bytes: int


def process_memory(root: Path = ROOT) -> ProcessMemory | None:
    """What this process holds now; the kernel's counters may lag by some hundred KiB per processor."""
    rows = kilobyte_rows(read_text(root / "proc/self/status") or "")
    try:
        return ProcessMemory(rows["RssAnon"], rows["RssFile"], rows["RssShmem"])
    except KeyError:
        return None


def kilobyte_rows(text: str) -> dict[str, int]:
    """Values in bytes of the lines like ``RssAnon:   112 kB``."""
    values: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        # Counts have no unit, and a process may carry any name.
        if unit == "kB" and number.isdecimal():
            values[name] = int(number) * 1024
    return values


class Room(Struct, frozen=True):
    """What one limit leaves: the machine's own memory, or the limit of one control group.

    Attributes:
        group: the control group's name; empty for the machine.
        version: of the control group, 1 or 2; 0 for the machine.
        limit_bytes: all there is, or all that the group allows.
        available_bytes: what is left of it.
    """

    group: str
    version: int
    limit_bytes: int
    available_bytes: int


class Headroom(Struct, frozen=True):
    """How much more memory this process can take before something has to give.

    Attributes:
        available_bytes: the smallest figure of the machine's and all control groups'.
        limit_source: which of them it is.
        total_bytes: the machine's memory, or the limit of that control group.
        swap_free_bytes: swap that is left beside it.
        sentence: the same for people.
        rooms: the machine, then the control groups whose limits are below it.
    """

    available_bytes: int
    limit_source: Literal["machine", "cgroup"]
    total_bytes: int
    swap_free_bytes: int
    sentence: str
    rooms: tuple[Room, ...] = ()


def headroom(root: Path = ROOT) -> Headroom | None:
    """Memory left for this process, from the machine's ``MemAvailable`` and the limits of all its control groups."""
    machine = kilobyte_rows(read_text(root / "proc/meminfo") or "")
    try:
        rooms = [Room("", 0, machine["MemTotal"], machine["MemAvailable"])]
    except KeyError:
        return None
    swap_free = machine.get("SwapFree", 0)
    limits = memory_limits(root)
    for level in limits.levels if swap_free else ():
        swap_free = min(swap_free, _swap_left(level, swap_free))
    # What cannot bind is not looked at: a load asks before it begins, and every file costs some 10 µs.
    for level, limit in limits.binding:
        used = _used(level)
        if used is not None:
            rooms.append(Room(level.name, level.version, limit, max(0, limit - used)))
    tightest = min(rooms, key=lambda room: room.available_bytes)
    available, total = tightest.available_bytes, tightest.limit_bytes
    if not tightest.version:
        sentence = f"{format_bytes(available)} of the machine's {format_bytes(total)} are available"
        return Headroom(available, "machine", total, swap_free, sentence, tuple(rooms))
    sentence = (
        f"{format_bytes(available)} are available of the {format_bytes(total)} that the control group "
        f"{tightest.group} allows"
    )
    return Headroom(available, "cgroup", total, swap_free, sentence, tuple(rooms))


def _used(level: CgroupLevel) -> int | None:
    """What the group holds and cannot give back at once: its page cache counts against the limit but is reclaimable."""
    usage = level.read_int("memory.usage_in_bytes" if level.version == 1 else "memory.current")
    if usage is None:
        return None
    statistics = level.read_table("memory.stat")
    inactive = statistics.get("total_inactive_file" if level.version == 1 else "inactive_file", 0)
    return max(0, usage - inactive)


def _swap_left(level: CgroupLevel, unlimited: int) -> int:
    limit, used = level.read_int("memory.swap.max"), level.read_int("memory.swap.current")
    return unlimited if limit is None or used is None else max(0, limit - used)


def swap_counters(root: Path = ROOT) -> tuple[int, int] | None:
    """Bytes that the whole machine has swapped in and out since it was started."""
    found = _SWAPPED.search(kernel.read_small(root / "proc/vmstat") or b"")
    return (int(found[1]) * kernel.PAGE_SIZE, int(found[2]) * kernel.PAGE_SIZE) if found else None


def pressure_stall_seconds(root: Path = ROOT) -> float | None:
    """Seconds since start in which some task of the machine waited for memory."""
    return stalled_seconds(read_text(root / "proc/pressure/memory") or "")


def stalled_seconds(pressure: str) -> float | None:
    """Seconds in which some task waited, from the text of the machine's or a control group's pressure file."""
    for line in pressure.splitlines():
        kind, *fields = line.split()
        if kind == "some":
            # The kernel counts in microseconds.
            return next((int(field[6:]) / 1e6 for field in fields if field.startswith("total=")), None)
    return None


def available_processors(root: Path = ROOT) -> int:
    """Processors this process may use: its affinity, cut down to the quota of its control groups, at least 1."""
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _quota_this_second(own_groups(), int(time.monotonic())) if root == ROOT else _smallest_quota(root)
    return max(1, count if quota is None else min(count, quota))


def _smallest_quota(root: Path) -> int | None:
    """Processors that the tightest control group allows; ``None`` if none limits them."""
    quotas = (_processor_quota(level) for level in cgroup_levels("cpu", root))
    return min((-(-quota // period) for quota, period in quotas if quota > 0 and period > 0), default=None)


@functools.lru_cache(maxsize=1)
def _quota_this_second(_groups: str, _second: int) -> int | None:
    """For this machine, as long as the process stays where it is; every load would ask its groups several times."""
    return _smallest_quota(ROOT)


def _processor_quota(level: CgroupLevel) -> tuple[int, int]:
    """Microseconds of processor time per period, and the period; 0 if there is no quota."""
    if level.version == 1:
        return level.read_int("cpu.cfs_quota_us") or 0, level.read_int("cpu.cfs_period_us") or 0
    fields = (level.read("cpu.max") or "max 0").split()
    return (int(fields[0]), int(fields[1])) if len(fields) == 2 and fields[0].isdigit() else (0, 0)


HugepageSetting = Literal["always", "madvise", "never"]


def transparent_hugepages(root: Path = ROOT) -> HugepageSetting | None:
    """When the kernel uses huge pages for anonymous memory."""
    text = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    settings: tuple[HugepageSetting, ...] = ("always", "madvise", "never")
    return next((setting for setting in settings if f"[{setting}]" in text), None)
