"""Questions to files that are asked together: trial reads, and how much of a range the page cache holds.

Owns the form of a question and the plain way of asking it. An engine may have a quicker way, with the same answers.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from weightlift.host import kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    RunProbes = Callable[[Sequence["Probe"]], list[int]]


class Probe(NamedTuple):
    """One question to an open file.

    Attributes:
        fd: its descriptor.
        offset: start of the range in bytes.
        length: of the range in bytes, more than 0.
        address: memory for one read of the range; 0 asks instead how many of its pages are cached.
    """

    fd: int
    offset: int
    length: int
    address: int = 0


def run_probes(probes: Sequence[Probe]) -> list[int]:
    """Ask one after the other.

    Returns:
        For each, the bytes read or the pages cached; a negative number is the system's error, ``-ENOSYS`` where it
        lacks the call.
    """
    return [_ask(probe) for probe in probes]


def _ask(probe: Probe) -> int:
    if probe.address and not hasattr(os, "preadv"):
        return -errno.ENOSYS
    try:
        if probe.address:
            buffer = (ctypes.c_ubyte * probe.length).from_address(probe.address)
            return os.preadv(probe.fd, [buffer], probe.offset)
        stat = kernel.cachestat(probe.fd, probe.offset, probe.length)
    except OSError as err:
        return -(err.errno or errno.EIO)
    return -errno.ENOSYS if stat is None else stat.cached
