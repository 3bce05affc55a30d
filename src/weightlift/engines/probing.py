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
    # Counting pages waits for nobody, and takes less time than getting the interpreter lock back beside a busy thread.
    held = (
        not any(probe.address or probe.ahead for probe in probes)
        and sum(probe.length for probe in probes) <= _HELD_BYTES_MAX
    )
    ask = library.wl_probe_now if held else library.wl_probe
    ask(table, len(probes), min(available_processors(), _THREADS_MAX))
    return [entry.result for entry in table[: len(probes)]]
