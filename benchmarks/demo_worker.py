"""One measurement of the demonstration, in a process of its own.

The request is one JSON object as the only argument, the answer one JSON object on standard output. Cold and warm are
verified against the kernel before the load; afterwards every tensor is compared with what the safetensors library
reads.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import states

from weightlift.bench.backed_memory import back_memory
from weightlift.bench.cache_states import StateNotReached

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import weightlift

LIBRARY: Final = "safetensors"
SAMPLE_SECONDS: Final = 0.004


class PeakMemory(threading.Thread):
    """Keeps the largest anonymous and file-backed memory of this process, as growth over its start, until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._start = self._now()
        self.anonymous_bytes = self.file_bytes = 0

    @staticmethod
    def _now() -> tuple[int, int]:
        from weightlift.host.memory import process_memory

        memory = process_memory()
        return (memory.anonymous_bytes, memory.file_bytes) if memory else (0, 0)

    def look(self) -> None:
        """Take one sample."""
        anonymous, file = self._now()
        self.anonymous_bytes = max(self.anonymous_bytes, anonymous - self._start[0])
        self.file_bytes = max(self.file_bytes, file - self._start[1])

    def run(self) -> None:
        """Sample until stopped."""
        while not self._done.wait(SAMPLE_SECONDS):
            self.look()

    def stop(self) -> None:
        """Take the last sample and end."""
        self._done.set()
        self.join()
        self.look()


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the files into the wanted state, load them, check every tensor, and say what was seen."""
    import ml_dtypes  # noqa: F401 - teaches numpy the types it lacks; no part of a load
    import numpy as np
    from safetensors.numpy import load_file

    # The package imports its parts when first used, which is no part of a load.
    from weightlift import load

    files, method = request["files"], request["method"]
    state = states.CacheState(request["state"])
    # A cold load takes memory for the tensors and for the page cache; a warm one finds its files there.
    back_memory(request["bytes"] * (2 if state is states.CacheState.COLD else 1))
    prepared, before = states.prepare(files, state)
    peak = PeakMemory()
    peak.start()
    started = time.perf_counter()
    tensors: dict[str, Any] = {}
    report: weightlift.LoadReport | None = None
    if method == LIBRARY:
        for file in files:
            tensors.update(load_file(file))
    else:
        loaded = load(request["path"], method=method, framework="numpy")
        tensors, report = loaded, loaded.report
        if method == "mmap":
            touch(np, tensors)
    seconds = time.perf_counter() - started
    peak.stop()
    stored = sum(tensor.nbytes for tensor in tensors.values())
    owned = 0 if method == "mmap" else stored
    return {
        "seconds": seconds,
        "gigabytes_per_second": stored / seconds / 1e9,
        # What the load itself saw counts too: it knows at every moment how much has landed in tensors by then.
        "anonymous_bytes": max(
            peak.anonymous_bytes - owned, (report.host_memory.peak_anonymous_bytes or 0) if report else 0
        ),
        "file_bytes": peak.file_bytes,
        "cached_before": (before.cached_bytes or 0) / prepared.total_bytes,
        "cached_after_bytes": prepared.cached_bytes(),
        "used": [name for name, size in report.method_used.items() if size] if report else [],
        "reason": report.reason if report else "",
        "checked": check(np, tensors, files) if request["check"] else 0,
    }


def touch(np: Any, tensors: Mapping[str, Any]) -> None:
    """Read a byte of every page of mapped tensors, so that their time is comparable."""
    for tensor in tensors.values():
        int(tensor.reshape(-1).view(np.uint8)[::4096].max(initial=0))


def check(np: Any, tensors: Mapping[str, Any], files: Sequence[str]) -> int:
    """Compare every tensor with what the safetensors library reads, bit for bit; returns how many there are.

    Raises:
        ValueError: one differs, or the names do.
    """
    from safetensors import safe_open

    seen: set[str] = set()
    for file in files:
        with safe_open(file, framework="numpy") as reference:
            for name in reference.keys():  # noqa: SIM118 - this object is no mapping
                ours, theirs = tensors.get(name), reference.get_tensor(name)
                if ours is None or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
                    raise ValueError(f"{name}: data type or shape differs from what safetensors reads")
                if not np.array_equal(ours.reshape(-1).view(np.uint8), theirs.reshape(-1).view(np.uint8)):
                    raise ValueError(f"{name}: bytes differ from what safetensors reads")
                seen.add(name)
    if seen != set(tensors):
        raise ValueError(f"{len(set(tensors) - seen)} tensors were loaded that safetensors does not know")
    return len(seen)


def main(text: str) -> int:
    """Carry out one request and print the result as one JSON object."""
    try:
        result = measure(json.loads(text))
    except (StateNotReached, RuntimeError, OSError, ValueError, MemoryError, AttributeError) as error:
        result = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
