"""Hashing whole files while they stream by: sha256 of every file, and xxh3-128 of every tensor in it, in one pass.

A chunk stays in its slot until both hashes have taken it. They run in threads of their own, one of each kind a file, so
that the slower one sets the pace and not their sum.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from typing import TYPE_CHECKING, Any

from weightlift.operations import Sink
from weightlift.plan import Wanted
from weightlift.targets.base import Bound
from weightlift.targets.digest import InOrder, xxh3_128

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightlift.description import Description
    from weightlift.operations import ChunkReady


class _Held:
    """A slot that several threads read, given back by the last of them."""

    def __init__(self, chunk: ChunkReady, release: Callable[[int], None], readers: int) -> None:
        self.chunk = chunk
        self._release = release
        self._readers = readers
        self._lock = threading.Lock()

    def part(self, begin: int, end: int) -> Any:
        """The bytes of a range of the file inside the chunk."""
        return (ctypes.c_ubyte * (end - begin)).from_address(self.chunk.address + begin - self.chunk.offset)

    def done(self) -> None:
        with self._lock:
            self._readers -= 1
            last = not self._readers
        if last:
            self._release(self.chunk.slot)


class WholeFileTarget(Bound):
    """Reads every byte of some files and keeps their digests.

    Args:
        description: the checkpoint, all of whose files are read.
        threads: how many files are hashed at a time, with two threads each.

    Attributes:
        files: sha256 per shard, in hexadecimal, once finished.
        tensors: xxh3-128 per tensor, likewise.
    """

    device = "null"
    host_bytes = 0
    in_order = True

    def __init__(self, description: Description, threads: int) -> None:
        self._description = description
        shards = range(len(description.shards))
        rows: list[list[int]] = [[] for _ in shards]
        for row, (shard, length) in enumerate(zip(description.shard_indexes, description.lengths, strict=True)):
            if length:
                rows[shard].append(row)
        self._rows = rows
        self._cursors = [0 for _ in shards]
        self._begun: list[list[int]] = [[] for _ in shards]
        self._in_order = InOrder([0 for _ in shards])
        self._sums = [hashlib.sha256() for _ in shards]
        self._new = xxh3_128()
        self._tensor_hashers: dict[int, Any] = {}
        self.files: list[str] = []
        empty = self._new(b"").hexdigest()
        self.tensors: dict[str, str] = {
            description.names[row]: empty for row, length in enumerate(description.lengths) if not length
        }
        from concurrent.futures import ThreadPoolExecutor

        count = max(1, min(threads, len(description.shards)))
        self._pools = [
            [ThreadPoolExecutor(1, thread_name_prefix="weightlift-digest") for _ in range(count)] for _ in range(2)
        ]

    def prepare(self) -> Sequence[Wanted]:
        """See :class:`~weightlift.targets.base.Target`."""
        sizes = [shard.identity.size_bytes for shard in self._description.shards]
        return [Wanted(index, 0, size, Sink.HAND_OVER) for index, size in enumerate(sizes)]

    def receive(self, chunk: ChunkReady, want: int, release: Callable[[int], None]) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        for ready in self._in_order.take(want, chunk):
            held = _Held(ready, release, readers=2)
            for pools, work in zip(self._pools, (self._add_to_file, self._add_to_tensors), strict=True):
                pools[want % len(pools)].submit(work, want, held)

    def _add_to_file(self, shard: int, held: _Held) -> None:
        begin = held.chunk.offset
        self._sums[shard].update(held.part(begin, begin + held.chunk.length))
        held.done()

    def _add_to_tensors(self, shard: int, held: _Held) -> None:
        description, rows = self._description, self._rows[shard]
        begin, end = held.chunk.offset, held.chunk.offset + held.chunk.length
        cursor = first = self._cursors[shard]
        while cursor < len(rows) and description.offsets[rows[cursor]] < end:
            cursor += 1
        # Tensors may share bytes, so several can be under way.
        begun, self._begun[shard] = [*self._begun[shard], *rows[first:cursor]], []
        for row in begun:
            start, stop = description.offsets[row], description.offsets[row] + description.lengths[row]
            hasher = self._tensor_hashers.pop(row, None) or self._new()
            hasher.update(held.part(max(start, begin), min(stop, end)))
            if stop > end:
                self._tensor_hashers[row] = hasher
                self._begun[shard].append(row)
            else:
                self.tensors[description.names[row]] = hasher.hexdigest()
        self._cursors[shard] = cursor
        held.done()

    def finish(self) -> Iterator[tuple[str, Any]]:
        """See :class:`~weightlift.targets.base.Target`; afterwards the digests are complete."""
        for pool in (pool for kind in self._pools for pool in kind):
            pool.shutdown()
        self.files = [total.hexdigest() for total in self._sums]
        return iter(())

    def close(self) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        for pool in (pool for kind in self._pools for pool in kind):
            pool.shutdown(cancel_futures=True)
