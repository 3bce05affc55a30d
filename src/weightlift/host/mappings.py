"""What a process has mapped, from ``/proc/PID/smaps``: which mapping holds how much memory, and of which kind.

Owns the parsing and the adding up of mappings that are alike. Judges nothing.

Pages of a private mapping of a file start out as pages of the file, which the kernel drops at will. The first write
to one, or a driver that asks for write access, turns it into an anonymous page, which only swap can take back. The
field ``Anonymous`` of a file's mapping counts exactly those.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_HEAD: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+) *(.*)")
_FIELDS: Final = ("Rss", "Anonymous", "Swap")
_DELETED: Final = " (deleted)"
_SHARED_MEMORY: Final = ("/dev/shm/", "/memfd:", "/SYSV", "/dev/zero", "[anon_shmem")  # noqa: S108 - names to recognise, not to use
_DEVICES: Final = "/dev/"


class MappingKind(enum.Enum):
    """What a mapping is backed by."""

    FILE = "file"
    ANONYMOUS = "anonymous"
    SHARED_MEMORY = "shared memory"
    DEVICE = "device"


class MappingKey(NamedTuple):
    """What mappings have in common that are counted together.

    Attributes:
        name: the file's path, the kernel's or the program's name for it as ``[stack]``, or an empty string.
        kind: what backs it.
        private: writes stay in the process (copy-on-write).
        writable: the process may write to it.
    """

    name: str
    kind: MappingKind
    private: bool
    writable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingUse:
    """Memory of all mappings with the same key, in bytes.

    Attributes:
        mapped_bytes: address space.
        resident_bytes: in memory, of any kind.
        anonymous_bytes: in memory and no longer, or never, a page of a file.
        swapped_bytes: in swap.
        file: device and inode as the kernel shows them, empty if there is no file.
    """

    mapped_bytes: int = 0
    resident_bytes: int = 0
    anonymous_bytes: int = 0
    swapped_bytes: int = 0
    file: tuple[str, int] = ("", 0)

    def __add__(self, other: MappingUse) -> MappingUse:
        return MappingUse(
            mapped_bytes=self.mapped_bytes + other.mapped_bytes,
            resident_bytes=self.resident_bytes + other.resident_bytes,
            anonymous_bytes=self.anonymous_bytes + other.anonymous_bytes,
            swapped_bytes=self.swapped_bytes + other.swapped_bytes,
            file=self.file if self.file[1] else other.file,
        )

    @property
    def lasting_bytes(self) -> int:
        """What only swap can take back, or has taken."""
        return self.anonymous_bytes + self.swapped_bytes


Mappings = dict[MappingKey, MappingUse]


def parse_smaps(text: str) -> Mappings:
    """Add up a process's mappings by what they map.

    Args:
        text: contents of ``/proc/PID/smaps``. Lines that are not understood are passed over.
    """
    found: Mappings = {}
    for key, use in _entries(text.splitlines()):
        found[key] = found[key] + use if key in found else use
    return found


def mappings_of(process_id: int, root: Path = Path("/")) -> Mappings | None:
    """The mappings of a process; ``None`` if it is gone or belongs to another user.

    The kernel walks the page tables for it, some tens of milliseconds for tens of gigabytes.
    """
    try:
        text = (root / f"proc/{process_id}/smaps").read_text(encoding="utf-8", errors="backslashreplace")
    except OSError:
        return None
    return parse_smaps(text)


def joined(parts: Iterable[Mappings]) -> Mappings:
    """The mappings of several processes together; shared pages count in each of them."""
    total: Mappings = {}
    for part in parts:
        for key, use in part.items():
            total[key] = total[key] + use if key in total else use
    return total


def _entries(lines: Iterable[str]) -> Iterator[tuple[MappingKey, MappingUse]]:
    head: re.Match[str] | None = None
    sizes: dict[str, int] = {}
    for line in lines:
        begin = _HEAD.fullmatch(line) if line[:1] in "0123456789abcdef" else None
        if begin:
            if head:
                yield _entry(head, sizes)
            head, sizes = begin, {}
            continue
        name, _, value = line.partition(":")
        if name in _FIELDS and value.endswith("kB"):
            sizes[name] = int(value[:-2]) * 1024
    if head:
        yield _entry(head, sizes)


def _entry(head: re.Match[str], sizes: Mapping[str, int]) -> tuple[MappingKey, MappingUse]:
    start, end, rights, _, device, inode, path = head.groups()
    key = MappingKey(*_name_and_kind(path, int(inode)), private=rights[3] == "p", writable=rights[1] == "w")
    return key, MappingUse(
        mapped_bytes=int(end, 16) - int(start, 16),
        resident_bytes=sizes.get("Rss", 0),
        anonymous_bytes=sizes.get("Anonymous", 0),
        swapped_bytes=sizes.get("Swap", 0),
        file=(device, int(inode)),
    )


def _name_and_kind(path: str, inode: int) -> tuple[str, MappingKind]:
    if path.startswith(_SHARED_MEMORY):
        return path.removesuffix(_DELETED), MappingKind.SHARED_MEMORY
    if path.startswith(_DEVICES):
        return path, MappingKind.DEVICE
    if inode and path.startswith("/"):
        return path.removesuffix(_DELETED), MappingKind.FILE
    # The heap is anonymous memory like any other that an allocator asked for.
    return "" if path in {"", "[heap]"} else path, MappingKind.ANONYMOUS
