"""Which mount a path lies on, and what kind of file system that is.

Owns the table of mounts (``/proc/self/mountinfo``) and the sorting of file systems into kinds that behave alike. Knows
nothing of files' contents or of what lies under a file system.
"""

from __future__ import annotations

import enum
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNTINFO: Final = Path("/proc/self/mountinfo")
_OCTAL_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


class FileSystemClass(enum.StrEnum):
    """File systems that behave alike when large files are read from them."""

    LOCAL = "local"
    NETWORK = "network"
    FUSE = "fuse"
    OVERLAY = "overlay"
    PLAN9 = "9p"
    MEMORY = "memory"
    UNKNOWN = "unknown"


_CLASSES: Final[dict[str, FileSystemClass]] = {
    **dict.fromkeys(
        (
            *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "lustre", "gpfs", "beegfs", "afs", "glusterfs"),
            *("orangefs", "pvfs2", "ocfs2", "gfs2", "wekafs", "pmxcfs", "virtiofs"),
        ),
        FileSystemClass.NETWORK,
    ),
    **dict.fromkeys(("fuse", "fuseblk"), FileSystemClass.FUSE),
    **dict.fromkeys(("overlay", "aufs", "unionfs"), FileSystemClass.OVERLAY),
    **dict.fromkeys(("9p", "drvfs"), FileSystemClass.PLAN9),
    **dict.fromkeys(("tmpfs", "ramfs", "rootfs", "devtmpfs", "hugetlbfs"), FileSystemClass.MEMORY),
    "unknown": FileSystemClass.UNKNOWN,
}

_NETWORK_OVER_FUSE: Final = ("sshfs", "rclone", "s3fs", "gcsfuse", "mount-s3", "glusterfs", "juicefs", "cephfs", "nfs")
"""Parts of the names of FUSE file systems whose files come over a network."""


class Mount(Struct, frozen=True):
    """One mounted file system.

    Attributes:
        device: major and minor number of its device, like ``254:0``; major 0 for those without one.
        point: where it is mounted.
        kind: type of the file system, like ``ext4`` or ``fuse.sshfs``.
        source: what is mounted, like ``/dev/nvme0n1p2`` or ``server:/models``.
        options: of the mount and of its file system.
    """

    device: str
    point: str
    kind: str
    source: str
    options: tuple[str, ...] = ()

    @property
    def file_system_class(self) -> FileSystemClass:
        """What it behaves like."""
        if self.kind.startswith("fuse."):
            return FileSystemClass.FUSE
        return _CLASSES.get(self.kind, FileSystemClass.LOCAL)

    @property
    def over_network(self) -> bool:
        """Whether its bytes come over a network, as far as its name tells."""
        if self.file_system_class is FileSystemClass.NETWORK:
            return self.kind != "virtiofs"
        return self.kind.startswith("fuse") and any(name in self.kind for name in _NETWORK_OVER_FUSE)


def unescaped(text: str) -> str:
    """A name out of a table of the kernel, with its octal escapes undone."""
    return _OCTAL_ESCAPE.sub(lambda found: chr(int(found[1], 8)), text)


def read_mounts(text: str) -> Iterator[Mount]:
    """The mounts of a table, in its order."""
    for line in text.splitlines():
        mount, separator, source = line.partition(" - ")
        fields, described = mount.split(), source.split()
        if not separator or len(fields) < 6 or len(described) < 2:
            continue
        options = (*fields[5].split(","), *(described[2].split(",") if len(described) > 2 else ()))
        yield Mount(fields[2], unescaped(fields[4]), described[0], unescaped(described[1]), tuple(options))


def find_mount(path: str | os.PathLike[str], mountinfo: Path = MOUNTINFO) -> Mount | None:
    """The mount that an existing file or folder lies on; ``None`` if nobody tells.

    Args:
        path: the file or folder.
        mountinfo: the table of mounts to look into.
    """
    try:
        device = os.stat(path).st_dev
        text = mountinfo.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    if sys.platform == "win32":
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    real = os.path.realpath(path)
    best: tuple[tuple[bool, bool, int], Mount] | None = None
    for mount in read_mounts(text):
        same = mount.device == number
        inside = (real + "/").startswith(mount.point.rstrip("/") + "/")
        # Bind mounts share a number, so the place decides among them, and later mounts cover earlier ones. btrfs gives
        # its subvolumes device numbers that the table does not know: there the place alone decides.
        rank = (same, inside, len(mount.point) if inside else 0)
        if (same or inside) and (best is None or rank >= best[0]):
            best = (rank, mount)
    return best[1] if best else None
