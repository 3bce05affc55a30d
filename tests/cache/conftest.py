"""Files on a disk whose pages really come and go."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from weightlift.host import residency

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def forget(path: Path) -> None:
    """Write a file out and drop it from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached(path: Path) -> int | None:
    """Bytes of a file in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return residency.residency(descriptor, path.stat().st_size)
    finally:
        os.close(descriptor)


@pytest.fixture
def cold_file(tmp_path: Path) -> Callable[[str, int], Path]:
    """Writes a file of a size that is not cached afterwards."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot drop page cache")

    def make(name: str, size: int) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(size).randbytes(size))
        forget(path)
        if cached(path) != 0:
            pytest.skip(f"the file system under {tmp_path} keeps pages it is asked to drop, or does not tell")
        return path

    return make


@pytest.fixture
def count_cached() -> Callable[[Path], int | None]:
    """The function :func:`cached`."""
    return cached
