"""What no load on this machine can be faster than: storage, the page cache, the link to a GPU. Measured each round.

Storage and page cache are read by :mod:`weightlift.health.probes` into buffers that are used again, at several numbers
of threads in the first round and at the best of them later; the fastest counts. A load also fills memory that is new.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from weightlift.bench.process import START_SECONDS, Worker, WorkerFailure
from weightlift.health.probes import storage_speeds
from weightlift.host.memory import available_processors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightlift.health.cache.files import FoundFile

STORAGE: Final = ("direct", "uncached", "buffered")
"""Kinds of reads from storage that a ceiling is made of."""

_WORKERS_MIN: Final = 2
_WORKERS_USUAL: Final = 4
_WORKERS_MAX: Final = 16
_SECONDS: Final = 0.3
_LINK_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What one round found, in GB/s; what could not be measured is missing.

    Attributes:
        speeds: by kind: ``direct``, ``uncached`` and ``buffered`` reads of storage, ``cached`` out of the page cache,
            ``link``.
        notes: why a kind is missing.
    """

    speeds: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Ceilings) -> Ceilings:
        speeds = {**self.speeds, **other.speeds}
        notes = {**self.notes, **other.notes}
        return Ceilings(speeds, {kind: why for kind, why in notes.items() if kind not in speeds})

    def of(self, state: str, device: str, *, mapped: bool) -> tuple[str, float] | None:
        """What bounds a load, and how fast that is; ``None`` where it was not measured or nothing bounds it.

        Args:
            state: of the page cache before the load.
            device: where to.
            mapped: tensors are mapped: out of the page cache they are not even copied.
        """
        link = [("link", self.speeds["link"])] if "link" in self.speeds else []
        if device.startswith("cuda") and not link:
            return None
        if state == "cold":
            storage = [(kind, self.speeds[kind]) for kind in STORAGE if kind in self.speeds]
            source = max(storage, key=lambda item: item[1], default=None)
        else:
            source = ("cached", self.speeds["cached"]) if "cached" in self.speeds and not mapped else None
        return min([source, *link], key=lambda item: item[1]) if source is not None else None


class CeilingProbe:
    """Measures one model's ceilings, round by round.

    Args:
        files: of the model; the largest stands for all.
        device: where loads go.
    """

    def __init__(self, files: Sequence[FoundFile], device: str) -> None:
        self._file = max(files, key=lambda file: file.size_bytes)
        self._device = device
        processors = available_processors()
        points = {min(max(count, _WORKERS_MIN), _WORKERS_MAX) for count in (_WORKERS_USUAL, processors, 2 * processors)}
        self._points: dict[bool, list[int]] = {False: sorted(points), True: sorted(points)}

    def storage(self, *, cached: bool) -> Ceilings:
        """Read the largest file from storage, or out of the page cache if it is there.

        Args:
            cached: it is there.
        """
        best: dict[str, tuple[float, int]] = {}
        notes: dict[str, str] = {}
        wanted = ("cached",) if cached else STORAGE
        for workers in self._points[cached]:
            found = storage_speeds(self._file.path, seconds=_SECONDS, workers=workers)
            notes.update(found.notes)
            for kind in wanted:
                if kind in found.storage:
                    best[kind] = max(best.get(kind, (0.0, 0)), (found.storage[kind], workers))
        self._points[cached] = sorted({workers for _, workers in best.values()}) or self._points[cached]
        if cached and not best:
            notes["cached"] = "what the page cache holds of the file is unknown"
        speeds = {kind: speed for kind, (speed, _) in best.items()}
        return Ceilings(speeds, {kind: why for kind, why in notes.items() if kind in wanted})

    def link(self) -> Ceilings:
        """Copies out of pinned memory, in a process of their own; nothing for devices without a link."""
        if not self._device.startswith("cuda"):
            return Ceilings()
        request = {"loader": "link", "device": self._device, "touch": ""}
        try:
            with Worker(request, {}) as worker:
                worker.hear("ready", START_SECONDS)
                worker.say("go")
                told = worker.hear("loaded", _LINK_SECONDS)
        except WorkerFailure as err:
            return Ceilings(notes={"link": str(err)})
        return Ceilings({"link": told["gigabytes_per_second"]})
