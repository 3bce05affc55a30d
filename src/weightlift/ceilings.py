"""How fast this machine's storage, memory and links are known to be, as probed by this process and nobody else.

Owns a table that lives as long as the process. Measures nothing: ``weightlift.health.probes`` writes what it finds,
the report of a load reads it. Nothing is remembered beyond the process, since a figure of yesterday may be of another
drive, and nothing is guessed: what was not probed is unknown.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_lock = threading.Lock()
_storage: dict[int, float] = {}
_links: dict[str, float] = {}
_memory_copy: list[float] = []


def remember_storage(device: int, gigabytes_per_second: float) -> None:
    """Keep how fast files on a device (``st_dev``) can be read; the fastest figure of several counts."""
    with _lock:
        _storage[device] = max(gigabytes_per_second, _storage.get(device, 0.0))


def remember_memory_copy(gigabytes_per_second: float) -> None:
    """Keep how fast memory is copied by all processors together."""
    with _lock:
        _memory_copy[:] = [gigabytes_per_second]


def remember_link(device: str, gigabytes_per_second: float) -> None:
    """Keep how fast pinned memory is copied to a device, named like ``cuda:0``."""
    with _lock:
        _links[device] = gigabytes_per_second


def forget() -> None:
    """Know nothing again."""
    with _lock:
        _storage.clear()
        _links.clear()
        _memory_copy.clear()


def known_ceilings(storage_devices: Iterable[int], devices: str) -> dict[str, float | None]:
    """The limits that apply to one load, in GB/s; ``None`` where one was never probed.

    Args:
        storage_devices: what the files are on (``st_dev``); several drives are read at the same time, so that no one
            figure holds for them.
        devices: the names of the load's destinations, as its report has them.
    """
    with _lock:
        drives = set(storage_devices)
        links = [_links.get(name) for name in devices.split(", ") if name not in {"cpu", "null"}]
        return {
            "storage": _storage.get(next(iter(drives))) if len(drives) == 1 else None,
            "memory_copy": _memory_copy[0] if _memory_copy else None,
            "link": sum(link or 0.0 for link in links) if links and None not in links else None,
        }
