"""Facts about one place where models lie: file system, disk, and how its files can be read.

Owns the joining of mounts, disks and probes for one file or folder. Reads one block of one file to see whether direct
reads work, and nothing else. Knows nothing of checkpoints. The root of the file system is a parameter for the tables of
the kernel; the file itself is always real.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightlift.host import residency, storage
from weightlift.host.block import BlockDevice, block_device, block_device_named, read_ahead_of_mount
from weightlift.host.mounts import Mount, find_mount

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT: Final = Path("/")
_MODEL_SUFFIXES: Final = (".safetensors", ".gguf", ".pt", ".pth", ".bin", ".ckpt")
_FILES_LOOKED_AT: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceFacts:
    """One file or folder, and the largest model file in it.

    Attributes:
        path: as it was named.
        problem: why nothing more is known; empty if all is well.
        file: the file that was looked at; ``None`` where there is none.
        file_bytes: its size.
        model_bytes: size of all model files of the folder, or of the file.
        device: number of the device the file is on (``st_dev``), for comparisons.
        mount: the mount it lies on.
        disk: the disk below; ``None`` for network file systems and where nobody tells.
        read_ahead_bytes: how far the system reads ahead there.
        direct: whether direct reads of the file work.
        dontcache: whether reads can leave the page cache alone.
        may_see_cache: whether this user may know what the page cache holds of the file.
        cached_bytes: what the page cache holds of it.
    """

    path: str
    problem: str = ""
    file: str | None = None
    file_bytes: int = 0
    model_bytes: int = 0
    device: int = 0
    mount: Mount | None = None
    disk: BlockDevice | None = None
    read_ahead_bytes: int | None = None
    direct: storage.DirectAccess | None = None
    dontcache: bool | None = None
    may_see_cache: bool | None = None
    cached_bytes: int | None = None


def place_facts(path: str | os.PathLike[str], root: Path = ROOT) -> PlaceFacts:
    """Gather the facts about a place.

    Args:
        path: a file, or a folder whose largest model file stands for all of them.
        root: where the kernel's tables are read.
    """
    named = os.fspath(path)
    try:
        file, total = _model_file(Path(path))
    except OSError as err:
        return PlaceFacts(path=named, problem=f"{err.filename or named}: {err.strerror or err}")
    mount = find_mount(file or path, root / "proc/self/mountinfo")
    disk = _disk(mount, root)
    read_ahead = read_ahead_of_mount(mount.device, root) if mount else None
    if read_ahead is None and disk is not None:
        read_ahead = disk.read_ahead_bytes
    if file is None:
        return PlaceFacts(
            path=named,
            problem="there is no file in it to look at",
            mount=mount,
            disk=disk,
            read_ahead_bytes=read_ahead,
        )
    status = file.stat()
    facts = PlaceFacts(
        path=named,
        file=str(file),
        file_bytes=status.st_size,
        model_bytes=total,
        device=status.st_dev,
        mount=mount,
        disk=disk,
        read_ahead_bytes=read_ahead,
    )
    return _with_probes(facts, file)


def _with_probes(facts: PlaceFacts, file: Path) -> PlaceFacts:
    try:
        fd = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except OSError as err:
        return replace(facts, problem=f"{file}: {err.strerror or err}")
    try:
        may_see = residency.may_see_residency(fd)
        return replace(
            facts,
            direct=storage.probe_direct(file),
            dontcache=storage.probe_dontcache(fd),
            may_see_cache=may_see,
            cached_bytes=residency.residency(fd, facts.file_bytes) if may_see else None,
        )
    finally:
        os.close(fd)


def _model_file(path: Path) -> tuple[Path | None, int]:
    """The largest model file of a folder, else its largest file; and the size of all model files together.

    Raises:
        OSError: the path cannot be looked at.
    """
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "neither a file nor a folder", str(path))
        return path, status.st_size
    found = []
    with os.scandir(path) as entries:
        for _, entry in zip(range(_FILES_LOOKED_AT), entries, strict=False):
            if entry.is_file():
                found.append((entry.stat().st_size, Path(entry.path)))
    models = [item for item in found if item[1].suffix in _MODEL_SUFFIXES]
    largest = max(models or found, default=(0, None), key=lambda item: item[0])
    return largest[1], _total(models)


def _total(files: Iterable[tuple[int, Path]]) -> int:
    return sum(size for size, _ in files)


def _disk(mount: Mount | None, root: Path) -> BlockDevice | None:
    if mount is None:
        return None
    # btrfs and some others have no number of their own but name the disk they are on.
    return block_device(mount.device, root) or (
        block_device_named(os.path.realpath(mount.source), root) if mount.source.startswith("/dev/") else None
    )
