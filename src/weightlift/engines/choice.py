"""Which engine carries out a load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlift.engines.native import NativeEngine, native_library
from weightlift.types import EngineName

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.device_operations import Devices, SlotMemory
    from weightlift.engines.reader import Reader
    from weightlift.operations import Engine, ShardSource


def make_engine(
    requested: EngineName,
    sources: Sequence[ShardSource],
    slots: SlotMemory,
    worker_room: int,
    *,
    reader: Reader | None = None,
    devices: Devices | None = None,
) -> Engine:
    """The engine asked for; ``auto`` takes the native one where it was built.

    Raises:
        UnsupportedError: the native engine was asked for and is not there.
    """
    python = reader is not None or requested is EngineName.PYTHON
    if not python and (requested is EngineName.NATIVE or not isinstance(native_library(), str)):
        return NativeEngine(sources, slots, worker_room, devices)
    # Where it is not used, importing it would be a good part of what the first load of a process takes.
    from weightlift.engines.python import PythonEngine

    return PythonEngine(sources, slots, worker_room, reader, devices)
