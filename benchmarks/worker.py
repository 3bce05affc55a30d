"""The worker of ``weightlift bench``, with more loaders, a thread that computes beside them, and digests of all bytes.

Runs in other loaders' environments too, where weightlift is not installed and nothing that it depends on.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Last on the path: where weightlift is installed, it is that one which loads.
sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

import digests
import loaders

from weightlift.bench import worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SETTLE_SECONDS = 0.05


@contextlib.contextmanager
def busy_thread(request: Mapping[str, Any]) -> Iterator[None]:
    """A thread beside a load that does nothing but run Python, as a program preparing its model would, if wanted."""
    done = threading.Event()

    def spin() -> None:
        while not done.is_set():
            pass

    if request["busy_thread"]:
        threading.Thread(target=spin, daemon=True).start()
        time.sleep(SETTLE_SECONDS)
    try:
        yield
    finally:
        done.set()


if __name__ == "__main__":
    worker.main(loaders.LOADERS, digests.compare, busy_thread)
