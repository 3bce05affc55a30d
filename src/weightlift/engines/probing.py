"""Questions to files, asked by several threads of the compiled engine where it is there."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from weightlift.engines.native import native_library
from weightlift.host.memory import available_processors
from weightlift.host.probes import run_probes as probes_one_by_one

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.host.probes import Probe

_THREADS_MAX: Final = 8
"""More take longer to start than they save."""

_THREAD_BYTES: Final = 256 << 20
"""Counting the cached pages of less is done sooner than a thread has started."""

_THREAD_WAITS: Final = 8
"""As many questions that wait for storage are worth a thread."""

_HELD_BYTES_MAX: Final = 16 << 30


class _Probe(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_int32),
        ("ahead", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("result", ctypes.c_int64),
    )


def run_probes(probes: Sequence[Probe]) -> list[int]:
    """See :func:`weightlift.host.probes.run_probes`; done by several threads in one call where the library is there."""
    library = native_library()
    if isinstance(library, str):
        return probes_one_by_one(probes)
    table = (_Probe * max(1, len(probes)))()
    for entry, probe in zip(table, probes, strict=False):
        entry.fd, entry.offset, entry.length, entry.address, entry.ahead = probe
    waits = sum(1 for probe in probes if probe.address or probe.ahead)
    nbytes = sum(probe.length for probe in probes)
    threads = min(1 + nbytes // _THREAD_BYTES + waits // _THREAD_WAITS, _THREADS_MAX)
    # Counting pages waits for nobody, and takes less time than getting the interpreter lock back beside a busy thread.
    ask = library.wl_probe_now if not waits and nbytes <= _HELD_BYTES_MAX else library.wl_probe
    ask(table, len(probes), min(available_processors(), threads) if threads > 1 else 1)
    return [entry.result for entry in table[: len(probes)]]
