"""Samples memory, swap and pressure while a load runs.

Owns the figures at the start, the peaks since, and the timeline. Has no thread and no clock: the caller decides when to
sample. Knows nothing of plans or engines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from msgspec import Struct

from weightlift.host.gauges import HostGauges
from weightlift.samples import Sample, Timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.host.gauges import HostFigures


Number = TypeVar("Number", int, float)


class MonitorResult(Struct, frozen=True, kw_only=True):
    """What a load did to memory; ``None`` where the system does not tell.

    Attributes:
        peak_anonymous_bytes: sampled growth of anonymous memory over the start, without what had landed in
            destinations.
        peak_file_bytes: sampled growth of file-backed resident memory.
        peak_shared_bytes: sampled growth of shared memory.
        swap_in_bytes: machine-wide swap-in since the start.
        swap_out_bytes: machine-wide swap-out since the start.
        pressure_stall_seconds: time in which some task of the machine waited for memory.
        group_stall_seconds: the same in this process's control group.
        samples: the load from start to end, in a bounded number of points.
    """

    peak_anonymous_bytes: int | None
    peak_file_bytes: int | None
    peak_shared_bytes: int | None
    swap_in_bytes: int | None
    swap_out_bytes: int | None
    pressure_stall_seconds: float | None
    group_stall_seconds: float | None
    samples: tuple[Sample, ...] = ()


class Progress(NamedTuple):
    """What the caller knows at the moment of a sample; see :class:`~weightlift.samples.Sample` for what each means."""

    seconds: float
    read_bytes: int = 0
    landed_bytes: int = 0
    tensor_bytes: int = 0
    pinned_bytes: int = 0
    device_bytes: int | None = None
    workers: int = 0
    chunk_bytes: int = 0


class Monitor:
    """Keeps the peaks and the timeline of one load, from construction to :meth:`finish`.

    Args:
        read: reads the figures; this machine's by default. Called with ``fresh=True`` where pressure counts.

    Attributes:
        latest: the figures of the last sample.
    """

    def __init__(self, read: Callable[..., HostFigures] | None = None) -> None:
        self._read = read or HostGauges().read
        self._start = self.latest = self._read(fresh=True)
        self._is_fresh = False
        self._timeline = Timeline()
        self._peaks: dict[str, int] = dict.fromkeys(("anonymous_bytes", "file_bytes", "shared_bytes"), 0)

    def sample(self, ask: Callable[[], Progress], *, fresh: bool = False) -> Sample:
        """Look once, and keep what was seen. Call it from one thread at a time.

        Args:
            ask: tells how far the load is; what is in its tensors is the caller's memory and not the load's. Asked
                after the look: put aside in between, this would take what workers filled meanwhile for the load's.
            fresh: look at pressure too.
        """
        start, now = self._start, self._read(fresh=fresh)
        self.latest, self._is_fresh, progress = now, fresh, ask()
        process, before = now.process, start.process
        growth: dict[str, Any] = dict.fromkeys(self._peaks)
        if process is not None and before is not None:
            anonymous = process.anonymous_bytes - before.anonymous_bytes - progress.tensor_bytes
            growth = {
                "anonymous_bytes": anonymous,
                "file_bytes": process.file_bytes - before.file_bytes,
                "shared_bytes": process.shared_bytes - before.shared_bytes,
            }
        for name, value in growth.items():
            self._peaks[name] = max(self._peaks[name], value or 0)
        swapped_in, swapped_out = self._swapped(now)
        sample = Sample(
            **progress._asdict(),
            **growth,
            page_cache_bytes=_difference(now.page_cache_bytes, start.page_cache_bytes),
            available_bytes=now.available_bytes,
            swap_in_bytes=swapped_in,
            swap_out_bytes=swapped_out,
            machine_stall_seconds=_difference(now.machine_stall_seconds, start.machine_stall_seconds),
            group_stall_seconds=_difference(now.group_stall_seconds, start.group_stall_seconds),
        )
        self._timeline.add(sample)
        return sample

    def _swapped(self, now: HostFigures) -> tuple[int | None, int | None]:
        before, after = self._start.swapped, now.swapped
        return (None, None) if before is None or after is None else (after[0] - before[0], after[1] - before[1])

    def finish(self) -> MonitorResult:
        """The peaks of all samples, and what swap and pressure did since the start, if need be by looking once more."""
        start, now = self._start, self.latest if self._is_fresh else self._read(fresh=True)
        known = start.process is not None
        swapped_in, swapped_out = self._swapped(now)
        return MonitorResult(
            peak_anonymous_bytes=self._peaks["anonymous_bytes"] if known else None,
            peak_file_bytes=self._peaks["file_bytes"] if known else None,
            peak_shared_bytes=self._peaks["shared_bytes"] if known else None,
            swap_in_bytes=swapped_in,
            swap_out_bytes=swapped_out,
            pressure_stall_seconds=_difference(now.machine_stall_seconds, start.machine_stall_seconds),
            group_stall_seconds=_difference(now.group_stall_seconds, start.group_stall_seconds),
            samples=self._timeline.samples,
        )


def _difference(now: Number | None, start: Number | None) -> Number | None:
    return None if now is None or start is None else now - start
