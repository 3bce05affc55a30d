"""Filling the page cache with files, as fast as storage and within what memory has room for.

Uses the engines that loads use: several sequential readers of 8 to 64 MiB each, into slots that are used again. Asking
the kernel to read ahead instead (``posix_fadvise(WILLNEED)``) fetches no more than one read-ahead window a call and
drops the rest silently; see ``benchmarks/warm.py``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from weightlift.description import Shard
from weightlift.engines.probing import run_probes
from weightlift.errors import InsufficientMemoryError, ReadError
from weightlift.formats.columns import ShardContents, TensorColumns, join
from weightlift.formats.files import access_failure
from weightlift.health.cache.residency import FileResidency, residencies
from weightlift.host import kernel
from weightlift.host.groups import available_memory
from weightlift.host.residency import (
    BLOCK_GRANULES,
    Residency,
    count_together,
    may_see_residency,
    residency_map,
    whole_file,
)
from weightlift.host.sweeping import sweep_until_settled
from weightlift.operations import Sink
from weightlift.options import LoadOptions
from weightlift.pipeline import Transfer
from weightlift.plan import GRANULE_BYTES, Wanted
from weightlift.reach import Reach
from weightlift.targets.null import NullTarget
from weightlift.types import CachePolicy, Method
from weightlift.units import MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightlift.description import Description
    from weightlift.health.cache.files import FoundFile

Range = tuple[int, int]
"""Offset and length in bytes."""

_FILES_AT_ONCE: Final = 256
_RESERVE_SHARE: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmResult:
    """What warming did.

    Attributes:
        before: the files as they were.
        after: the files as they are now.
        read_bytes: what was read from storage.
        room_bytes: what could be warmed at most: the budget, or what memory had room for; ``None`` if unknown.
        bound: what kept it from warming everything: ``"budget"``, ``"memory"``, or an empty string.
    """

    before: tuple[FileResidency, ...]
    after: tuple[FileResidency, ...]
    read_bytes: int
    room_bytes: int | None
    bound: str

    def to_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return {
            "files": [entry.to_json() for entry in self.after],
            "read_bytes": self.read_bytes,
            "room_bytes": self.room_bytes,
            "bound": self.bound or None,
        }


class _NoRoom(Exception):  # noqa: N818 - how the end of the room gets out of a running transfer
    """What was warmed would begin to push itself out again."""


class _RangesTarget(NullTarget):
    """Reads given ranges and discards them: what stays is in the page cache."""

    def __init__(self, description: Description, wanted: Sequence[Wanted]) -> None:
        super().__init__(description, ())
        self._wanted = wanted

    def prepare(self) -> Sequence[Wanted]:
        """See :class:`~weightlift.targets.base.Target`."""
        return self._wanted


def spare_memory() -> int | None:
    """How much may be warmed without pushing out anything but other page cache; ``None`` if unknown."""
    machine = available_memory()
    return None if machine is None else max(0, machine.available_bytes - machine.total_bytes // _RESERVE_SHARE)


def within(ranges: Sequence[Range], room_bytes: int) -> list[Range]:
    """The first of the ranges, as many and as much as there is room for, to a granule's precision."""
    taken: list[Range] = []
    left = room_bytes
    for offset, length in ranges:
        part = length if length <= left else left - left % GRANULE_BYTES
        if part > 0:
            taken.append((offset, part))
        left -= part
        if part < length:
            break
    return taken


def beyond(ranges: Sequence[Range], taken: Sequence[Range]) -> list[Range]:
    """What :func:`within` left of the ranges."""
    if not taken:
        return list(ranges)
    (offset, length), (_, whole) = taken[-1], ranges[len(taken) - 1]
    rest = [(offset + length, whole - length)] if length < whole else []
    return [*rest, *ranges[len(taken) :]]


def warm(
    files: Sequence[FoundFile],
    *,
    budget_bytes: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    spare: Callable[[], int | None] = spare_memory,
) -> WarmResult:
    """Read what is not cached of files, in their order, until all is cached or there is no more room.

    Args:
        files: what to warm.
        budget_bytes: most bytes to read; without one, what memory has room for.
        workers: threads that read; found while reading if left out.
        progress: called now and then with bytes read and bytes to read.
        spare: how much may be warmed; asked again while reading.

    Raises:
        InsufficientMemoryError: memory has no room to warm anything.
        WeightliftError: a file cannot be read.
    """
    before = residencies(files)
    spared = spare()
    rooms = [room for room in (budget_bytes, spared) if room is not None]
    room = min(rooms, default=None)
    missing = [_absent(file) for file in files]
    wanted_bytes = sum(length for ranges in missing for _, length in ranges)
    chosen = _chosen(missing, room)
    reader = _Reader(sum(length for ranges in chosen for _, length in ranges), spare, progress)
    if spared is not None and spared < GRANULE_BYTES <= wanted_bytes:
        raise InsufficientMemoryError(
            f"nothing can be warmed: {format_bytes(wanted_bytes)} are wanted and memory has room for "
            f"{format_bytes(spared)} more",
            hint="close programs, or raise the limit of the control group",
        )
    complete = reader.read(files, chosen, workers)
    for file, ranges, taken in zip(files, missing, chosen, strict=True):
        _drop(file, beyond(ranges, taken))
    bound = "" if complete and reader.total_bytes == wanted_bytes else "memory"
    if complete and bound and budget_bytes is not None and (spared is None or budget_bytes <= spared):
        bound = "budget"
    return WarmResult(
        before=tuple(before),
        after=tuple(residencies(files)),
        read_bytes=reader.read_bytes,
        room_bytes=room,
        bound=bound,
    )


