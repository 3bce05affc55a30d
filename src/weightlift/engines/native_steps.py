"""Reading the native engine's ring of steps; it stays in the form the engine writes, and becomes values one by one."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final

from weightlift.steps import Step, StepKind

if TYPE_CHECKING:
    from collections.abc import Iterator

_NANOSECONDS: Final = 1e-9
_NONE: Final = 0xFFFFFFFF


class RawStep(ctypes.Structure):
    """The engine's ``wl_step``."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("shard", ctypes.c_uint32),
        ("slot", ctypes.c_uint32),
        ("worker", ctypes.c_uint32),
        ("kind", ctypes.c_uint8),
        ("path", ctypes.c_uint8),
    )


class NativeSteps:
    """Steps of an engine whose threads have left; see :class:`~weightlift.steps.Steps`.

    Args:
        library: the compiled engine.
        engine: its handle.
        capacity: how many steps it keeps.
    """

    def __init__(self, library: Any, engine: int, capacity: int) -> None:
        noted = library.wl_read_steps(engine, None, 0)
        kept = min(noted, capacity)
        self._raw = (RawStep * kept)()
        library.wl_read_steps(engine, self._raw, kept)
        self.lost = noted - kept

    def __len__(self) -> int:
        return len(self._raw)

    def __iter__(self) -> Iterator[Step]:
        for raw in self._raw:
            yield Step(
                StepKind(raw.kind),
                raw.worker,
                -1 if raw.shard == _NONE else raw.shard,
                -1 if raw.slot == _NONE else raw.slot,
                raw.path,
                raw.offset,
                raw.length,
                raw.start * _NANOSECONDS,
                raw.end * _NANOSECONDS,
            )
