"""Having a virtual machine's memory backed by its host before a load.

Such a host takes free memory back within seconds ("free page reporting"), and the first touch afterwards is many times
slower than an ordinary page fault; whoever runs next would pay for it. So memory is touched and freed again right
before each load. On machines of their own nothing is done.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from weightlift.buffers import SlotPool
from weightlift.errors import InsufficientMemoryError
from weightlift.health.cache.warm import spare_memory
from weightlift.host import kernel
from weightlift.host.cgroup import read_text
from weightlift.host.memory import available_processors
from weightlift.units import MIB, PAGE_BYTES, align_down

_PIECE_BYTES: Final = 256 * MIB
_SHARE: Final = 0.8
_THREADS: Final = 8


def is_virtual(root: Path = Path("/")) -> bool:
    """Whether this is a virtual machine, as far as the processor tells."""
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith(("flags", "Features")):
            return "hypervisor" in line.split()
    return False


def back_memory(nbytes: int) -> int:
    """Touch memory that is free and free it again, by several threads in pieces; returns how much."""
    spare = spare_memory()
    total = align_down(nbytes if spare is None else min(nbytes, int(spare * _SHARE)), PAGE_BYTES)
    if total <= 0:
        return 0
    try:
        memory = SlotPool(1, total)
    except InsufficientMemoryError:
        return 0
    threads = ThreadPoolExecutor(min(_THREADS, available_processors()))
    begin = memory.memory.address
    try:
        return sum(
            threads.map(
                lambda start: _populate(begin + start, min(_PIECE_BYTES, total - start)), range(0, total, _PIECE_BYTES)
            )
        )
    finally:
        # An interrupt is heard between pieces; nobody may be touching what is freed.
        threads.shutdown(cancel_futures=True)
        memory.close()


def _populate(address: int, length: int) -> int:
    return length if kernel.advise_memory(address, length, kernel.MADV_POPULATE_WRITE) else 0