def _absent(file: FoundFile) -> list[Range]:
    """What is not cached of a file; all of it where that cannot be known."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as err:
        raise access_failure(file.path, err) from err
    try:
        files = [(descriptor, whole_file(file.size_bytes))]
        (blocks,), _ = count_together(files, BLOCK_GRANULES * GRANULE_BYTES, run_probes)
        cached = residency_map(descriptor, file.size_bytes, GRANULE_BYTES, blocks)
    finally:
        kernel.close_quickly(descriptor)
    if cached is None:
        return [(0, file.size_bytes)]
    return [(run.offset, run.length) for run in cached.runs() if run.state is not Residency.RESIDENT]


def _drop(file: FoundFile, ranges: Sequence[Range]) -> None:
    """Drop again what read-ahead has fetched beyond what there was room for."""
    if not ranges:
        return
    try:
        descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as err:
        raise access_failure(file.path, err) from err
    try:
        if may_see_residency(descriptor):
            sweep_until_settled(descriptor, ranges)
    finally:
        kernel.close_quickly(descriptor)


def _chosen(missing: Sequence[Sequence[Range]], room_bytes: int | None) -> list[list[Range]]:
    chosen: list[list[Range]] = []
    left = room_bytes
    for ranges in missing:
        taken = list(ranges) if left is None else within(ranges, left)
        if left is not None:
            left -= sum(length for _, length in ranges)
            left = max(left, 0)
        chosen.append(taken)
    return chosen


class _Reader:
    """Reads batches of files, and stops when what it has read would push itself out."""

    def __init__(
        self, total_bytes: int, spare: Callable[[], int | None], progress: Callable[[int, int], None] | None
    ) -> None:
        self.total_bytes = total_bytes
        self.read_bytes = 0
        self._spare = spare
        self._progress = progress

    def read(self, files: Sequence[FoundFile], chosen: Sequence[Sequence[Range]], workers: int | None) -> bool:
        """Read; returns whether everything chosen was read."""
        pairs = [(file, ranges) for file, ranges in zip(files, chosen, strict=True) if ranges]
        try:
            for first in range(0, len(pairs), _FILES_AT_ONCE):
                self._batch(pairs[first : first + _FILES_AT_ONCE], workers)
        except _NoRoom:
            return False
        except ReadError as err:
            raise _without_tensor(err) from err
        return True

    def _batch(self, pairs: Sequence[tuple[FoundFile, Sequence[Range]]], workers: int | None) -> None:
        contents = [ShardContents(Shard(file.path, file.identity, 0, {}), TensorColumns()) for file, _ in pairs]
        description = join(contents, ())
        wanted = list(_wanted(pairs))
        done = self.read_bytes
        options = LoadOptions(
            method=Method.BUFFERED,
            cache=CachePolicy.KEEP,
            device="null",
            workers=workers,
            progress=lambda landed, _: self._look(done + landed),
        )
        reach = Reach(range(len(pairs)), {})
        transfer = Transfer(description, reach, options, destination_bytes=0, look_at_cache=False)
        with transfer.aborting():
            transfer.run(_RangesTarget(description, wanted))
            transfer.finish()
        self.read_bytes = done + sum(want.length for want in wanted)

    def _look(self, read_bytes: int) -> None:
        self.read_bytes = read_bytes
        if self._progress is not None:
            self._progress(read_bytes, self.total_bytes)
        spare = self._spare()
        # What was read counts as spare itself, since the kernel could drop it again; it must all have room there.
        if spare is not None and read_bytes > spare + MIB:
            raise _NoRoom


def _wanted(pairs: Sequence[tuple[FoundFile, Sequence[Range]]]) -> Iterator[Wanted]:
    for index, (_, ranges) in enumerate(pairs):
        for offset, length in ranges:
            yield Wanted(index, offset, length, Sink.DISCARD)


def _without_tensor(err: ReadError) -> ReadError:
    """The same error without the words about tensors, which these files need not have."""
    error = ReadError(
        f"{err.path}: reading at byte {err.offset or 0:,} failed: {os.strerror(err.errno or 0)}",
        hint="look at dmesg and at the health of the drive or of the connection",
        path=err.path,
        offset=err.offset,
        length=err.length,
    )
    error.errno = err.errno
    return error
