"""Digests of tensors while they stream by: xxh3-128 over the bytes as stored.

The chunks of one tensor are hashed in order, tensors in parallel. A chunk that arrives early keeps its slot until those
before it have come; since engines claim chunks in order, the missing ones already have theirs.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import TYPE_CHECKING, Any

from weightlift.errors import MissingExtraError
from weightlift.operations import Sink
from weightlift.plan import Wanted
from weightlift.targets.base import Bound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weightlift.description import Description
    from weightlift.operations import ChunkReady


def xxh3_128() -> Any:
    """The constructor of the hash.

    Raises:
        MissingExtraError: xxhash is not installed.
    """
    try:
        return importlib.import_module("xxhash").xxh3_128
    except ImportError as err:
        raise MissingExtraError("digests need the package xxhash", hint="pip install xxhash") from err


def digest_of(buffer: Any) -> str:
    """The xxh3-128 digest of a buffer, in hexadecimal."""
    return str(xxh3_128()(buffer).hexdigest())


class InOrder:
    """Puts the chunks of several ranges back into file order, range by range.

    Args:
        starts: where each range begins in its file.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self._expected = list(starts)
        self._early: dict[int, dict[int, ChunkReady]] = {}

    def take(self, want: int, chunk: ChunkReady) -> Iterator[ChunkReady]:
        """The chunks of a range whose turn has come with this one."""
        early = self._early.setdefault(want, {})
        early[chunk.offset] = chunk
        while (ready := early.pop(self._expected[want], None)) is not None:
            self._expected[want] += ready.length
            yield ready


class DigestTarget(Bound):
    """Reads tensors, hashes them and keeps nothing; the ``null`` device with ``digest=True``.

    Args:
        description: the checkpoint.
        rows: the selected rows.
        threads: how many tensors are hashed at a time.
    """

    device = "null"
    host_bytes = 0
    in_order = True

    def __init__(self, description: Description, rows: Sequence[int], threads: int) -> None:
        self._description = description
        self._rows = [row for row in rows if description.lengths[row]]
        self._empty = [row for row in rows if not description.lengths[row]]
        self._new = xxh3_128()
        self._hashers: dict[int, Any] = {}
        self._in_order = InOrder([description.offsets[row] for row in self._rows])
        from concurrent.futures import ThreadPoolExecutor

        self._pools = [ThreadPoolExecutor(1, thread_name_prefix="weightlift-digest") for _ in range(max(1, threads))]
        self.digests: dict[str, str] = {description.names[row]: self._new(b"").hexdigest() for row in self._empty}

    def prepare(self) -> Sequence[Wanted]:
        """See :class:`~weightlift.targets.base.Target`."""
        description = self._description
        return [
            Wanted(description.shard_indexes[row], description.offsets[row], description.lengths[row], Sink.HAND_OVER)
            for row in self._rows
        ]

    def receive(self, chunk: ChunkReady, want: int, release: Callable[[int], None]) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        for ready in self._in_order.take(want, chunk):
            # One thread hashes all chunks of a tensor, so they stay in order.
            self._pools[want % len(self._pools)].submit(self._hash, want, ready, release)

    def _hash(self, want: int, chunk: ChunkReady, release: Callable[[int], None]) -> None:
        row = self._rows[want]
        hasher = self._hashers.get(want)
        if hasher is None:
            hasher = self._hashers[want] = self._new()
        hasher.update((ctypes.c_ubyte * chunk.length).from_address(chunk.address))
        release(chunk.slot)
        if chunk.offset + chunk.length == self._description.offsets[row] + self._description.lengths[row]:
            self.digests[self._description.names[row]] = self._hashers.pop(want).hexdigest()

    def finish(self) -> Iterator[tuple[str, Any]]:
        """See :class:`~weightlift.targets.base.Target`; afterwards :attr:`digests` is complete."""
        for pool in self._pools:
            pool.shutdown()
        return iter(())

    def close(self) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


def digest_tensors(buffers: Mapping[str, Any], threads: int) -> dict[str, str]:
    """Digests of tensors that lie in memory, several at a time."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="weightlift-digest") as pool:
        return dict(zip(buffers, pool.map(digest_of, buffers.values()), strict=True))
