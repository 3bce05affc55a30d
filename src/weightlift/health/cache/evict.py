"""Emptying the page cache of files, and finding out what stayed and why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from weightlift.errors import printable
from weightlift.host import kernel, residency, sweeping
from weightlift.host.processes import command_name, holders_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.health.cache.files import FoundFile

_NAMED_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class Eviction:
    """What became of one file.

    Attributes:
        file: the file.
        before_bytes: what was cached; ``None`` if unknown.
        after_bytes: what is cached now; ``None`` if unknown.
        reason: why something stayed, in words; empty if nothing to speak of did.
    """

    file: FoundFile
    before_bytes: int | None
    after_bytes: int | None
    reason: str

    @property
    def gone(self) -> bool:
        """Whether nothing to speak of is cached any more, as far as that was verified."""
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return {
            "path": str(self.file.path),
            "bytes": self.file.size_bytes,
            "before_bytes": self.before_bytes,
            "after_bytes": self.after_bytes,
            "gone": self.gone,
            "reason": self.reason or None,
        }


def evict(files: Sequence[FoundFile]) -> list[Eviction]:
    """Drop files from the page cache and look afterwards what is left.

    Pages not written out yet are written first. Of a file that this user neither owns nor may write the system tells
    nothing, so it is left alone.
    """
    return [_evict(file) for file in files]


def _evict(file: FoundFile) -> Eviction:
    try:
        descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as err:
        return Eviction(file, None, None, f"it cannot be opened ({os.strerror(err.errno or 0)})")
    try:
        return _evict_open(file, descriptor)
    finally:
        kernel.close_quickly(descriptor)


def _evict_open(file: FoundFile, descriptor: int) -> Eviction:
    size = file.size_bytes
    before = residency.residency(descriptor, size)
    if before is None:
        return Eviction(file, None, None, "left alone: it belongs to another user, or the system does not tell")
    try:
        if before:
            os.fsync(descriptor)
    except OSError as err:
        return Eviction(file, before, before, f"it could not be written out ({os.strerror(err.errno or 0)})")
    after = sweeping.sweep_until_settled(descriptor, [(0, size)])
    gone = after is not None and after <= sweeping.SWEPT_BYTES
    return Eviction(file, before, after, "" if gone else _why(file))


def _why(file: FoundFile) -> str:
    holders = holders_of(file.path)
    if not holders:
        return "the file system keeps its pages (tmpfs?), or another user's program has it mapped"
    names = [f"{printable(command_name(one) or '?', 20)} ({one})" for one in holders[:_NAMED_MAX]]
    more = f" and {len(holders) - _NAMED_MAX} more" if len(holders) > _NAMED_MAX else ""
    return f"it is mapped by {', '.join(names)}{more}: end it first"
