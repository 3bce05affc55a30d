"""Facts about a machine that decide how loads behave on it: kernel, swap, limits, containers.

Owns the reading of the files where Linux tells them, and the probes of kernel features, each by a call. Judges nothing.
What a system does not tell is ``None``; the root of the file system is a parameter, so that recorded trees can be read.
"""

from __future__ import annotations

import enum
import errno
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightlift.host import kernel, storage
from weightlift.host.block import block_device, block_device_named
from weightlift.host.cgroup import read_text
from weightlift.host.memory import Headroom, HugepageSetting, available_processors, headroom, transparent_hugepages
from weightlift.host.mounts import find_mount, unescaped

ROOT: Final = Path("/")
UNLIMITED: Final = sys.maxsize
"""What a limit is where there is none."""


class Ability(enum.StrEnum):
    """What came of calling a feature of the kernel."""

    WORKS = "works"
    FORBIDDEN = "forbidden"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFeatures:
    """Features of the kernel that were tried.

    Attributes:
        cachestat: counting cached pages of a file.
        dontcache: reading through the page cache without leaving anything there, on the file system that Python's own
            files are on.
        io_uring: rings of asynchronous reads, which other loaders use.
    """

    cachestat: Ability
    dontcache: Ability
    io_uring: Ability


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapDevice:
    """One swap area.

    Attributes:
        name: its path.
        kind: ``partition``, ``file`` or ``zram``.
        size_bytes: how large it is.
        used_bytes: how much is in use.
        priority: larger ones are filled first.
        rotating: whether it lies on a disk that turns.
    """

    name: str
    kind: str
    size_bytes: int
    used_bytes: int
    priority: int
    rotating: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """One machine, as one process sees it.

    Attributes:
        system: ``Linux``, ``Darwin`` or ``Windows``.
        release: of its kernel.
        wsl2: it is the virtual machine of the Windows Subsystem for Linux.
        container: which kind of container this is in; empty outside of one.
        processors: how many this process may use.
        room: memory that is left, by the machine's count and by every control group's.
        swap: every swap area.
        swappiness: how readily programs are swapped out instead of dropping page cache, 0 to 200.
        overcommit: 0 for the kernel's own judgement, 1 for always, 2 for never.
        commit_left_bytes: with 2, what may still be promised.
        memlock_bytes: what this process may lock in memory.
        shared_bytes: size of ``/dev/shm``.
        hugepages: when huge pages are used for memory.
        features: what the kernel can do.
    """

    system: str
    release: str
    wsl2: bool = False
    container: str = ""
    processors: int = 1
    room: Headroom | None = None
    swap: tuple[SwapDevice, ...] | None = None
    swappiness: int | None = None
    overcommit: int | None = None
    commit_left_bytes: int | None = None
    memlock_bytes: int | None = None
    shared_bytes: int | None = None
    hugepages: HugepageSetting | None = None
    features: KernelFeatures | None = None

    @property
    def memory_bytes(self) -> int | None:
        """The machine's own memory."""
        return self.room.rooms[0].limit_bytes if self.room and self.room.rooms else None

    @property
    def swap_bytes(self) -> int | None:
        """All swap together."""
        return None if self.swap is None else sum(area.size_bytes for area in self.swap)


def machine_facts(root: Path = ROOT) -> MachineFacts:
    """Gather the facts; takes milliseconds."""
    release = read_text(root / "proc/sys/kernel/osrelease") or platform.release()
    return MachineFacts(
        system=platform.system(),
        release=release,
        wsl2="microsoft" in release.lower(),
        container=container_kind(root),
        processors=available_processors(root),
        room=headroom(root),
        swap=swap_devices(root),
        swappiness=_number(root / "proc/sys/vm/swappiness"),
        overcommit=_number(root / "proc/sys/vm/overcommit_memory"),
        commit_left_bytes=_commit_left(root),
        memlock_bytes=_memlock(),
        shared_bytes=_shared_bytes(root),
        hugepages=transparent_hugepages(root),
        features=kernel_features(),
    )


def _number(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if text is not None and text.isdecimal() else None


def container_kind(root: Path = ROOT) -> str:
    """The kind of container this process is in, empty outside of one."""
    told = read_text(root / "run/systemd/container")
    if told:
        return told
    if (root / "var/run/secrets/kubernetes.io").exists():
        return "kubernetes"
    if (root / ".dockerenv").exists():
        return "docker"
    return "podman" if (root / "run/.containerenv").exists() else ""


def swap_devices(root: Path = ROOT) -> tuple[SwapDevice, ...] | None:
    """Every swap area, in the order in which the kernel lists them."""
    text = read_text(root / "proc/swaps")
    if text is None:
        return None
    areas = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) != 5 or not (fields[2].isdecimal() and fields[3].isdecimal()):
            continue
        name = unescaped(fields[0])
        kind = "zram" if os.path.basename(name).startswith("zram") else fields[1]
        areas.append(
            SwapDevice(
                name=name,
                kind=kind,
                size_bytes=int(fields[2]) * 1024,
                used_bytes=int(fields[3]) * 1024,
                priority=int(fields[4]),
                rotating=_rotates(name, kind, root),
            )
        )
    return tuple(areas)


def _rotates(name: str, kind: str, root: Path) -> bool | None:
    if kind == "zram":
        return False
    if kind == "file":
        mount = find_mount(root / name.lstrip("/"), root / "proc/self/mountinfo")
        disk = block_device(mount.device, root) if mount else None
    else:
        disk = block_device_named(name, root)
    return None if disk is None else disk.turns


def _commit_left(root: Path) -> int | None:
    rows = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name in {"CommitLimit", "Committed_AS"}:
            rows[name] = int(value.split()[0]) * 1024
    return rows["CommitLimit"] - rows["Committed_AS"] if len(rows) == 2 else None


def _memlock() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def _shared_bytes(root: Path) -> int | None:
    if not hasattr(os, "statvfs"):
        return None
    try:
        found = os.statvfs(root / "dev/shm")
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def kernel_features() -> KernelFeatures:
    """Try what the kernel can do, by calling it."""
    return KernelFeatures(cachestat=_try_cachestat(), dontcache=_try_dontcache(), io_uring=_try_io_uring())


def _try_cachestat() -> Ability:
    if not hasattr(os, "memfd_create"):
        return Ability.UNKNOWN
    # A file that is surely one's own: on others EPERM says nothing about the call.
    fd = os.memfd_create("weightlift-probe")
    try:
        return Ability.MISSING if kernel.cachestat(fd, 0, 0) is None else Ability.WORKS
    except OSError as err:
        return Ability.FORBIDDEN if err.errno == errno.EPERM else Ability.UNKNOWN
    finally:
        os.close(fd)


def _try_dontcache() -> Ability:
    if sys.platform != "linux":
        return Ability.UNKNOWN
    fd = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Ability.WORKS if storage.probe_dontcache(fd) else Ability.MISSING
    finally:
        os.close(fd)


def _try_io_uring() -> Ability:
    if sys.platform != "linux":
        return Ability.UNKNOWN
    try:
        fd = kernel.io_uring_setup()
    except OSError as err:
        return Ability.FORBIDDEN if err.errno in {errno.EPERM, errno.EACCES} else Ability.UNKNOWN
    if fd is None:
        return Ability.MISSING
    os.close(fd)
    return Ability.WORKS
