"""Memory control groups of one's own: making one below the own group, limiting, freezing, ending and removing it.

Owns the files of the groups it made and writes to no other group. Version 1 and version 2 differ in almost every name;
nothing outside this module needs to know which one a machine has. The root of the file system and the call that makes a
folder are parameters, so that a recorded tree can play the kernel.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightlift.host.cgroup import CgroupLevel, cgroup_levels, read_text
from weightlift.host.memory import kilobyte_rows, stalled_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT: Final = Path("/")
_REMOVAL_TRIES: Final = 200
_REMOVAL_PAUSE_SECONDS: Final = 0.01
_numbers: Final = itertools.count()


class GroupUnavailable(Exception):  # noqa: N818 - a state of the machine, for which there is another way
    """This user may make no memory control group here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupUse:
    """What is charged to a group and all below it, in bytes.

    Attributes:
        charged_bytes: everything, page cache included; this is what the limit counts.
        anonymous_bytes: private memory, which only swap can take back.
        file_bytes: page cache, mapped or not, without shared memory.
        inactive_file_bytes: the part of it that the kernel would drop first.
        shared_bytes: shared memory and tmpfs.
        swapped_bytes: what lies in swap; 0 where the kernel does not account for it.
        held: the kernel has put the group's processes to sleep at the limit.
        kills: processes of the group killed for want of memory.
        stalled_seconds: time in which some process of the group waited for memory; ``None`` on version 1.
    """

    charged_bytes: int
    anonymous_bytes: int
    file_bytes: int
    inactive_file_bytes: int
    shared_bytes: int
    swapped_bytes: int
    held: bool
    kills: int
    stalled_seconds: float | None


