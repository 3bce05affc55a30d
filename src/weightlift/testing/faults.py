"""Storage that misbehaves on purpose and in the same way every time.

A :class:`FaultingReader` takes the place of the Python engine's reader and lays faults over what the real one reads:
the file itself stays as it is. What happens at a position follows from the seed and the position, not from which thread
comes first, so that the seed alone brings a failure back; it is in the reader's ``repr``.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weightlift.engines.reader import SystemReader
from weightlift.operations import ReadPath

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.engines.reader import Reader
    from weightlift.operations import ShardSource

_INTERRUPTIONS_MAX: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong.

    Attributes:
        short_reads: share of reads that return fewer bytes than were asked for, from 0 to 1.
        interruptions: share of reads that a signal interrupts, from 0 to 1; a read is interrupted 3 times at most.
        fail_at_read: the read with this number, counted from 1 over all threads, fails.
        error_number: the ``errno`` it fails with.
        end_of_file_at: every file seems to end here.
        refuse_direct_from: direct reads that reach beyond this offset fail with EINVAL.
        before_read: called with path and offset before each read; may wait for an event, or raise.
    """

    short_reads: float = 0.0
    interruptions: float = 0.0
    fail_at_read: int | None = None
    error_number: int = errno.EIO
    end_of_file_at: int | None = None
    refuse_direct_from: int | None = None
    before_read: Callable[[ReadPath, int], None] | None = None


class FaultingReader:
    """A :class:`~weightlift.engines.reader.Reader` with faults.

    Args:
        seed: decides where reads are short or interrupted.
        faults: what goes wrong.
        reader: what really reads.
    """

    def __init__(self, seed: int = 0, faults: Faults | None = None, reader: Reader | None = None) -> None:
        self.seed = seed
        self.faults = faults or Faults()
        self.reads = 0
        self.interrupted = 0
        self.shortened = 0
        self._reader = reader or SystemReader()
        self._lock = threading.Lock()
        self._visits: dict[tuple[int, ReadPath, int], int] = {}

    def __repr__(self) -> str:
        return f"FaultingReader(seed={self.seed}, faults={self.faults})"

    def read_into(self, shard: ShardSource, path: ReadPath, buffer: memoryview, offset: int) -> int:
        """See :class:`~weightlift.engines.reader.Reader`."""
        faults = self.faults
        if faults.before_read is not None:
            faults.before_read(path, offset)
        with self._lock:
            self.reads += 1
            number = self.reads
            place = (shard.descriptor, path, offset)
            visit = self._visits[place] = self._visits.get(place, 0) + 1
        if number == faults.fail_at_read:
            raise OSError(faults.error_number, os.strerror(faults.error_number))
        refused = faults.refuse_direct_from
        if path is ReadPath.DIRECT and refused is not None and offset + len(buffer) > refused:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        chance = random.Random(f"{self.seed} {path} {offset} {visit}")  # noqa: S311 - faults need a seed, not secrecy
        if visit <= _INTERRUPTIONS_MAX and chance.random() < faults.interruptions:
            self._count("interrupted")
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return self._read(shard, path, buffer, offset, chance)

    def _read(self, shard: ShardSource, path: ReadPath, buffer: memoryview, offset: int, chance: random.Random) -> int:
        end = self.faults.end_of_file_at
        if end is not None:
            buffer = buffer[: max(0, end - offset)]
            if not buffer:
                return 0
        got = self._reader.read_into(shard, path, buffer, offset)
        if got > 1 and chance.random() < self.faults.short_reads:
            self._count("shortened")
            # What lies behind the answer is not to be relied upon, as after a real short read.
            short = chance.randrange(1, got)
            buffer[short:got] = bytes(got - short)
            return short
        return got

    def _count(self, counter: str) -> None:
        with self._lock:
            setattr(self, counter, getattr(self, counter) + 1)
