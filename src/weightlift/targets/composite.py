"""Several targets as one: tensors for different devices, or partly converted, in one pass over the files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightlift.operations import ChunkReady, Extent
    from weightlift.plan import Wanted
    from weightlift.targets.base import Target


class CompositeTarget:
    """Serves every tensor by one of several targets.

    Args:
        parts: each target with the rows it was made for.
    """

    def __init__(self, parts: Sequence[tuple[Target, Sequence[int]]]) -> None:
        self._targets = [target for target, _ in parts]
        self._owner_of = {row: number for number, (_, rows) in enumerate(parts) for row in rows}
        self._wants: list[tuple[int, int]] = []
        self.device = ", ".join(dict.fromkeys(target.device for target in self._targets))
        self.host_bytes = sum(target.host_bytes for target in self._targets)
        self.makes_ahead = all(target.makes_ahead for target in self._targets)
        self.in_order = any(target.in_order for target in self._targets)

    def prepare(self) -> Sequence[Wanted]:
        """See :class:`~weightlift.targets.base.Target`."""
        wanted = [
            (want, number, index)
            for number, target in enumerate(self._targets)
            for index, want in enumerate(target.prepare())
        ]
        # One pass over the files, whichever target a range is for.
        wanted.sort(key=lambda item: (item[0].shard, item[0].offset))
        self._wants = [(number, index) for _, number, index in wanted]
        return [want for want, _, _ in wanted]

    def bind(self, extents: Sequence[Extent]) -> Sequence[Extent]:
        """See :class:`~weightlift.targets.base.Target`."""
        numbers = [self._wants[extent.tag][0] for extent in extents]
        bound = {
            number: iter(
                target.bind([extent for extent, owner in zip(extents, numbers, strict=True) if owner == number])
            )
            for number, target in enumerate(self._targets)
        }
        return [next(bound[number]) for number in numbers]

    def receive(self, chunk: ChunkReady, want: int, release: Callable[[int], None]) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        number, index = self._wants[want]
        self._targets[number].receive(chunk, index, release)

    def finish(self) -> Iterator[tuple[str, Any]]:
        """See :class:`~weightlift.targets.base.Target`."""
        tensors = [target.finish() for target in self._targets]
        for row in sorted(self._owner_of):
            yield next(tensors[self._owner_of[row]])

    def close(self) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        for target in self._targets:
            target.close()
