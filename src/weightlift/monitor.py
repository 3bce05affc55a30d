"""Samples memory, swap and pressure while a load runs.

Owns the figures at the start and the peaks since. Has no thread and no clock: the caller decides when to sample. Knows
nothing of plans or engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightlift.host.memory import ProcessMemory, pressure_stall_seconds, process_memory, swap_counters

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorResult:
    """What a load did to host memory; ``None`` where the system does not tell.

    Attributes:
        peak_anonymous_bytes: sampled growth of anonymous memory over the start, without what had landed in
            destinations.
        peak_file_bytes: sampled growth of file-backed resident memory.
        swap_in_bytes: machine-wide swap-in since the start.
        swap_out_bytes: machine-wide swap-out since the start.
        pressure_stall_seconds: time in which some task of the machine waited for memory.
    """

    peak_anonymous_bytes: int | None
    peak_file_bytes: int | None
    swap_in_bytes: int | None
    swap_out_bytes: int | None
    pressure_stall_seconds: float | None


class Monitor:
    """Keeps the peaks of one load, from construction to :meth:`finish`.

    Args:
        memory: reads this process's memory.
        swap: reads the machine's bytes swapped in and out.
        pressure: reads the machine's seconds of waiting for memory.
    """

    def __init__(
        self,
        *,
        memory: Callable[[], ProcessMemory | None] = process_memory,
        swap: Callable[[], tuple[int, int] | None] = swap_counters,
        pressure: Callable[[], float | None] = pressure_stall_seconds,
    ) -> None:
        self._memory = memory
        self._swap = swap
        self._pressure = pressure
        self._start_swap = swap()
        self._start_pressure = pressure()
        self._start = memory()
        self._peak_anonymous = 0
        self._peak_file = 0

    def sample(self, landed_bytes: int) -> None:
        """Look once and keep the peaks. Call it from one thread at a time.

        Args:
            landed_bytes: how many bytes are in destinations in host memory by now: they are the caller's, not the
                load's.
        """
        start = self._start
        now = self._memory() if start is not None else None
        if start is None or now is None:
            return
        growth = now.anonymous_bytes - start.anonymous_bytes
        self._peak_anonymous = max(self._peak_anonymous, growth - landed_bytes)
        self._peak_file = max(self._peak_file, now.file_bytes - start.file_bytes)

    def finish(self) -> MonitorResult:
        """The peaks of all samples, and what swap and pressure did since the start."""
        known = self._start is not None
        before, after = self._start_swap, self._swap()
        stalled = self._pressure()
        return MonitorResult(
            peak_anonymous_bytes=self._peak_anonymous if known else None,
            peak_file_bytes=self._peak_file if known else None,
            swap_in_bytes=None if before is None or after is None else after[0] - before[0],
            swap_out_bytes=None if before is None or after is None else after[1] - before[1],
            pressure_stall_seconds=(
                None if self._start_pressure is None or stalled is None else stalled - self._start_pressure
            ),
        )
