"""Which page cache of a command's files is no longer needed. Pure functions over what was seen open and mapped.

Only files of 32 MiB or more count. A program that has closed and unmapped a file has done with it; one that reads it
from front to back has done with what lies behind its position. Of a file that is still mapped nothing is known, so it
is dropped only when memory is short; pages that a process has in its page tables stay even then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from weightlift.host.mappings import MappingKind
from weightlift.units import MIB, align_down

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from weightlift.host.mappings import Mappings
    from weightlift.host.processes import OpenDescriptor

FILE_BYTES_MIN: Final = 32 * MIB
_MARGIN_BYTES: Final = 16 * MIB
"""What stays behind a position: a program may look at what it has just read once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenFile:
    """A large file that the command has, or had, open or mapped.

    Attributes:
        path: where it is.
        inode: its inode, by which it is known again.
        size_bytes: its size; for a file that is only mapped, of what is mapped.
        positions: of every descriptor that is open now.
        mapped: whether a process has it mapped now.
    """

    path: str
    inode: int
    size_bytes: int
    positions: tuple[int, ...] = ()
    mapped: bool = False


Seen = dict[str, SeenFile]


def see(before: Mapping[str, SeenFile], descriptors: Iterable[OpenDescriptor], mappings: Mappings) -> Seen:
    """What is known of the command's large files now.

    Args:
        before: what was known; files that are neither open nor mapped any more stay in it.
        descriptors: every large file that its processes have open.
        mappings: what they have mapped.
    """
    seen = {path: replace(file, positions=(), mapped=False) for path, file in before.items()}
    for entry in descriptors:
        file = seen.get(entry.path)
        if file is None or file.inode != entry.inode:
            file = SeenFile(path=entry.path, inode=entry.inode, size_bytes=entry.size_bytes)
        seen[entry.path] = replace(
            file, size_bytes=max(file.size_bytes, entry.size_bytes), positions=(*file.positions, entry.position)
        )
    for key, use in mappings.items():
        if key.kind is MappingKind.FILE and use.mapped_bytes >= FILE_BYTES_MIN:
            file = seen.get(key.name)
            if file is None or file.inode != use.file[1]:
                file = SeenFile(path=key.name, inode=use.file[1], size_bytes=use.mapped_bytes)
            seen[key.name] = replace(file, mapped=True)
    return seen


def droppable(file: SeenFile, *, everything: bool) -> tuple[int, int] | None:
    """Offset and length of the page cache of a file that may go; a length of 0 means up to its end.

    Args:
        file: what is known of it.
        everything: memory is short: also what may be read once more.
    """
    if everything or not (file.positions or file.mapped):
        return 0, 0
    if file.mapped:
        return None
    behind = align_down(min(file.positions) - _MARGIN_BYTES, MIB)
    return (0, behind) if behind > 0 else None


def most_read(now: Mapping[str, SeenFile], before: Mapping[str, SeenFile]) -> SeenFile | None:
    """The file whose positions went on furthest between two looks; ``None`` if none did."""
    went = {path: _furthest(file) - _furthest(before.get(path)) for path, file in now.items()}
    path = max(went, key=went.__getitem__, default=None)
    return now[path] if path is not None and went[path] > 0 else None


def _furthest(file: SeenFile | None) -> int:
    return max(file.positions, default=0) if file is not None else 0
