"""Which way of filling the page cache is fastest and complete: ``python benchmarks/warm.py``.

Writes ``benchmarks/results/warm.json``. Compared on a disk made of memory, or in ``--folder``: weightlift's own reads,
plain reads by several threads, ``posix_fadvise(WILLNEED)`` in pieces of several sizes, and populating a mapping. What
counts is what is cached afterwards, by ``cachestat``, and the time until every page of it can be read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import environment
import tables

from weightlift.bench.backed_memory import back_memory

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).resolve().parent / "results" / "warm.json"
MIB: Final = 1 << 20
LANE_BYTES: Final = 64 * MIB
SPARE_BYTES: Final = 192 * MIB
MADV_POPULATE_READ: Final = 22


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of the file (default 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way (default 5)")
    parser.add_argument("--folder", type=Path, help="use this folder instead of a disk of memory")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    return parser.parse_args()


def by_weightlift(path: Path) -> None:
    """``weightlift cache warm``."""
    from weightlift.health.cache.files import find_files
    from weightlift.health.cache.warm import warm

    warm(find_files([path]))


def by_threads(path: Path, workers: int, piece: Callable[[int, int, int], None], piece_bytes: int) -> None:
    """Threads that each take lanes of the file and go through them piece by piece."""
    lanes = list(range(0, path.stat().st_size, LANE_BYTES))
    lock = threading.Lock()

    def work() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        while True:
            with lock:
                if not lanes:
                    break
                start = lanes.pop(0)
            end = min(start + LANE_BYTES, size)
            for offset in range(start, end, piece_bytes):
                piece(descriptor, offset, min(piece_bytes, end - offset))
        os.close(descriptor)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def reads(workers: int) -> Callable[[Path], None]:
    """Plain reads of 4 MiB."""
    return lambda path: by_threads(path, workers, _read, 4 * MIB)


def _read(descriptor: int, offset: int, size: int) -> None:
    os.pread(descriptor, size, offset)


def will_need(workers: int, piece_bytes: int) -> Callable[[Path], None]:
    """Advice to read ahead."""
    return lambda path: by_threads(
        path,
        workers,
        lambda fd, offset, size: os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED),
        piece_bytes,
    )


def populate(path: Path) -> None:
    """A mapping whose pages the kernel reads in one call."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        mapping.madvise(MADV_POPULATE_READ)


WAYS: Final[dict[str, Callable[[Path], None]]] = {
    "weightlift cache warm": by_weightlift,
    "read, 1 thread": reads(1),
    "read, 4 threads": reads(4),
    "WILLNEED 1 MiB, 1 thread": will_need(1, MIB),
    "WILLNEED 1 MiB, 4 threads": will_need(4, MIB),
    "WILLNEED 16 MiB, 1 thread": will_need(1, 16 * MIB),
    "MADV_POPULATE_READ": populate,
}


def measure(path: Path, fill: Callable[[Path], None]) -> dict[str, Any]:
    """One run from a cold file: seconds until what was fetched can be read, and how much of the file that is."""
    from weightlift.host import residency

    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    left = residency.residency(descriptor, size)
    assert left == 0, f"{left} bytes stayed cached"
    back_memory(2 * size)
    begin, processor = time.perf_counter(), time.process_time()
    fill(path)
    cached = residency.residency(descriptor, size)
    # A page that is cached may still be on its way; its first byte can be read once it has arrived.
    if cached == size:
        for offset in range(0, size, MIB):
            os.pread(descriptor, 1, offset)
    seconds = time.perf_counter() - begin
    os.close(descriptor)
    assert cached is not None
    return {
        "seconds": seconds,
        "processor_seconds": time.process_time() - processor,
        "cached_fraction": cached / size,
        "gigabytes_per_second": cached / seconds / 1e9,
    }


def main() -> None:
    """Measure every way in turn, round by round, and write the results."""
    from weightlift.testing.fast_disk import fast_disk

    chosen = arguments()
    size = chosen.size * MIB
    with contextlib.ExitStack() as stack:
        if chosen.folder:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=chosen.folder)))
        else:
            folder = stack.enter_context(fast_disk(size + SPARE_BYTES))
        path = folder / "file"
        with path.open("wb") as file:
            block = os.urandom(MIB)
            for _ in range(chosen.size):
                file.write(block)
        taken = environment.record(folder)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
        for _ in range(chosen.rounds):
            for name, fill in WAYS.items():
                runs[name].append(measure(path, fill))
    cases = [
        {
            "way": name,
            "gigabytes_per_second": statistics.median(run["gigabytes_per_second"] for run in found),
            "cached_fraction": min(run["cached_fraction"] for run in found),
            "runs": found,
        }
        for name, found in runs.items()
    ]
    result = {"schema": 1, "taken": taken, "bytes": size, "rounds": chosen.rounds, "cases": cases}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    for case in cases:
        tables.CONSOLE.print(
            f"{case['way']:<26} {case['gigabytes_per_second']:5.2f} GB/s  cached {case['cached_fraction']:.1%}"
        )
    tables.CONSOLE.print(f"written: {chosen.output}")


if __name__ == "__main__":
    main()
