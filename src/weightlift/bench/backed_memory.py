"""Having a virtual machine's memory backed by its host before a load.

Such a host takes free memory back within seconds ("free page reporting"), and the first touch afterwards is many times
slower than an ordinary page fault; whoever runs next would pay for it. So memory is touched and freed again right
before each load. On machines of their own nothing is done.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path
from typing import Final

from weightlift.health.cache.warm import spare_memory
from weightlift.host import kernel
from weightlift.host.cgroup import read_text
from weightlift.units import MIB, PAGE_BYTES, align_down

_PIECE_BYTES: Final = 256 * MIB
_SHARE: Final = 0.8


def is_virtual(root: Path = Path("/")) -> bool:
    """Whether this is a virtual machine, as far as the processor tells."""
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith(("flags", "Features")):
            return "hypervisor" in line.split()
    return False


def back_memory(nbytes: int) -> int:
    """Touch memory that is free and free it again, in pieces, so that an interrupt is heard; returns how much."""
    spare = spare_memory()
    total = align_down(nbytes if spare is None else min(nbytes, int(spare * _SHARE)), PAGE_BYTES)
    done = 0
    with contextlib.ExitStack() as stack:
        while done < total:
            size = min(_PIECE_BYTES, total - done)
            piece = stack.enter_context(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            try:
                piece.madvise(mmap.MADV_HUGEPAGE)
                piece.madvise(kernel.MADV_POPULATE_WRITE)
            except (OSError, AttributeError):
                break
            done += size
    return done
