"""What a load looked like at moments along the way, and a record of that with a bound on its size.

Values and arithmetic only: no clock, no system.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

POINTS_MAX: Final = 240
"""Most points of a timeline: as many as a chart across a page can show."""


class Sample(NamedTuple):
    """A load at one moment; byte counts of memory are growth over the start, ``None`` where the system does not tell.

    Attributes:
        seconds: since the start of the load.
        read_bytes: bytes that have left storage.
        landed_bytes: bytes that are where they belong.
        tensor_bytes: host memory that the tensors have taken by then.
        anonymous_bytes: private memory of the process, without that of the tensors.
        file_bytes: pages of mapped files in the process.
        shared_bytes: shared memory of the process.
        pinned_bytes: memory registered with a GPU's runtime (part of the anonymous memory).
        page_cache_bytes: the page cache, of the machine or of the control group that leaves the least memory.
        available_bytes: memory left for this process; not growth but what there is.
        swap_in_bytes: swapped in by the machine.
        swap_out_bytes: swapped out by the machine.
        machine_stall_seconds: time in which some task of the machine waited for memory.
        group_stall_seconds: the same in this process's control group.
        device_bytes: memory of all devices of the load.
        workers: workers that may claim.
        chunk_bytes: size of a chunk.
    """

    seconds: float
    read_bytes: int
    landed_bytes: int
    tensor_bytes: int
    anonymous_bytes: int | None
    file_bytes: int | None
    shared_bytes: int | None
    pinned_bytes: int
    page_cache_bytes: int | None
    available_bytes: int | None
    swap_in_bytes: int | None
    swap_out_bytes: int | None
    machine_stall_seconds: float | None
    group_stall_seconds: float | None
    device_bytes: int | None
    workers: int
    chunk_bytes: int


_HIGHEST: Final = ("anonymous_bytes", "file_bytes", "shared_bytes", "pinned_bytes", "page_cache_bytes", "device_bytes")


def merged(first: Sample, second: Sample) -> Sample:
    """Two neighbouring samples as one: the second, with the higher use of memory and the lower rest of it."""
    values: dict[str, Any] = {}
    for name in (*_HIGHEST, "available_bytes"):
        known = [value for value in (getattr(first, name), getattr(second, name)) if value is not None]
        values[name] = (max(known) if name in _HIGHEST else min(known)) if known else None
    return second._replace(**values)


class Timeline:
    """Samples of a load of any length in at most :data:`POINTS_MAX` points, with all extremes kept.

    When it is full, neighbours become one point, and from then on twice as many samples go into each.

    Args:
        points_max: most points; an even number.
    """

    def __init__(self, points_max: int = POINTS_MAX) -> None:
        assert points_max >= 2, points_max
        assert points_max % 2 == 0, points_max
        self._points_max = points_max
        self._points: list[Sample] = []
        self._per_point = 1
        self._in_last = 0

    def add(self, sample: Sample) -> None:
        """Take in the next sample."""
        if self._points and self._in_last < self._per_point:
            self._points[-1] = merged(self._points[-1], sample)
            self._in_last += 1
            return
        if len(self._points) == self._points_max:
            self._points = [merged(*pair) for pair in zip(self._points[::2], self._points[1::2], strict=True)]
            self._per_point *= 2
        self._points.append(sample)
        self._in_last = 1

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The points, by rising time."""
        return tuple(self._points)


class Intervention(NamedTuple):
    """What was done while a load ran, because memory got short.

    Attributes:
        seconds: when, since the start of the load.
        action: what was done, in a few words.
        reason: what was seen, in a sentence.
    """

    seconds: float
    action: str
    reason: str
