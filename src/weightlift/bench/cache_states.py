"""The page cache of the model's own files: cold or warm before a load, verified, and as it was found at the end.

Touches no other file's cache, and drops nothing where it was told not to. Where the system does not say what is cached
of the files, cold is not offered at all, since it could not be verified.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weightlift.errors import InsufficientMemoryError
from weightlift.health.cache.evict import evict
from weightlift.health.cache.warm import spare_memory, warm
from weightlift.host import kernel, residency, sweeping
from weightlift.plan import GRANULE_BYTES
from weightlift.units import MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightlift.health.cache.files import FoundFile

COLD_SHARE_MAX: Final = 0.005
"""Part of the files that may be cached before a load that counts as cold."""

WARM_SHARE_MIN: Final = 0.995
"""Part of the files that must be cached before a load that counts as warm."""

_WARMINGS_MAX: Final = 5
_READ_BYTES: Final = 4 * MIB

Ranges = list[tuple[int, int]]


class StateNotReached(Exception):  # noqa: N818 - a state of the machine; the message says why
    """The page cache could not be brought into the state that a run would claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What became of the page cache in the end.

    Attributes:
        before_bytes: cached bytes of the files before anything was measured; ``None`` if the system does not tell.
        after_bytes: the same at the end.
        note: what was not put back and why; empty if everything was.
    """

    before_bytes: int | None
    after_bytes: int | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the page cache held of the files at one moment, to the page.

    Attributes:
        absent: offset and length of what it did not hold, file by file.
        cached_bytes: how much it held; ``None`` if the system does not tell.
    """

    absent: Sequence[Ranges]
    cached_bytes: int | None


