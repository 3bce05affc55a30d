"""What workers spent their time on, step by step, where a load is traced: values that both engines fill in.

A step is one thing one worker did with one chunk, and when. Engines keep the last of them in a ring of fixed size, so
that a trace costs a bounded amount of memory however long the load is.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS_MAX: Final = 1 << 17
"""Steps that a trace keeps by default: some 6 MiB in the native engine, enough for 200 GB read directly."""


class StepKind(enum.IntEnum):
    """What a worker did. The numbers are those of the native engine.

    ``POPULATE``: prepared fresh destination memory. ``REGISTER``: pinned a slot. ``READ``: read a chunk. ``COPY``:
    copied it out of its slot to host memory. ``DEVICE_COPY``: queued its copies to a device. ``DEVICE_WAIT``: waited
    for such copies. ``SLOT_WAIT``: had a chunk to read and no slot for it. ``UNDER_WAY``: no worker's doing, but the
    time from when copies to a device were queued until they were seen to have landed.
    """

    POPULATE = 0
    REGISTER = 1
    READ = 2
    COPY = 3
    DEVICE_COPY = 4
    DEVICE_WAIT = 5
    SLOT_WAIT = 6
    UNDER_WAY = 7


class Step(NamedTuple):
    """One step.

    Attributes:
        kind: what was done.
        worker: by which worker.
        shard: with which shard, -1 for none.
        slot: in which slot, -1 for none.
        path: by which read path, as :class:`~weightlift.operations.ReadPath`; a direct read that was refused and went
            through the page cache counts as such.
        offset: first byte in the file.
        length: bytes.
        start: when it began, in seconds since tracing did.
        end: when it ended.
    """

    kind: StepKind
    worker: int
    shard: int
    slot: int
    path: int
    offset: int
    length: int
    start: float
    end: float


class Steps(Protocol):
    """The steps an engine has kept, the oldest first."""

    @property
    def lost(self) -> int:
        """How many older ones had to make room."""
        ...

    def __iter__(self) -> Iterator[Step]: ...

    def __len__(self) -> int: ...
