"""One load for ``bug.py``, in a process of its own: imports first, then the load on command.

Owns the ways of loading, and the stand-in for a GPU driver that takes a mapping's permission for the intent to write:
it faults the source of every copy in with ``MADV_POPULATE_WRITE``, which does to a private writable mapping what HIP
on amdgpu and unified memory on NVIDIA were seen to do. Without a GPU there is nothing to copy to, so the bytes end
there.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MADV_POPULATE_WRITE = 23
PAGE = os.sysconf("SC_PAGE_SIZE")


def pin_for_writing(address: int, nbytes: int) -> None:
    """What those drivers do to the source of a copy."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = address & -PAGE
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(address + nbytes - first), MADV_POPULATE_WRITE):
        raise OSError(ctypes.get_errno(), "MADV_POPULATE_WRITE")


def touch(address: int, nbytes: int) -> None:
    """Read one byte of every page, as a copy that is innocent does."""
    pages = (ctypes.c_ubyte * nbytes).from_address(address)
    sum(pages[::PAGE])


def by_safetensors(source: Callable[[int, int], None]) -> Callable[[Sequence[str]], None]:
    """Load tensor by tensor through the library, with a driver that treats every source in some way."""
    import torch  # noqa: F401
    from safetensors import safe_open

    def load(files: Sequence[str]) -> None:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    tensor = opened.get_tensor(name)
                    source(tensor.data_ptr(), tensor.nbytes)

    return load


def by_weightlift(method: str) -> Callable[[Sequence[str]], None]:
    """Load by one of weightlift's read paths; sources of copies are its slots, which are within the budget anyway."""
    import weightlift
    from weightlift.testing import TensorSpec, write_checkpoint

    options: dict[str, Any] = {"device": "null", "method": method, "cache": "drop"}
    with tempfile.TemporaryDirectory() as folder:
        # Only to have everything imported.
        weightlift.load(write_checkpoint(f"{folder}/first.safetensors", [TensorSpec("x", "U8", (4096,))]), **options)

    def load(files: Sequence[str]) -> None:
        for file in files:
            weightlift.load(file, **options)

    return load


WAYS: dict[str, Callable[[], Callable[[Sequence[str]], None]]] = {
    "safetensors, pinned": lambda: by_safetensors(pin_for_writing),
    "safetensors": lambda: by_safetensors(touch),
    "mmap": lambda: by_weightlift("mmap"),
    "buffered": lambda: by_weightlift("buffered"),
    "direct": lambda: by_weightlift("direct"),
}


def main() -> None:
    """Say ``ready``, wait for a line, load, say ``done``."""
    way, *files = sys.argv[1:]
    load = WAYS[way]()
    print("ready", flush=True)
    sys.stdin.readline()
    load(files)
    print("done", flush=True)


if __name__ == "__main__":
    main()
