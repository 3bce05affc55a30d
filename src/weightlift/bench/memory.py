"""Looking at a measured process's memory from outside, kind by kind. Knows nothing of loads."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from weightlift.host.cgroup import read_text
from weightlift.host.memory import kilobyte_rows

KINDS: Final = ("RssAnon", "RssFile", "RssShmem", "VmLck", "VmPin")
"""Kinds of memory, as ``/proc/PID/status`` calls them: private, of mapped files, shared, locked, pinned by a driver."""


class Peaks(NamedTuple):
    """Growth of a process's memory at its peak, by kind, in bytes; ``None`` where the system does not tell."""

    anonymous_bytes: int | None = None
    file_bytes: int | None = None
    shared_bytes: int | None = None


def memory_by_kind(process_id: int) -> dict[str, int]:
    """Memory of a process in bytes by :data:`KINDS`; empty if it is gone, or where the system does not tell."""
    rows = kilobyte_rows(read_text(Path(f"/proc/{process_id}/status")) or "")
    return {kind: rows[kind] for kind in KINDS if kind in rows}


class MemoryWatch:
    """Peaks of a process's memory, as looked at from here on.

    Args:
        process_id: the process.

    Attributes:
        base: its memory by kind when the watch began.
        peak: the most that was seen of each kind.
    """

    def __init__(self, process_id: int) -> None:
        self._process_id = process_id
        self.base = memory_by_kind(process_id)
        self.peak = dict(self.base)

    def look(self) -> None:
        """Look once."""
        for kind, nbytes in memory_by_kind(self._process_id).items():
            self.peak[kind] = max(nbytes, self.peak.get(kind, 0))

    def peaks(self) -> Peaks:
        """Growth since the watch began."""
        kinds = ("RssAnon", "RssFile", "RssShmem")
        return Peaks(*(self.peak[kind] - self.base[kind] if kind in self.base else None for kind in kinds))
