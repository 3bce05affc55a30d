"""The Python engine keeps the guarantees of every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlift.engines.python import PythonEngine
from weightlift.testing.conformance import EngineConformance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.operations import ShardSource, SlotMemory


class TestPythonEngine(EngineConformance):
    def make_engine(self, shards: Sequence[ShardSource], slots: SlotMemory, worker_room: int) -> PythonEngine:
        return PythonEngine(shards, slots, worker_room)
