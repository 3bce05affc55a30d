"""The ``null`` device: everything is read, nothing is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightlift.operations import Sink
from weightlift.plan import Wanted
from weightlift.targets.base import Bound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightlift.description import Description
    from weightlift.operations import ChunkReady


class NullTarget(Bound):
    """Reads the selected tensors into staging slots and discards them there.

    Args:
        description: the checkpoint.
        rows: the selected rows, in file order.
    """

    device = "null"
    host_bytes = 0
    in_order = False

    def __init__(self, description: Description, rows: Sequence[int]) -> None:
        self._description = description
        self._rows = rows

    def prepare(self) -> Sequence[Wanted]:
        """See :class:`~weightlift.targets.base.Target`."""
        return list(self._ranges())

    def _ranges(self) -> Iterator[Wanted]:
        """The selected tensors' bytes, neighbours joined."""
        description = self._description
        shard, begin, end = -1, 0, 0
        for row in self._rows:
            offset, length = description.offsets[row], description.lengths[row]
            if description.shard_indexes[row] == shard and offset == end:
                end = offset + length
                continue
            if end > begin:
                yield Wanted(shard, begin, end - begin, Sink.DISCARD)
            shard, begin, end = description.shard_indexes[row], offset, offset + length
        if end > begin:
            yield Wanted(shard, begin, end - begin, Sink.DISCARD)

    def receive(self, chunk: ChunkReady, want: int, release: Callable[[int], None]) -> None:
        """See :class:`~weightlift.targets.base.Target`; never called, since nothing is handed over."""
        raise NotImplementedError

    def finish(self) -> Iterator[tuple[str, Any]]:
        """See :class:`~weightlift.targets.base.Target`."""
        return iter(())

    def close(self) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
