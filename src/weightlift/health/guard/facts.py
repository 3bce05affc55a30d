"""What the guard knows at one moment, and the rules it was given. Values only."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from weightlift.units import GIB, MIB

_RESERVE_MIN_BYTES: Final = 64 * MIB
_RESERVE_MAX_BYTES: Final = 2 * GIB


class WhenFull(enum.Enum):
    """What happens to the command when there is no more room for it."""

    STOP = "stop"
    FREEZE = "freeze"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The rules of one run.

    Attributes:
        total_bytes: memory of the machine, or of the control group that stands for it.
        reserve_bytes: what is kept for everything else.
        swap_bytes: most swap that the command may take.
        when_full: what happens when there is no more room.
        grace_seconds: from the request to end until the command is killed.
    """

    total_bytes: int
    reserve_bytes: int
    swap_bytes: int = 0
    when_full: WhenFull = WhenFull.STOP
    grace_seconds: float = 5.0


def default_reserve(total_bytes: int) -> int:
    """What is kept for everything else: a twentieth of the memory, from 64 MiB to 2 GiB."""
    return min(max(total_bytes // 20, _RESERVE_MIN_BYTES), _RESERVE_MAX_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Memory of the command, of the machine, and how much others suffer.

    Attributes:
        seconds: since the command was started.
        anonymous_bytes: the command's private memory, which only swap can take back.
        file_bytes: pages of files that the command brought in or has mapped.
        shared_bytes: its shared memory.
        swapped_bytes: its private memory in swap.
        ceiling_bytes: where its control group slows it down or ends it; ``None`` without a group.
        charged_bytes: all that counts against that limit, page cache included.
        available_bytes: what the machine could give at once, all clean page cache included.
        free_bytes: what it could give without dropping a page.
        swap_free_bytes: swap that nobody uses.
        others_stalled_seconds: so far, how long processes outside of the command waited for memory; ``None`` where that
            cannot be told apart or is not counted.
        held: the kernel has put the command to sleep at its limit.
        kills: processes of the command killed by the kernel for want of memory.
    """

    seconds: float
    anonymous_bytes: int
    file_bytes: int
    shared_bytes: int
    swapped_bytes: int
    ceiling_bytes: int | None
    charged_bytes: int | None
    available_bytes: int
    free_bytes: int
    swap_free_bytes: int
    others_stalled_seconds: float | None = None
    held: bool = False
    kills: int = 0

    @property
    def lasting_bytes(self) -> int:
        """What the kernel cannot drop."""
        return self.anonymous_bytes + self.shared_bytes


def room(sample: Sample, policy: Policy) -> int:
    """How much more lasting memory the command may take, in bytes; negative once it has too much.

    The smaller of what its control group leaves it and what the machine can give without touching the reserve, and on
    top of that the swap it may still use.
    """
    rooms = [sample.available_bytes - policy.reserve_bytes]
    if sample.ceiling_bytes is not None:
        rooms.append(sample.ceiling_bytes - sample.lasting_bytes)
    swap = max(0, min(sample.swap_free_bytes, policy.swap_bytes - sample.swapped_bytes))
    return min(rooms) + swap
