"""Where this process stands in the control-group trees, version 1 and version 2.

Owns the way from ``/proc`` to the folders of one controller, own group first. Knows nothing of what the files in them
mean. The root of the file system is a parameter, so that a recorded tree can be read in place of this machine's.
"""

from __future__ import annotations

import functools
import posixpath
from pathlib import Path
from typing import Final

from msgspec import Struct

from weightlift.host import kernel

ROOT: Final = Path("/")
"""Root of this machine's file system."""


class CgroupLevel(Struct, frozen=True):
    """One control group that a limit may be set on.

    Attributes:
        folder: its folder, with the injected root in front.
        name: its path below the mount point, as ``/user.slice``; ``/`` for the mount point itself.
        version: 1 or 2.
    """

    folder: Path
    name: str
    version: int

    def read(self, file: str) -> str | None:
        """Contents of one of its files without surrounding white space; ``None`` if it cannot be read."""
        return read_text(self.folder / file)

    def read_int(self, file: str) -> int | None:
        """Contents of a file that holds one number; ``None`` for anything else, ``max`` included."""
        text = self.read(file)
        return int(text) if text is not None and text.lstrip("-").isdigit() else None

    def read_table(self, file: str) -> dict[str, int]:
        """Contents of a file with a name and a number per line; empty if it cannot be read."""
        rows = (line.split() for line in (self.read(file) or "").splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def read_text(path: Path) -> str | None:
    """A small file of ``/proc`` or ``/sys`` without surrounding white space; ``None`` if it cannot be read."""
    contents = kernel.read_small(path)
    return None if contents is None else contents.decode("utf-8", errors="replace").strip()


def cgroup_levels(controller: str, root: Path = ROOT) -> list[CgroupLevel]:
    """The groups whose limits bind this process for one controller: its own, then every ancestor that can be seen.

    Args:
        controller: ``memory`` or ``cpu``.
        root: root of the file system to read.

    Returns:
        Groups of version 1, where the controller is mounted so, followed by those of version 2. Some machines mount
        both; a version-2 group without the controller then merely lacks its files.
    """
    groups = own_groups(root)
    return list(_levels(controller, root, groups) if root == ROOT else _find_levels(controller, root, groups))


def own_groups(root: Path = ROOT) -> str:
    """Which groups this process is in, as the system writes it; another text where it was moved."""
    return read_text(root / "proc/self/cgroup") or ""


def _find_levels(controller: str, root: Path, groups: str) -> list[CgroupLevel]:
    own = _own_groups(groups.splitlines())
    levels: list[CgroupLevel] = []
    for version, mount_root, mount_point in _mounts(controller, root):
        name = own.get(controller if version == 1 else "")
        if name is not None:
            levels += _chain(version, mount_root, root / mount_point.lstrip("/"), name)
    return sorted(levels, key=lambda level: level.version)


_levels = functools.lru_cache(maxsize=16)(_find_levels)
"""For this machine, whose hierarchies are mounted once while its table of mounts may be long; groups do change."""


def _own_groups(lines: list[str]) -> dict[str, str]:
    """Path of the own group by controller; the key of version 2 is the empty string."""
    groups: dict[str, str] = {}
    for line in lines:
        _, controllers, name = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), name))
    return groups


def _mounts(controller: str, root: Path) -> list[tuple[int, str, str]]:
    """Version, root inside the hierarchy and mount point of each hierarchy that may carry the controller."""
    found: dict[int, tuple[int, str, str]] = {}
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, source = line.partition(" - ")
        fields, kind, options = mount.split(), source.split(" ", 1)[0], source.rsplit(" ", 1)[-1]
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and controller in options.split(",") else 0
        if version:
            found.setdefault(version, (version, fields[3], fields[4]))
    return list(found.values())


def _chain(version: int, mount_root: str, mount_point: Path, name: str) -> list[CgroupLevel]:
    """The folders from the own group up to the mount point."""
    # A container sees its own group as the root of the mount, while /proc names it by the path of the machine; a path
    # outside the mount (or out of the namespace, "/..") can only be judged from the mount point up.
    inside = posixpath.relpath(name, mount_root)
    parts = [] if inside.startswith("..") or "/.." in name else [part for part in inside.split("/") if part != "."]
    return [
        CgroupLevel(mount_point.joinpath(*parts[:depth]), "/" + "/".join(parts[:depth]), version)
        for depth in range(len(parts), -1, -1)
    ]
