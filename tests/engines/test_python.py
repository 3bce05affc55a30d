"""The Python engine keeps the guarantees of every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlift.engines.python import PythonEngine
from weightlift.testing.conformance import EngineConformance
from weightlift.testing.device_conformance import DeviceConformance
from weightlift.testing.trace_conformance import TraceConformance

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from weightlift.device_operations import Devices, SlotMemory
    from weightlift.host.gpu import Kind
    from weightlift.operations import ShardSource


class TestPythonEngine(TraceConformance, EngineConformance):
    def make_engine(self, shards: Sequence[ShardSource], slots: SlotMemory, worker_room: int) -> PythonEngine:
        return PythonEngine(shards, slots, worker_room)


class TestPythonEngineOnDevices(DeviceConformance):
    def make_engine(
        self, shards: Sequence[ShardSource], slots: SlotMemory, worker_room: int, devices: Devices
    ) -> PythonEngine:
        return PythonEngine(shards, slots, worker_room, devices=devices)

    def calls_with_the_interpreter_lock(self, kind: Kind) -> Collection[str]:
        return ("SetDevice", "MemcpyAsync", "EventRecord", "EventQuery") if kind == "cuda" else ()
