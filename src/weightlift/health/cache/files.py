"""Which files a list of paths stands for: files, folders, links, models in the Hugging Face cache.

Owns the walk. Opens no file and knows no format: any regular file counts, each one once, however many links lead to it.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightlift.description import FileIdentity
from weightlift.errors import NotACheckpointError
from weightlift.formats.files import access_failure, file_status, shown_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_FIRST_IN_A_FOLDER: Final = "snapshots"
"""In a model's folder of the Hugging Face cache the links with real names lie here; blobs, named by hashes, follow."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A regular file that is not empty.

    Attributes:
        path: how it was reached; links are kept as they are named.
        identity: device, inode, size and time of modification of what is behind it.
    """

    path: Path
    identity: FileIdentity

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return self.identity.size_bytes


def find_files(paths: Sequence[str | os.PathLike[str]]) -> list[FoundFile]:
    """The files that paths stand for, in their order; in folders, sorted by name.

    Args:
        paths: files and folders. Folders are walked to the bottom, and links are followed.

    Raises:
        CheckpointNotFoundError: nothing is at one of the paths.
        AccessError: a folder may not be listed.
        NotACheckpointError: one of the paths is a pipe, socket or device.
        ReadError: the operating system refused for another reason.
    """
    found: dict[tuple[int, int], FoundFile] = {}
    folders: set[tuple[int, int]] = set()
    for path in map(Path, paths):
        status = file_status(path)
        if stat.S_ISDIR(status.st_mode):
            for inner in _walk(path, status, folders):
                _add(found, inner)
        elif stat.S_ISREG(status.st_mode):
            _add(found, path, status)
        else:
            raise NotACheckpointError(
                f"{shown_path(path)}: neither a file nor a folder", hint="name files or folders", path=path
            )
    return list(found.values())


def _add(found: dict[tuple[int, int], FoundFile], path: Path, status: os.stat_result | None = None) -> None:
    try:
        status = status or path.stat()
    except OSError:
        # A link to nothing, or a file that was removed meanwhile, holds no page.
        return
    if stat.S_ISREG(status.st_mode) and status.st_size:
        identity = FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        found.setdefault(identity[:2], FoundFile(path, identity))


def _walk(folder: Path, status: os.stat_result, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Everything in a folder and below; a folder that links lead to twice, or into itself, is walked once."""
    key = status.st_dev, status.st_ino
    if key in seen:
        return
    seen.add(key)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: (entry.name != _FIRST_IN_A_FOLDER, entry.name))
    except OSError as err:
        raise access_failure(folder, err) from err
    for entry in entries:
        path = folder / entry.name
        try:
            inner = path.stat()
        except OSError:
            continue
        if stat.S_ISDIR(inner.st_mode):
            yield from _walk(path, inner, seen)
        else:
            yield path
