"""Other processes: who descends from whom, what memory each holds, which large files it has open or mapped.

Owns the reading of ``/proc/PID``. A process that ends meanwhile, or belongs to another user, is passed over.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.host.cgroup import read_text
from weightlift.host.memory import kilobyte_rows

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """Memory of one or more processes by kind, in bytes.

    Attributes:
        anonymous_bytes: private memory in RAM, which only swap can take back.
        file_bytes: pages of mapped files.
        shared_bytes: shared memory and tmpfs pages.
        swapped_bytes: private memory in swap.
    """

    anonymous_bytes: int = 0
    file_bytes: int = 0
    shared_bytes: int = 0
    swapped_bytes: int = 0

    def __add__(self, other: ProcessUse) -> ProcessUse:
        return ProcessUse(
            self.anonymous_bytes + other.anonymous_bytes,
            self.file_bytes + other.file_bytes,
            self.shared_bytes + other.shared_bytes,
            self.swapped_bytes + other.swapped_bytes,
        )


class OpenDescriptor(NamedTuple):
    """A large regular file that a process has open.

    Attributes:
        path: where it is, as the kernel names it.
        device: number of its device, as in ``os.stat``.
        inode: its inode.
        size_bytes: its size.
        position: where the next plain read begins.
    """

    path: str
    device: int
    inode: int
    size_bytes: int
    position: int


def process_ids(root: Path = Path("/")) -> list[int]:
    """Every process that can be seen."""
    try:
        names = os.listdir(root / "proc")
    except OSError:
        return []
    return [int(name) for name in names if name.isdigit()]


def parent_of(process_id: int, root: Path = Path("/")) -> int | None:
    """The parent of a process; ``None`` if it is gone."""
    # A program may carry any name, brackets and spaces included, so the fields are counted from its end.
    fields = (read_text(root / f"proc/{process_id}/stat") or "").rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def descendants(ancestors: Collection[int], root: Path = Path("/")) -> list[int]:
    """Processes and all that descend from them, as far as they still live, parents before children.

    Args:
        ancestors: where to begin; they belong to the answer.
        root: root of the file system to read.
    """
    children: dict[int, list[int]] = {}
    alive = set()
    for process_id in process_ids(root):
        parent = parent_of(process_id, root)
        if parent is not None:
            children.setdefault(parent, []).append(process_id)
            alive.add(process_id)
    found: dict[int, None] = {}
    waiting = [process_id for process_id in ancestors if process_id in alive]
    while waiting:
        process_id = waiting.pop(0)
        if process_id not in found:
            found[process_id] = None
            waiting += children.get(process_id, [])
    return list(found)


def process_use(process_id: int, root: Path = Path("/")) -> ProcessUse | None:
    """What a process holds; ``None`` if it is gone, or is one of the kernel's own."""
    rows = kilobyte_rows(read_text(root / f"proc/{process_id}/status") or "")
    try:
        return ProcessUse(rows["RssAnon"], rows["RssFile"], rows["RssShmem"], rows.get("VmSwap", 0))
    except KeyError:
        return None


def open_descriptors(process_id: int, size_bytes_min: int, root: Path = Path("/")) -> Iterator[OpenDescriptor]:
    """The regular files of at least a size that a process has open, one for every descriptor.

    Args:
        process_id: the process.
        size_bytes_min: smaller files are passed over.
        root: root of the file system to read.
    """
    folder = root / f"proc/{process_id}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        try:
            status = os.stat(folder / name)
            path = os.readlink(folder / name)
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode) and status.st_size >= size_bytes_min:
            yield OpenDescriptor(
                path, status.st_dev, status.st_ino, status.st_size, _position(process_id, name, root) or 0
            )


def _position(process_id: int, descriptor: str, root: Path) -> int | None:
    text = read_text(root / f"proc/{process_id}/fdinfo/{descriptor}") or ""
    words = text.split(maxsplit=2)
    return int(words[1]) if len(words) > 1 and words[0] == "pos:" and words[1].isdigit() else None


def command_name(process_id: int, root: Path = Path("/")) -> str | None:
    """The short name of a process, which it may have chosen itself."""
    return read_text(root / f"proc/{process_id}/comm")


def holders_of(path: str | os.PathLike[str], root: Path = Path("/")) -> list[int]:
    """Processes that have a file mapped, as far as this user may see."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    mark = f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x} {status.st_ino} "
    return [
        process_id for process_id in process_ids(root) if mark in (read_text(root / f"proc/{process_id}/maps") or "")
    ]


def stay_alive(root: Path = Path("/")) -> list[str]:
    """Make this process one that keeps running when memory is short, as far as its rights go.

    Its memory is locked, so that it is never waiting for a page of its own; the kernel is asked to spare it when it
    looks for a victim; and orphans of its children become its own children, so that they stay in sight.

    Returns:
        What was refused, in words; root gets everything.
    """
    if sys.platform != "linux":
        return []
    refused = []
    libc = ctypes.CDLL(None, use_errno=True)
    # Only what is in use, not every page of every library. Under a limit, memory to come must not be bound to it:
    # every later allocation beyond the limit would fail.
    future = 0 if _locking_is_limited() else _MCL_FUTURE
    if libc.mlockall(_MCL_CURRENT | future | _MCL_ONFAULT) != 0:
        refused.append(f"locking its own memory ({os.strerror(ctypes.get_errno())})")
    try:
        (root / "proc/self/oom_score_adj").write_text("-900", encoding="ascii")
    except OSError as err:
        refused.append(f"being spared by the out-of-memory killer ({err.strerror})")
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        refused.append(f"adopting orphans of the command ({os.strerror(ctypes.get_errno())})")
    return refused


def _locking_is_limited() -> bool:
    import resource

    return os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY
