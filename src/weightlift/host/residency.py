"""What the page cache holds of a file.

Owns looking (cachestat, and mincore where that may be believed) and the record of what was absent. Knows nothing of
checkpoints, chunks or plans.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from enum import IntEnum
from itertools import compress, islice
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec import Struct

from weightlift.host import kernel
from weightlift.host.probes import Probe
from weightlift.ranges import joined
from weightlift.units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from weightlift.host.probes import RunProbes

BLOCK_GRANULES: Final = 16
"""How many granules :func:`residency_map` looks at together first."""

_PIECES: Final = 64
"""How many pieces files are counted in together first."""

_VECTOR_WINDOW_BYTES: Final = 1 << 30


class Residency(IntEnum):
    """How much of a file range the page cache holds; ``UNSEEN`` where nobody looked."""

    ABSENT = 0
    PARTIAL = 1
    RESIDENT = 2
    UNSEEN = 3


Part = tuple[int, int]
"""Offset and length in bytes of a part of a file."""


class ResidencyRun(NamedTuple):
    """A range of a file whose granules are alike."""

    offset: int
    length: int
    state: Residency


class ResidencyMap(Struct, frozen=True):
    """What the page cache held of a file at one moment, granule by granule.

    Attributes:
        granule_bytes: the resolution.
        size_bytes: the file's size.
        cached_bytes: how much of what was looked at was cached.
    """

    granule_bytes: int
    size_bytes: int
    cached_bytes: int
    _runs: tuple[ResidencyRun, ...]

    @property
    def looked_bytes(self) -> int:
        """How much of the file was looked at."""
        return self.size_bytes - sum(run.length for run in self._runs if run.state is Residency.UNSEEN)

    def runs(self) -> list[ResidencyRun]:
        """Maximal runs of granules in the same state, in file order, covering the file without gaps."""
        return list(self._runs)

    def state(self, offset: int, length: int) -> Residency:
        """The state of a range; ``PARTIAL`` also where it crosses runs of different states.

        Args:
            offset: start in bytes, inside the file.
            length: length in bytes, more than 0.
        """
        index = bisect_right(self._runs, offset, key=lambda run: run.offset) - 1
        run = self._runs[index]
        # Neighbouring runs always differ, so a range that leaves its run is a mixture.
        return run.state if offset + length <= run.offset + run.length else Residency.PARTIAL


def may_see_residency(fd: int) -> bool:
    """Whether ``mincore`` tells this user the truth about a file: it is theirs, or they may write it."""
    if sys.platform != "linux":
        return False
    if os.fstat(fd).st_uid == os.geteuid():
        return True
    return os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True)


def _cached_bytes(fd: int, offset: int, length: int) -> int | None:
    """Cached bytes of a range that starts at a page boundary; ``None`` if the system will not tell."""
    try:
        stat = kernel.cachestat(fd, offset, length)
        if stat is not None:
            return min(stat.cached * kernel.PAGE_SIZE, length)
        if not may_see_residency(fd):
            return None
        pages = 0
        for start in range(offset, offset + length, _VECTOR_WINDOW_BYTES):
            vector = kernel.resident_pages(fd, start, min(_VECTOR_WINDOW_BYTES, offset + length - start))
            if vector is None:
                return None
            pages += sum(vector)
        return min(pages * kernel.PAGE_SIZE, length)
    except OSError:
        # EPERM above all: the user may not know. Asking mincore instead would be told that everything is resident.
        return None


def residency(fd: int, size_bytes: int) -> int | None:
    """How much of a file the page cache holds, in bytes; ``None`` if the system will not tell.

    Args:
        fd: a file open for reading.
        size_bytes: its size.
    """
    return _cached_bytes(fd, 0, size_bytes) if size_bytes else 0


def whole_file(size_bytes: int) -> list[Part]:
    """A file as one part; an empty one has none."""
    return [(0, size_bytes)] if size_bytes else []


def count_together(
    files: Sequence[tuple[int, Sequence[Part]]], step: int, ask: RunProbes, trials: Sequence[Probe] = ()
) -> tuple[list[list[int | None]], list[int]]:
    """Cached bytes of parts of files, step by step, asked together with trial reads.

    Where there are very many steps, pieces of many are counted first, and only mixed ones step by step: asking takes
    the caller longer than the kernel takes to look once more.

    Args:
        files: descriptor of each, and its parts, which start at page boundaries.
        step: bytes per count, a multiple of the page size.
        ask: how to ask.
        trials: reads to ask for in the same go.

    Returns:
        For each file what :func:`count_cached` gives for its parts, and the answers to the trials.
    """
    size = piece_bytes(total_bytes(files), step)
    pieces = [[Probe(fd, *piece) for piece in _steps(parts, size)] for fd, parts in files]
    probes = [probe for found in pieces for probe in found]
    answers = ask([*trials, *probes]) if probes or trials else []
    counted = _closer(probes, answers[len(trials) :], step, ask)
    counts: list[list[int | None]] = []
    for (fd, parts), found in zip(files, pieces, strict=True):
        own = [count for _ in found for count in next(counted)]
        if None in own:
            # The kernel lacks the call or refuses; what else may be believed is known there.
            own = [count for part in parts for count in count_cached(fd, *part, step)]
        counts.append(own)
    return counts, answers[: len(trials)]


def total_bytes(files: Iterable[tuple[int, Iterable[Part]]]) -> int:
    """Bytes of all parts of files."""
    return sum(length for _, parts in files for _, length in parts)


def piece_bytes(nbytes: int, least_bytes: int) -> int:
    """Size of the pieces in which so many bytes are counted in one go: a multiple of the least, and not very many."""
    return least_bytes if nbytes <= _PIECES * least_bytes else align_up(nbytes // _PIECES, least_bytes)


def _closer(probes: Sequence[Probe], pages: Sequence[int], step: int, ask: RunProbes) -> Iterator[list[int | None]]:
    """The counts of each piece's steps, asked for again where the piece is cached in part."""
    told = list(zip(probes, pages, strict=True))
    split = [probe.length > step and 0 < n * kernel.PAGE_SIZE < probe.length for probe, n in told]
    finer = [Probe(probe.fd, *part) for probe in compress(probes, split) for part in _steps([probe[1:3]], step)]
    found = iter(zip(finer, ask(finer), strict=True)) if finer else iter(())
    for (probe, n), again in zip(told, split, strict=True):
        steps = islice(found, -(-probe.length // step) if again else 0)
        yield [_bytes_of(m, part.length) for part, m in steps] or _evenly(probe.length, n, step)


def _bytes_of(pages: int, length: int) -> int | None:
    """What an answer says of a range, in bytes; ``None`` for an error."""
    return None if pages < 0 else min(pages * kernel.PAGE_SIZE, length)


def _evenly(length: int, pages: int, step: int) -> list[int | None]:
    """The counts of a piece's steps, where all of it is cached or nothing, or it is one step."""
    cached = _bytes_of(pages, length)
    if cached is None or length <= step:
        return [cached]
    whole, rest = divmod(length, step)
    steps: list[int | None] = [step if cached else 0] * whole
    return steps + [rest if cached else 0] * (rest > 0)


def _steps(parts: Iterable[Part], step: int) -> Iterator[Part]:
    """Parts cut into steps."""
    for offset, length in parts:
        for start in range(offset, offset + length, step):
            yield start, min(step, offset + length - start)


def _judge(cached_bytes: int, length: int) -> Residency:
    if cached_bytes == 0:
        return Residency.ABSENT
    return Residency.RESIDENT if cached_bytes >= length else Residency.PARTIAL


def residency_map(
    fd: int,
    size_bytes: int,
    granule_bytes: int,
    blocks: Sequence[int | None] | None = None,
    parts: Sequence[Part] | None = None,
) -> ResidencyMap | None:
    """Record what the page cache holds of a file.

    The file is looked at in blocks of 16 granules, and only mixed blocks granule by granule: a call takes some 2 µs
    where nothing is cached and time in proportion to the pages found elsewhere, so that a cold or a warm file is walked
    once, where halving would walk the cached pages of a mixed file once per level.

    Args:
        fd: a file open for reading.
        size_bytes: its size.
        granule_bytes: resolution, a multiple of the page size.
        blocks: cached bytes of the parts' blocks, if they have been counted already.
        parts: what to look at, in file order, each from a multiple of the resolution on; ``None`` for all of it.

    Returns:
        The map, or ``None`` if the system will not tell.
    """
    assert granule_bytes > 0, granule_bytes
    assert granule_bytes % kernel.PAGE_SIZE == 0, granule_bytes
    looked = whole_file(size_bytes) if parts is None else parts
    block_bytes = granule_bytes * BLOCK_GRANULES
    counts = [_cached_bytes(fd, *step) for step in _steps(looked, block_bytes)] if blocks is None else blocks
    if None in counts:
        return None
    cached, total = sum(count or 0 for count in counts), sum(length for _, length in looked)
    runs: list[ResidencyRun] = []
    if cached in {0, total}:
        runs = [ResidencyRun(*part, _judge(cached, total)) for part in looked]
    else:
        cached = 0
        for (start, length), count in zip(_steps(looked, block_bytes), counts, strict=True):
            pieces = [count or 0]
            if _judge(pieces[0], length) is Residency.PARTIAL:
                pieces = [piece or 0 for piece in count_cached(fd, start, length, granule_bytes)]
            cached += sum(pieces)
            runs.extend(_runs_of(pieces, start, length, granule_bytes if len(pieces) > 1 else length))
    return ResidencyMap(granule_bytes, size_bytes, cached, tuple(_merged(_with_gaps(runs, size_bytes))))


def _with_gaps(runs: Iterable[ResidencyRun], size_bytes: int) -> Iterator[ResidencyRun]:
    """Runs that cover the whole file, with what lies between them as unseen."""
    end = 0
    for run in runs:
        if run.offset > end:
            yield ResidencyRun(end, run.offset - end, Residency.UNSEEN)
        yield run
        end = run.offset + run.length
    if end < size_bytes:
        yield ResidencyRun(end, size_bytes - end, Residency.UNSEEN)


def _runs_of(counts: Iterable[int], offset: int, length: int, step: int) -> Iterator[ResidencyRun]:
    for index, cached in enumerate(counts):
        start = index * step
        size = min(step, length - start)
        yield ResidencyRun(offset + start, size, _judge(cached, size))


def count_cached(fd: int, offset: int, length: int, step: int) -> list[int | None]:
    """Cached bytes of a file range, step by step; ``None`` where the system will not tell.

    Args:
        fd: a file open for reading.
        offset: start of the range in bytes, at a page boundary.
        length: its length in bytes.
        step: bytes per count, a multiple of the page size.
    """
    end = offset + length
    return [_cached_bytes(fd, start, min(step, end - start)) for start in range(offset, end, step)]


def _merged(pieces: Iterable[ResidencyRun]) -> Iterator[ResidencyRun]:
    """Join neighbouring runs of the same state."""
    return joined(pieces, _both)


def _both(one: ResidencyRun, other: ResidencyRun) -> ResidencyRun | None:
    return one._replace(length=one.length + other.length) if one.state is other.state else None


def absent_ranges(fd: int, cached: ResidencyMap) -> list[tuple[int, int]]:
    """The exact ranges of a file that are not cached, to be swept after a load that shall leave no trace.

    Granules found absent are taken as they were recorded; those found partial are looked at page by page now, so call
    this right after recording and before the first read. Pages whose state cannot be found out count as cached.

    Returns:
        Offset and length in bytes of each maximal range, in file order.
    """
    exact: list[ResidencyRun] = []
    for run in cached.runs():
        if run.state is not Residency.PARTIAL:
            exact.append(run)
            continue
        exact.extend(_page_runs(fd, run.offset, run.length))
    return [(run.offset, run.length) for run in _merged(exact) if run.state is Residency.ABSENT]


def absent_in(fd: int, offset: int, length: int) -> list[tuple[int, int]] | None:
    """The exact ranges of the pages under a part of a file that are not cached; ``None`` if the system will not tell.

    Args:
        fd: a file open for reading.
        offset: start of the part in bytes.
        length: its length in bytes.
    """
    if not length:
        return []
    start = align_down(offset, kernel.PAGE_SIZE)
    length = align_up(offset + length, kernel.PAGE_SIZE) - start
    cached = _cached_bytes(fd, start, length)
    if cached is None:
        return None
    if _judge(cached, length) is not Residency.PARTIAL:
        return [] if cached else [(start, length)]
    runs = _merged(_page_runs(fd, start, length))
    return [(run.offset, run.length) for run in runs if run.state is Residency.ABSENT]


def united(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same ranges in file order, those that touch or overlap made one.

    Args:
        ranges: offset and length in bytes of each.
    """
    found: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if found and offset <= sum(found[-1]):
            first, held = found[-1]
            found[-1] = (first, max(held, offset + length - first))
        else:
            found.append((offset, length))
    return found


def _page_runs(fd: int, offset: int, length: int) -> Iterator[ResidencyRun]:
    """Runs of absent and resident pages in a range that starts at a page boundary."""
    end = offset + length
    trusted = may_see_residency(fd)
    for start in range(offset, end, _VECTOR_WINDOW_BYTES):
        window = min(_VECTOR_WINDOW_BYTES, end - start)
        try:
            vector = kernel.resident_pages(fd, start, window) if trusted else None
        except OSError:
            vector = None
        if vector is None:
            yield ResidencyRun(start, window, Residency.RESIDENT)
            continue
        first = 0
        while first < len(vector):
            after = vector.find(1 - vector[first], first)
            after = len(vector) if after < 0 else after
            begin = start + first * kernel.PAGE_SIZE
            stop = min(start + after * kernel.PAGE_SIZE, end)
            yield ResidencyRun(begin, stop - begin, Residency.RESIDENT if vector[first] else Residency.ABSENT)
            first = after


def cached_in(fd: int, ranges: Iterable[tuple[int, int]]) -> int | None:
    """Cached bytes of some ranges of a file together; ``None`` if the system will not tell.

    Args:
        fd: a file open for reading.
        ranges: offset and length in bytes of each.
    """
    total = 0
    for offset, length in ranges:
        cached = _cached_bytes(fd, align_down(offset, kernel.PAGE_SIZE), length)
        if cached is None:
            return None
        total += cached
    return total
