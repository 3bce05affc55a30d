"""The states of the page cache that figures are taken from; one that was not reached raises.

Owns what is half-warm; cold, warm and the looking belong to :mod:`weightlift.bench.cache_states`.
"""

from __future__ import annotations

import enum
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from weightlift.bench.cache_states import ModelFiles, Snapshot, StateNotReached
from weightlift.health.cache.files import find_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STRIPE_BYTES = 16 << 20
READERS = 4
HALF_TOLERANCE = 0.03


class CacheState(enum.StrEnum):
    """Which part of the files is in the page cache before a load."""

    COLD = "cold"
    WARM = "warm"
    HALF = "half-warm"
    AS_LEFT = "as left by the previous load"


def prepare(paths: Sequence[str | Path], state: CacheState) -> tuple[ModelFiles, Snapshot]:
    """Bring files into a state; returns them with what was looked up then.

    Raises:
        StateNotReached: the state was not reached, or the system does not tell.
    """
    files = ModelFiles(find_files(paths))
    if state in {CacheState.COLD, CacheState.HALF}:
        files.make_cold()
    if state is CacheState.WARM:
        files.make_warm()
    if state is CacheState.HALF:
        for file in files.files:
            _read_every_second(file.path, file.size_bytes)
    before = files.snapshot()
    if before.cached_bytes is None:
        raise StateNotReached("the system does not tell what is cached of the files")
    share = before.cached_bytes / files.total_bytes
    if state is CacheState.HALF and abs(share - 0.5) > HALF_TOLERANCE:
        raise StateNotReached(f"{share:.2%} of the files is in the page cache where half was wanted")
    return files, before


def _read_every_second(path: Path, size: int) -> None:
    """Read every second stripe of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Read-ahead would bring in what is to stay absent.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda start: os.pread(descriptor, STRIPE_BYTES, start), range(0, size, 2 * STRIPE_BYTES)))
    finally:
        os.close(descriptor)
