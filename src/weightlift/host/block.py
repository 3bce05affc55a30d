"""Block devices as ``/sys`` describes them: what a disk is, whether it turns, and what it is made of.

Owns the reading of ``/sys/dev/block``. Reads descriptions only, never a device. The root of the file system is a
parameter, so that a recorded tree can be read in place of this machine's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightlift.host.cgroup import read_text
from weightlift.host.pci import PciLink, narrowest_link

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path("/")
_SECTOR_BYTES: Final = 512
_DEPTH_MAX: Final = 8
_KINDS: Final = (
    ("nvme", "nvme"),
    ("md", "md"),
    ("dm-", "dm"),
    ("zram", "zram"),
    ("loop", "loop"),
    ("mmcblk", "sd card"),
    ("vd", "virtio"),
    ("xvd", "xen"),
    ("sr", "optical"),
    ("sd", "scsi"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDevice:
    """A disk, or something that behaves like one.

    Attributes:
        name: the kernel's name of the whole disk, like ``nvme0n1``.
        kind: ``nvme``, ``scsi`` (SATA, SAS and USB), ``virtio``, ``xen``, ``md`` (RAID), ``dm`` (LVM, encryption),
            ``loop``, ``zram``, ``sd card``, ``optical`` or ``other``.
        detail: the RAID level, what the device mapper does (``crypt``, ``LVM``), or the file behind a loop device.
        model: what its maker calls it.
        size_bytes: how large it is.
        rotating: whether it says that it turns.
        read_ahead_bytes: how far the system reads ahead.
        usb: it hangs on USB.
        link: the narrowest PCI Express link on the way to it; ``None`` where there is none.
        members: the disks it is made of.
    """

    name: str
    kind: str
    detail: str = ""
    model: str = ""
    size_bytes: int | None = None
    rotating: bool | None = None
    read_ahead_bytes: int | None = None
    usb: bool = False
    link: PciLink | None = None
    members: tuple[BlockDevice, ...] = ()

    @property
    def disks(self) -> Iterator[BlockDevice]:
        """The real disks at the bottom."""
        if not self.members:
            yield self
        for member in self.members:
            yield from member.disks

    @property
    def turns(self) -> bool:
        """Whether a disk at the bottom says that it turns; virtual disks say so too often to be believed."""
        return any(disk.rotating and disk.kind == "scsi" for disk in self.disks)


def block_device(number: str, root: Path = ROOT) -> BlockDevice | None:
    """The disk behind a device number.

    Args:
        number: major and minor number, like ``254:0``.
        root: root of the file system to read.

    Returns:
        The whole disk, for a partition too; ``None`` where ``/sys`` knows none, as for network file systems.
    """
    return _read(Path(os.path.realpath(root / "sys/dev/block" / number)), 0)


def block_device_named(name: str, root: Path = ROOT) -> BlockDevice | None:
    """The disk behind a name such as ``/dev/sda2`` or ``dm-0``; ``None`` where ``/sys`` knows none."""
    folder = root / "sys/class/block" / name.rsplit("/", 1)[-1]
    return _read(Path(os.path.realpath(folder)), 0)


def _read(folder: Path, depth: int) -> BlockDevice | None:
    if depth > _DEPTH_MAX or not folder.is_dir():
        return None
    if (folder / "partition").exists():
        folder = folder.parent
    name = folder.name
    kind = next((kind for prefix, kind in _KINDS if name.startswith(prefix)), "other")
    slaves = folder / "slaves"
    names = sorted(os.listdir(slaves)) if slaves.is_dir() else []
    members = (_read(Path(os.path.realpath(slaves / name)), depth + 1) for name in names)
    size = _number(folder / "size")
    read_ahead = _number(folder / "queue/read_ahead_kb")
    rotating = _number(folder / "queue/rotational")
    return BlockDevice(
        name=name,
        kind=kind,
        detail=_detail(folder, kind),
        model=read_text(folder / "device/model") or "",
        size_bytes=None if size is None else size * _SECTOR_BYTES,
        rotating=None if rotating is None else rotating == 1,
        read_ahead_bytes=None if read_ahead is None else read_ahead * 1024,
        usb=any(part.startswith("usb") for part in folder.parts),
        link=narrowest_link(folder),
        members=tuple(member for member in members if member is not None),
    )


def _detail(folder: Path, kind: str) -> str:
    if kind == "md":
        return read_text(folder / "md/level") or ""
    if kind == "dm":
        # The part before the first dash says who made it: CRYPT-LUKS2-…, LVM-…, mpath-….
        maker = (read_text(folder / "dm/uuid") or "").split("-", 1)[0]
        return maker.lower() if maker == "CRYPT" else maker
    if kind == "loop":
        return read_text(folder / "loop/backing_file") or ""
    return ""


def _number(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if text is not None and text.isdecimal() else None


def read_ahead_of_mount(number: str, root: Path = ROOT) -> int | None:
    """How far the system reads ahead on a mounted file system, in bytes, network ones included."""
    kilobytes = _number(root / "sys/class/bdi" / number / "read_ahead_kb")
    return None if kilobytes is None else kilobytes * 1024
