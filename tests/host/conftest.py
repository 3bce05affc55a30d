"""Files whose pages really come and go, and recorded trees of other machines' /proc and /sys."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from weightlift.host import kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


@pytest.fixture
def plant(tmp_path: Path) -> Callable[[Mapping[str, str]], Path]:
    """Write a recorded tree, given as contents by path, and return its root; ``-> target`` makes a symbolic link."""

    def write(tree: Mapping[str, str]) -> Path:
        root = tmp_path / "root"
        for name, text in tree.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if text.startswith("-> "):
                file.symlink_to(text.removeprefix("-> "))
            else:
                file.write_text(text)
        return root

    return write


class CachedFile:
    """A file on a disk, written out and absent from the page cache, open without read-ahead."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        path.write_bytes(random.Random(7).randbytes(size_bytes))
        self.fd = os.open(path, os.O_RDWR)
        os.fsync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def warm(self, offset: int, length: int) -> None:
        """Read a range through the page cache."""
        assert len(os.pread(self.fd, length, offset)) == length


@pytest.fixture
def make_file(tmp_path: Path) -> Iterator[Callable[[int], CachedFile]]:
    made: list[CachedFile] = []

    def make(size_bytes: int) -> CachedFile:
        file = CachedFile(tmp_path / f"file{len(made)}", size_bytes)
        made.append(file)
        try:
            found = kernel.cachestat(file.fd, 0, 0)
        except OSError as err:
            pytest.skip(f"cachestat is forbidden here: {err}")
        if found is None:
            pytest.skip("this system has no cachestat")
        if found.cached:
            pytest.skip(f"the file system under {tmp_path} keeps pages it is asked to drop (tmpfs?)")
        return file

    yield make
    for file in made:
        os.close(file.fd)