class ModelFiles:
    """The files under measurement.

    Args:
        files: all of them.
        may_drop: whether they may be dropped from the page cache.
        brought_in: ranges that reading their headers brought in, file by file; not to stay at the end.
    """

    def __init__(
        self, files: Sequence[FoundFile], *, may_drop: bool = True, brought_in: Sequence[Ranges] | None = None
    ) -> None:
        self.files = files
        self.total_bytes = sum(file.size_bytes for file in files)
        self._may_drop = may_drop
        self._before = self.snapshot(brought_in)

    def snapshot(self, brought_in: Sequence[Ranges] | None = None) -> Snapshot:
        """Look at every page.

        Args:
            brought_in: ranges that count as if they were not there, file by file.
        """
        known = self.cached_bytes() is not None
        more = [[] for _ in self.files] if brought_in is None else brought_in
        absent = [_absent(file, ranges) for file, ranges in zip(self.files, more, strict=True)]
        absent_bytes = sum(length for ranges in absent for _, length in ranges)
        return Snapshot(absent, self.total_bytes - absent_bytes if known else None)

    def added_bytes(self, before: Snapshot) -> int | None:
        """How much is cached now of what was not then; ``None`` if the system does not tell."""
        total = 0
        for file, absent in zip(self.files, before.absent, strict=True):
            with _opened(file) as descriptor:
                cached = residency.cached_in(descriptor, absent)
            if cached is None:
                return None
            total += cached
        return total

    def cached_bytes(self) -> int | None:
        """What the page cache holds of all files; ``None`` if the system does not tell."""
        total = 0
        for file in self.files:
            with _opened(file) as descriptor:
                cached = residency.residency(descriptor, file.size_bytes)
            if cached is None:
                return None
            total += cached
        return total

    def why_not_cold(self) -> str:
        """Why cold loads cannot be measured; empty if they can. Tries it."""
        if not self._may_drop:
            return "the files were not to be dropped from the page cache"
        if self._before.cached_bytes is None:
            if sys.platform != "linux":
                return "this system does not tell what its page cache holds, so that cold could not be verified"
            return (
                "the kernel tells what is cached only of files that you own or may write, so that cold could not be "
                "verified"
            )
        try:
            self.make_cold()
        except StateNotReached as err:
            return str(err)
        return ""

    def make_cold(self) -> None:
        """Write the files out, drop them, and look.

        Raises:
            StateNotReached: something stayed.
        """
        stayed = [result for result in evict(self.files) if not result.gone]
        if stayed:
            raise StateNotReached(f"{stayed[0].file.path.name} stayed in the page cache: {stayed[0].reason}")
        self.check_cold()

    def check_cold(self) -> None:
        """Look whether nothing to speak of is cached.

        Raises:
            StateNotReached: something is.
        """
        cached = self.cached_bytes()
        if cached is None or cached > COLD_SHARE_MAX * self.total_bytes:
            left = "an unknown part" if cached is None else format_bytes(cached)
            raise StateNotReached(f"{left} of the files is in the page cache again")

    def make_warm(self) -> bool:
        """Read what is not cached; returns whether the system confirms that all is.

        Raises:
            StateNotReached: memory has no room for the files.
        """
        # Pages that an earlier load marked to be dropped behind it may still go after they were read once more.
        for _ in range(_WARMINGS_MAX):
            if self._is_warm():
                return True
            try:
                warm(self.files)
            except InsufficientMemoryError as err:
                raise StateNotReached(f"the files cannot be kept in the page cache: {err.message}") from err
            if self.cached_bytes() is None:
                return False
        if self._is_warm():
            return True
        raise StateNotReached(
            f"memory has no room to keep {format_bytes(self.total_bytes)} in the page cache"
            f" ({format_bytes(self.cached_bytes() or 0)} stayed)"
        )

    def check_warm(self) -> None:
        """Look whether all is still cached, as far as the system tells.

        Raises:
            StateNotReached: something was dropped.
        """
        if not self._is_warm() and self.cached_bytes() is not None:
            raise StateNotReached("files were pushed out of the page cache: too little memory is free")

    def _is_warm(self) -> bool:
        cached = self.cached_bytes()
        return cached is not None and cached >= WARM_SHARE_MIN * self.total_bytes

    def restore(self, *, read_again: bool) -> Restored:
        """Drop what was not cached before, and read again what was.

        Args:
            read_again: whether there is time for that.
        """
        before = self._before.cached_bytes
        if before is None:
            return Restored(
                before_bytes=None,
                after_bytes=None,
                note="what it held of the files before is unknown, so nothing was dropped",
            )
        notes: list[str] = []
        if not self._may_drop:
            after = self.cached_bytes()
            note = "nothing was dropped, so what was read stayed" if (after or 0) > before else ""
            return Restored(before_bytes=before, after_bytes=after, note=note)
        for file, absent in zip(self.files, self._before.absent, strict=True):
            try:
                with _opened(file) as descriptor:
                    if read_again:
                        notes.append(_read_again(descriptor, file.size_bytes, absent))
                    sweeping.sweep_until_settled(descriptor, absent)
            except OSError as err:
                notes.append(f"{file.path.name}: {err.strerror or err}")
        try:
            after = self.cached_bytes()
        except OSError:
            after = None
        why = next(filter(None, notes), "" if read_again else "there was no time to read them again")
        lost = "" if after is None else self._lost(before, after)
        note = "; ".join(filter(None, (lost, why if lost or after is None else "")))
        return Restored(before_bytes=before, after_bytes=after, note=note)

    def _lost(self, before: int, after: int) -> str:
        if after >= before - COLD_SHARE_MAX * self.total_bytes:
            return ""
        return f"{format_bytes(before - after)} that were cached before are not any more"


@contextlib.contextmanager
def _opened(file: FoundFile) -> Iterator[int]:
    descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    try:
        yield descriptor
    finally:
        kernel.close_quickly(descriptor)


def _absent(file: FoundFile, brought_in: Ranges) -> Ranges:
    """What is not cached of a file, counting what reading its header brought in as if it were not."""
    with _opened(file) as descriptor:
        cached = residency.residency_map(descriptor, file.size_bytes, GRANULE_BYTES)
        if cached is None:
            return []
        ranges = residency.united([*residency.absent_ranges(descriptor, cached), *brought_in])
        # What a header's pages cover may reach beyond the end of a small file.
        return [(offset, min(length, file.size_bytes - offset)) for offset, length in ranges]


def _read_again(descriptor: int, size: int, absent: Ranges) -> str:
    """Read all but some ranges; returns why that was not done, if it was not."""
    wanted = sum(length for _, length in _between(absent, size))
    spare = spare_memory()
    if spare is not None and wanted > spare:
        return "memory has no room for it now"
    # Read-ahead would bring in what is to stay absent.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    for offset, length in _between(absent, size):
        for start in range(offset, offset + length, _READ_BYTES):
            os.pread(descriptor, min(_READ_BYTES, offset + length - start), start)
    return ""


def _between(absent: Ranges, size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that some ranges leave."""
    position = 0
    for offset, length in [*absent, (size, 0)]:
        if offset > position:
            yield position, offset - position
        position = offset + length
