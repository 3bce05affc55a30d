"""Questions to files that are asked together: trial reads, how much of a range the page cache holds, reading ahead.

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
        ahead: ask the system to read the range into the page cache by itself, of which it may start with a part.
    """

    fd: int
    offset: int
    length: int
    address: int = 0
    ahead: bool = False


def run_probes(probes: Sequence[Probe]) -> list[int]:
    """Ask one after the other.

    Returns:
        For each, the bytes read, the pages cached or 0; a negative number is the system's error, ``-ENOSYS`` where it
        lacks the call.
    """
    return [_ask(probe) for probe in probes]


def _read_ahead(probe: Probe) -> int:
    os.posix_fadvise(probe.fd, probe.offset, probe.length, os.POSIX_FADV_WILLNEED)
    return 0


def _ask(probe: Probe) -> int:
    try:
        if probe.ahead:
            return _read_ahead(probe) if hasattr(os, "posix_fadvise") else -errno.ENOSYS
        if probe.address and not hasattr(os, "preadv"):
            return -errno.ENOSYS
        if probe.address:
            buffer = (ctypes.c_ubyte * probe.length).from_address(probe.address)
            return os.preadv(probe.fd, [buffer], probe.offset)
        stat = kernel.cachestat(probe.fd, probe.offset, probe.length)
    except OSError as err:
        return -(err.errno or errno.EIO)
    return -errno.ENOSYS if stat is None else stat.cached
