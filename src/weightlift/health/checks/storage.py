"""Checks of the place where models lie: file system, disk, direct reads, what may be known of the page cache, speed."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from weightlift.health.findings import Check, Finding, Level, Rule
from weightlift.host.mounts import FileSystemClass
from weightlift.units import KIB, MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.health.facts import Facts
    from weightlift.host.block import BlockDevice

_READ_AHEAD_BYTES: Final = 1 * MIB
_SLOW: Final = 0.5
_MUCH_FASTER: Final = 1.5

PLACE_UNREADABLE = Rule(
    id="place-unreadable",
    level=Level.ERROR,
    when="the path named does not exist, holds no file, or may not be read",
    why="nothing can be loaded from it",
    mend="check the path and its permissions: `ls -l {path}`",
)
NETWORK = Rule(
    id="storage-network",
    level=Level.ADVICE,
    when="the files lie on a network file system",
    why="every load crosses the network again unless the files stay in the page cache; mapped files wait for it page "
    "by page",
    mend="`--method buffered --cache keep`, or a copy on a local drive",
)
READ_AHEAD = Rule(
    id="read-ahead-small",
    level=Level.ADVICE,
    when="a network or FUSE file system reads ahead less than 1 MiB",
    why="buffered and mapped reads wait for one small request after the other",
    mend="`echo 16384 | sudo tee /sys/class/bdi/{device}/read_ahead_kb`",
)
FUSE = Rule(
    id="storage-fuse",
    level=Level.ADVICE,
    when="the files lie on a FUSE file system",
    why="each request passes through another program; direct reads are often refused or emulated",
    mend="`--method buffered`, or a copy on a local file system",
)
OVERLAY = Rule(
    id="storage-overlay",
    level=Level.ADVICE,
    when="the files lie in a container's own layers (overlay)",
    why="models there are part of the image, and what is downloaded is gone with the container",
    mend="keep models on a volume: `docker run -v /path/to/models:/models`",
)
PLAN9 = Rule(
    id="storage-9p",
    level=Level.WARNING,
    when="the files lie on a 9p mount: a Windows drive under WSL2, or a folder shared with a virtual machine",
    why="the protocol moves small pieces one after the other and knows no direct reads",
    mend="copy the models to the Linux file system, as with `cp -r {path} ~/models/`; until then `--method buffered`",
)
IN_MEMORY = Rule(
    id="storage-memory",
    level=Level.ADVICE,
    when="the files lie in memory (tmpfs)",
    why="they take memory already, and a load to the CPU takes it once more",
    mend="`--method mmap` shares it; or keep the files on a drive",
)
ROTATING = Rule(
    id="storage-rotating",
    level=Level.ADVICE,
    when="the disk turns",
    why="it reads 0.1 to 0.25 GB/s, and far less when several files are read at once",
    mend="move models to an SSD; until then `--cache keep --workers 2`, so that the next load comes out of memory",
)
USB = Rule(
    id="storage-usb",
    level=Level.ADVICE,
    when="the disk hangs on USB",
    why="the cable and the port decide the speed",
    mend="use a port of 10 Gbit/s or more (`lsusb -t` shows the speed in use), or an internal drive",
)
ENCRYPTED = Rule(
    id="storage-encrypted",
    level=Level.FACT,
    when="the disk is encrypted (dm-crypt)",
    why="the processors decrypt every byte, which on fast drives is the limit",
    mend="`cryptsetup benchmark` shows it; for LUKS on SSDs, `cryptsetup refresh --perf-no_read_workqueue {name}`",
)
RAID = Rule(
    id="storage-raid",
    level=Level.FACT,
    when="the files lie on a software RAID",
    why="striped disks add up only while enough reads are under way",
    mend="leave the number of workers to weightlift, which finds it while loading",
)
DRIVE_LINK = Rule(
    id="drive-link-narrow",
    level=Level.WARNING,
    when="the drive's PCI Express link runs with fewer lanes or slower than both of its ends can",
    why="the drive cannot be faster than its link",
    mend="put the drive into another slot, and check the slot's settings in the firmware",
)
NO_DIRECT = Rule(
    id="no-direct-reads",
    level=Level.ADVICE,
    when="direct reads of the files do not work",
    why="everything read passes through the page cache and may push out other programs' files",
    mend="`--method buffered --cache drop`; `auto` does the same by itself",
)
READ_ONLY = Rule(
    id="cache-unknown",
    level=Level.ADVICE,
    when="this user neither owns the files nor may write them",
    why="the kernel then does not tell what the page cache holds of them, so `auto` cannot use what is cached, and "
    "nothing is dropped from it",
    mend="`sudo chown {user} {file}`, or load with `--method buffered` if others keep the files warm",
)
STORAGE_SLOW = Rule(
    id="storage-slow",
    level=Level.ADVICE,
    when="the fastest path reads less than 0.5 GB/s",
    why="the drive decides how long a load takes, whatever the loader",
    mend="a faster drive; or `--cache keep` so that the next load comes out of memory",
)
BUFFERED_SLOW = Rule(
    id="buffered-slow",
    level=Level.FACT,
    when="direct reads are half as fast again as buffered ones, or faster",
    why="loaders that map files or read them plainly leave that much of the drive unused",
    mend="`--method direct`; `auto` chooses it where the files are not to stay cached",
)

RULES: Final = (
    *(PLACE_UNREADABLE, NETWORK, READ_AHEAD, FUSE, OVERLAY, PLAN9, IN_MEMORY, ROTATING, USB, ENCRYPTED, RAID),
    *(DRIVE_LINK, NO_DIRECT, READ_ONLY, STORAGE_SLOW, BUFFERED_SLOW),
)


def check_place(facts: Facts) -> Iterator[Finding]:
    """Whether anything can be read at all."""
    place = facts.place
    if place is not None and place.problem:
        yield PLACE_UNREADABLE.found(
            place.problem, f"check the path and its permissions: `ls -l {shlex.quote(place.path)}`"
        )


def check_file_system(facts: Facts) -> Iterator[Finding]:
    """What the file system is like."""
    place = facts.place
    mount = place.mount if place else None
    if place is None or mount is None:
        return
    on = f"{place.file or place.path} lies on {mount.source} ({mount.kind}, mounted at {mount.point})"
    kind = mount.file_system_class
    if mount.over_network:
        yield NETWORK.found(on)
    if kind is FileSystemClass.FUSE:
        yield FUSE.found(on)
    elif kind is FileSystemClass.OVERLAY:
        yield OVERLAY.found(on)
    elif kind is FileSystemClass.PLAN9:
        yield PLAN9.found(on, PLAN9.mend.replace("{path}", shlex.quote(place.path)))
    elif kind is FileSystemClass.MEMORY:
        yield IN_MEMORY.found(on)
    ahead = place.read_ahead_bytes
    if kind in {FileSystemClass.NETWORK, FileSystemClass.FUSE} and ahead is not None and ahead < _READ_AHEAD_BYTES:
        yield READ_AHEAD.found(
            f"the system reads {ahead // KIB} KiB ahead on {mount.point}",
            READ_AHEAD.mend.replace("{device}", mount.device),
        )


def check_disk(facts: Facts) -> Iterator[Finding]:
    """What the disk below is like."""
    disk = facts.place.disk if facts.place else None
    if disk is None:
        return
    named = f"{disk.name} {disk.model}".strip()
    if disk.turns:
        yield ROTATING.found(f"{named} turns")
    if any(part.usb for part in disk.disks):
        yield USB.found(f"{named} hangs on USB")
    for part in _layers(disk):
        if part.kind == "dm" and part.detail == "crypt":
            yield ENCRYPTED.found(f"{part.name} is encrypted", ENCRYPTED.mend.replace("{name}", part.name))
        elif part.kind == "md":
            members = ", ".join(member.name for member in part.members)
            yield RAID.found(f"{part.name} is a {part.detail or 'RAID'} of {members or 'unknown disks'}")
    for part in disk.disks:
        link = part.link
        if part.kind == "nvme" and link is not None and (link.width < link.width_max or link.speed < link.speed_max):
            yield DRIVE_LINK.found(
                f"the link to {part.name} runs {link.width} lanes at {link.speed:g} GT/s "
                f"({link.gigabytes_per_second:.1f} GB/s) of {link.width_max} at {link.speed_max:g} "
                f"({link.gigabytes_per_second_max:.1f} GB/s)"
            )


def _layers(disk: BlockDevice) -> Iterator[BlockDevice]:
    yield disk
    for member in disk.members:
        yield from _layers(member)


def check_reading(facts: Facts) -> Iterator[Finding]:
    """How the files can be read, and what may be known of them."""
    place = facts.place
    if place is None or place.file is None or place.problem:
        return
    in_memory = place.mount is not None and place.mount.file_system_class is FileSystemClass.MEMORY
    if place.direct is not None and not place.direct.supported and not in_memory:
        yield NO_DIRECT.found(place.direct.reason)
    if place.may_see_cache is False and facts.machine is not None and facts.machine.system == "Linux":
        yield READ_ONLY.found(
            f"{place.file} is another user's and may only be read",
            f"`sudo chown $USER {shlex.quote(place.file)}`, or `--method buffered` if others keep the files warm",
        )


def check_speed(facts: Facts) -> Iterator[Finding]:
    """What the probes measured."""
    speeds = facts.speeds
    fastest = speeds.fastest if speeds else None
    if speeds is None or fastest is None:
        return
    path, speed = fastest
    if speed < _SLOW:
        size = facts.place.model_bytes if facts.place else 0
        takes = f"; {format_bytes(size)} take {size / speed / 1e9:.0f} s" if size else ""
        yield STORAGE_SLOW.found(f"the fastest path ({path}) reads {speed:.2f} GB/s{takes}")
    direct, buffered = speeds.storage.get("direct"), speeds.storage.get("buffered")
    if direct and buffered and direct >= _MUCH_FASTER * buffered:
        yield BUFFERED_SLOW.found(f"direct reads reach {direct:.2f} GB/s, buffered ones {buffered:.2f}")


CHECKS: Final[tuple[Check, ...]] = (check_place, check_file_system, check_disk, check_reading, check_speed)