class MemoryGroup:
    """A memory control group that belongs to the caller.

    Args:
        level: its folder and version.
    """

    def __init__(self, level: CgroupLevel) -> None:
        self.level = level

    @property
    def members_file(self) -> Path:
        """The file that a process writes its id to in order to join."""
        return self.level.folder / "cgroup.procs"

    def limit(self, limit_bytes: int, *, slow_down_bytes: int | None = None, swap_bytes: int | None = None) -> None:
        """Set the hard limit.

        Args:
            limit_bytes: at this much the kernel reclaims the group's page cache, swaps, and in the end kills.
            slow_down_bytes: from here on allocations are slowed down to a crawl instead; version 2 only.
            swap_bytes: most swap on top; ``None`` leaves it unlimited.

        Raises:
            GroupUnavailable: the kernel refused the limit.
        """
        one = self.level.version == 1
        try:
            self._write("memory.limit_in_bytes" if one else "memory.max", limit_bytes)
        except OSError as err:
            raise GroupUnavailable(f"{self.level.folder} takes no limit: {err.strerror}") from err
        # Each of these is a refinement that a kernel may lack: without swap accounting there is no file for it.
        with contextlib.suppress(OSError):
            if swap_bytes is not None:
                total = limit_bytes + swap_bytes
                self._write(*(("memory.memsw.limit_in_bytes", total) if one else ("memory.swap.max", swap_bytes)))
        with contextlib.suppress(OSError):
            if slow_down_bytes is not None and not one:
                self._write("memory.high", slow_down_bytes)
        with contextlib.suppress(OSError):
            if not one:
                # Half a program is of no use to anybody: if the kernel has to kill, it takes all of the group.
                self._write("memory.oom.group", 1)

    def raise_limit(self, limit_bytes: int) -> None:
        """Give more, so that a program can still run its ending; a refusal is ignored."""
        with contextlib.suppress(OSError):
            if self.level.version == 1:
                self._write("memory.memsw.limit_in_bytes", -1)
        with contextlib.suppress(OSError):
            self._write("memory.limit_in_bytes" if self.level.version == 1 else "memory.max", limit_bytes)
        with contextlib.suppress(OSError):
            if self.level.version == 2:
                self._write("memory.high", "max")

    def sleep_at_limit(self, *, enabled: bool) -> bool:
        """Have the kernel put processes to sleep at the limit rather than kill; version 1 only.

        A page fault then waits, and a system call fails with ``ENOMEM``.

        Returns:
            Whether the kernel took it.
        """
        if self.level.version != 1:
            return False
        try:
            self._write("memory.oom_control", int(enabled))
        except OSError:
            return False
        return True

    def use(self) -> GroupUse | None:
        """What the group holds now; ``None`` if it is gone."""
        table = self.level.read_table("memory.stat")
        if self.level.version == 1:
            charged = self.level.read_int("memory.usage_in_bytes")
            control = self.level.read_table("memory.oom_control")
            shared = table.get("total_shmem", 0)
            anonymous, inactive = table.get("total_rss", 0), table.get("total_inactive_file", 0)
            file_bytes, swapped = table.get("total_cache", 0) - shared, table.get("total_swap", 0)
            held, kills, stalled = bool(control.get("under_oom")), control.get("oom_kill", 0), None
        else:
            charged = self.level.read_int("memory.current")
            shared = table.get("shmem", 0)
            anonymous, inactive = table.get("anon", 0), table.get("inactive_file", 0)
            file_bytes, swapped = table.get("file", 0) - shared, self.level.read_int("memory.swap.current") or 0
            held, kills = False, self.level.read_table("memory.events").get("oom_kill", 0)
            stalled = stalled_seconds(self.level.read("memory.pressure") or "")
        if charged is None or not table:
            return None
        return GroupUse(
            charged_bytes=charged,
            anonymous_bytes=anonymous,
            file_bytes=max(0, file_bytes),
            inactive_file_bytes=inactive,
            shared_bytes=shared,
            swapped_bytes=swapped,
            held=held,
            kills=kills,
            stalled_seconds=stalled,
        )

    def process_ids(self) -> list[int]:
        """The processes in the group itself."""
        return [int(word) for word in (self.level.read("cgroup.procs") or "").split()]

    def freeze(self, *, frozen: bool) -> bool:
        """Stop or continue all processes at once; version 2 only.

        Returns:
            Whether the kernel took it. A process inside a long system call stops when that returns.
        """
        if self.level.version != 2:
            return False
        try:
            self._write("cgroup.freeze", int(frozen))
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """Kill every process in the group, frozen or asleep at the limit."""
        if self.level.version == 2:
            with contextlib.suppress(OSError):
                self._write("cgroup.kill", 1)
                return
        for process_id in self.process_ids():
            with contextlib.suppress(OSError):
                os.kill(process_id, signal.SIGKILL)

    def release(self) -> list[int]:
        """Hand processes that are still in the group to the group above, and remove it.

        Returns:
            The processes handed over: they live on without the limit.
        """
        left = self.process_ids()
        for process_id in left:
            with contextlib.suppress(OSError):
                (self.level.folder.parent / "cgroup.procs").write_text(str(process_id), encoding="ascii")
        with contextlib.suppress(OSError):
            self.level.folder.rmdir()
        return left

    def remove(self) -> None:
        """Kill what still runs in the group and remove its folder.

        Raises:
            RuntimeError: its processes do not end.
        """
        for _ in range(_REMOVAL_TRIES):
            self.kill()
            try:
                self.level.folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                # A killed process leaves its group a moment after the signal.
                time.sleep(_REMOVAL_PAUSE_SECONDS)
            else:
                return
        raise RuntimeError(f"{self.level.folder} cannot be removed: processes in it do not end")

    def _write(self, file: str, value: int | str) -> None:
        # Without O_CREAT: a control file that the kernel does not have must not appear in a recorded tree either.
        descriptor = os.open(self.level.folder / file, os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(descriptor, str(value).encode("ascii"))
        finally:
            os.close(descriptor)


def make_group(name: str, root: Path = ROOT, make_folder: Callable[[Path], None] = os.mkdir) -> MemoryGroup:
    """Make a memory control group as near to the own one as the kernel allows.

    Args:
        name: how its folder begins; the process id and a number follow.
        root: root of the file system.
        make_folder: makes the folder, which a kernel fills with control files.

    Raises:
        GroupUnavailable: no controller is mounted, or this user may not use it.
    """
    reason = "no memory controller is mounted"
    for parent in cgroup_levels("memory", root):
        folder = parent.folder / f"{name}-{os.getpid()}-{next(_numbers)}"
        try:
            make_folder(folder)
        except OSError as err:
            reason = f"{folder} cannot be made: {err.strerror}"
            continue
        level = CgroupLevel(folder, f"{parent.name.rstrip('/')}/{folder.name}", parent.version)
        if (folder / ("memory.limit_in_bytes" if level.version == 1 else "memory.max")).exists():
            return MemoryGroup(level)
        folder.rmdir()
        reason = f"{parent.folder} does not hand the memory controller to groups below it"
    raise GroupUnavailable(reason)


def group_of(process_id: int, unit: str, root: Path = ROOT) -> MemoryGroup | None:
    """The version-2 group that a service manager made for a process under a name; ``None`` if it is not in one."""
    for line in (read_text(root / f"proc/{process_id}/cgroup") or "").splitlines():
        name = line.partition("::")[2]
        if line.startswith("0::") and name.rpartition("/")[2] == unit:
            for level in cgroup_levels("memory", root):
                if level.version == 2 and level.name == "/":
                    return MemoryGroup(CgroupLevel(level.folder / name.lstrip("/"), name, 2))
    return None


@dataclass(frozen=True, slots=True)
class Available:
    """Memory that could be had at once if every clean page of files were dropped.

    Attributes:
        available_bytes: the smallest figure of the machine's and all the own control groups'.
        free_bytes: what could be had without dropping a page; the smallest figure here too.
        total_bytes: the machine's memory, or the limit of the group with the least available.
        swap_free_bytes: swap that is left beside it.
    """

    available_bytes: int
    free_bytes: int
    total_bytes: int
    swap_free_bytes: int


def available_memory(root: Path = ROOT) -> Available | None:
    """Memory left before something has to be swapped or killed; ``None`` if the system does not tell.

    Unlike :func:`weightlift.host.memory.headroom`, which a load must not exhaust, this counts all page cache of a
    control group as reclaimable, the part in use included: it says when the kernel would begin to kill.
    """
    machine = kilobyte_rows(read_text(root / "proc/meminfo") or "")
    try:
        available, free, total = machine["MemAvailable"], machine["MemFree"], machine["MemTotal"]
    except KeyError:
        return None
    for level in cgroup_levels("memory", root):
        one = level.version == 1
        limit = level.read_int("memory.limit_in_bytes" if one else "memory.max")
        charged = level.read_int("memory.usage_in_bytes" if one else "memory.current")
        if limit is None or charged is None or limit >= machine["MemTotal"]:
            continue
        table, prefix = level.read_table("memory.stat"), "total_" if one else ""
        cache = table.get(f"{prefix}inactive_file", 0) + table.get(f"{prefix}active_file", 0)
        free = min(free, max(0, limit - charged))
        left = max(0, limit - max(0, charged - cache))
        if left < available:
            available, total = left, limit
    return Available(available, free, total, machine.get("SwapFree", 0))
