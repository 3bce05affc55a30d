"""How the Python engine asks the operating system for bytes: one call, one answer, no retries.

This is the seam for fault injection: ``weightlift.testing.faults`` puts a reader that fails on purpose in this place.
Nothing here loops, falls back or judges; the engine above does.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Final, Protocol

from weightlift.operations import ReadPath

if TYPE_CHECKING:
    from weightlift.operations import ShardSource

RWF_DONTCACHE: Final = 0x80
"""``preadv2`` flag: drop the pages this read brought in (Linux 6.14, include/uapi/linux/fs.h)."""


class Reader(Protocol):
    """One positioned read."""

    def read_into(self, shard: ShardSource, path: ReadPath, buffer: memoryview, offset: int) -> int:
        """Read at ``offset`` into ``buffer``; may return fewer bytes than it has room for, 0 at the end of the file.

        Raises:
            OSError: the system call failed.
        """
        ...


class SystemReader:
    """Reads with ``preadv``, or with ``seek`` and ``readinto`` where the system has no positioned reads."""

    def __init__(self) -> None:
        self._seek_lock = threading.Lock()
        self._dontcache = sys.platform == "linux"

    def read_into(self, shard: ShardSource, path: ReadPath, buffer: memoryview, offset: int) -> int:
        """See :class:`Reader`."""
        descriptor = shard.direct_descriptor if path is ReadPath.DIRECT else shard.descriptor
        if not hasattr(os, "preadv"):
            return self._seek_and_read(descriptor, buffer, offset)
        if path is ReadPath.DONTCACHE and self._dontcache:
            try:
                return os.preadv(descriptor, [buffer], offset, RWF_DONTCACHE)
            except OSError as err:
                import errno

                if err.errno not in {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
                    raise
        return os.preadv(descriptor, [buffer], offset)

    def _seek_and_read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        # Without positioned reads a descriptor has one position, which workers must not move under each other.
        with self._seek_lock, open(descriptor, "rb", buffering=0, closefd=False) as file:
            file.seek(offset)
            return file.readinto(buffer) or 0
