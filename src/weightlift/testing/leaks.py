"""Finds what a piece of code leaves behind in its process: descriptors, threads, mappings of files."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE_SECONDS: Final = 10.0


def held(folder: Path) -> Counter[str]:
    """What this process holds: files open or mapped under ``folder``, and threads."""
    found: Counter[str] = Counter(f"thread {thread.name}" for thread in threading.enumerate())
    if sys.platform != "linux":
        return found
    found["threads"] = len(os.listdir("/proc/self/task"))
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{number}")
            if name.startswith(str(folder)):
                found[f"open {name}"] += 1
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, _, name = line.partition(str(folder))
        if name:
            found[f"mapped {folder}{name}"] += 1
    return found


@contextlib.contextmanager
def nothing_left_behind(folder: Path) -> Iterator[None]:
    """Fail if code leaves files under ``folder`` open or mapped, or threads running.

    Raises:
        AssertionError: names what is left.
    """
    before = held(folder)
    yield
    deadline = time.monotonic() + _PATIENCE_SECONDS
    # The system takes a moment to bury a thread that has been joined.
    while left := held(folder) - before:
        gc.collect()
        assert time.monotonic() < deadline, f"left behind: {dict(left)}"
