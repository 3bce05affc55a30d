"""The Python engine's record of steps, kept only where a load is traced."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from weightlift.operations import ReadPath
from weightlift.steps import Step, StepKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.engines.moving import Chunk


class StepRing:
    """The last steps of all workers; see :class:`~weightlift.steps.Steps`. Nothing is kept before :meth:`begin`."""

    def __init__(self) -> None:
        self._steps: deque[Step] | None = None
        self._begun = 0.0
        self._noted = 0
        self._lock = threading.Lock()

    def begin(self, capacity: int) -> None:
        """Keep the last ``capacity`` steps from now on."""
        self._steps = deque(maxlen=capacity)
        self._begun = time.monotonic()

    def note(
        self, kind: StepKind, worker: int, chunk: Chunk | None, *, start: float, end: float, refused: bool = False
    ) -> None:
        """Keep one step.

        Args:
            kind: what was done.
            worker: by whom.
            chunk: with what.
            start: when it began, by the monotonic clock.
            end: when it ended.
            refused: a direct read was refused, and went through the page cache.
        """
        if self._steps is None:
            return
        start, end = start - self._begun, end - self._begun
        if chunk is None:
            step = Step(kind, worker, -1, -1, 0, 0, 0, start, end)
        else:
            extent = chunk.extent
            path = ReadPath.BUFFERED if refused else extent.path
            step = Step(kind, worker, extent.shard, chunk.slot, path, chunk.offset, chunk.length, start, end)
        with self._lock:
            self._steps.append(step)
            self._noted += 1

    @property
    def lost(self) -> int:
        """How many older ones had to make room."""
        return self._noted - len(self)

    def __len__(self) -> int:
        return len(self._steps or ())

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps or ())
