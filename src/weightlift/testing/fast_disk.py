"""A fast disk made of memory: ext4 on a loop device over a tmpfs file, with direct reads that are honest.

Owns the mounts and undoes them. Needs root and the usual tools of a Linux system; says so where they are missing, so
that a test can skip with the reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightlift.host.memory import headroom
from weightlift.units import MIB, align_up, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

_PREFIX: Final = "weightlift-fast-disk-"
_TOOLS: Final = ("mkfs.ext4", "mount", "umount")


class FastDiskUnavailable(Exception):  # noqa: N818 - a state of the machine that tests skip on, not a failure
    """This machine cannot make a fast disk; the message says why."""


@contextlib.contextmanager
def fast_disk(size_bytes: int) -> Iterator[Path]:
    """Make a disk of memory for the duration of a ``with`` block.

    Args:
        size_bytes: how much room files shall have on it.

    Yields:
        The folder it is mounted on, empty but for ``lost+found``.

    Raises:
        FastDiskUnavailable: not root, a tool or a kernel feature is missing, or too little memory is free.
    """
    # ext4 needs about 1 % for its tables; the tmpfs carries the image and its own page tables' worth of slack.
    image_bytes = align_up(size_bytes + size_bytes // 32 + 16 * MIB, MIB)
    _check(image_bytes)
    _remove_leftovers()
    base = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    with contextlib.ExitStack() as undo:
        undo.callback(_dismantle, base)
        yield _build(base, image_bytes)


def _check(image_bytes: int) -> None:
    if sys.platform != "linux":
        raise FastDiskUnavailable(f"a fast disk needs Linux, this is {sys.platform}")
    if os.geteuid() != 0:
        raise FastDiskUnavailable("a fast disk needs root for its mounts")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise FastDiskUnavailable(f"missing tools: {', '.join(missing)}")
    room = headroom()
    if room is not None and room.available_bytes < image_bytes:
        raise FastDiskUnavailable(f"the disk would take {format_bytes(image_bytes)} of memory, but {room.sentence}")


def _build(base: Path, image_bytes: int) -> Path:
    memory, disk = base / "memory", base / "disk"
    memory.mkdir()
    disk.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={image_bytes + MIB},mode=700", "weightlift", str(memory))
    image = memory / "image"
    with image.open("wb") as file:
        file.truncate(image_bytes)
    # Without a journal and with tables written at once nothing happens behind a measurement's back.
    options = ["-q", "-F", "-m", "0", "-b", "4096", "-N", "4096", "-O", "^has_journal"]
    _run("mkfs.ext4", *options, "-E", "lazy_itable_init=0,nodiscard", str(image))
    # -o loop lets the kernel free the loop device together with the mount, even if this process is killed.
    _run("mount", "-t", "ext4", "-o", "loop,noatime", str(image), str(disk))
    return disk


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which(command[0]) or command[0]
    # Only the tools named above, with arguments made here.
    return subprocess.run([tool, *command[1:]], capture_output=True, text=True, check=False)  # noqa: S603


def _run(*command: str) -> None:
    done = _call(*command)
    if done.returncode != 0:
        raise FastDiskUnavailable(f"{' '.join(command)} failed: {done.stderr.strip() or done.returncode}")


def _dismantle(base: Path) -> None:
    """Undo whatever part of a disk exists."""
    for mount in (base / "disk", base / "memory"):
        # A file still open or mapped keeps a disk busy; detached lazily, it goes once they let go.
        if os.path.ismount(mount) and _call("umount", str(mount)).returncode != 0:
            _call("umount", "--lazy", str(mount))
    for folder in (base / "disk", base / "memory", base):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove_leftovers() -> None:
    """Dismantle the disks of processes that were killed before they could do so."""
    for base in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = base.name.removeprefix(_PREFIX).split("-", 1)[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            _dismantle(base)
