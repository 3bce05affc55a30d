"""What every engine has to keep about pausing and tracing, as a test class to inherit.

It goes with ``EngineConformance``, which has the bench::

class TestMyEngine(TraceConformance, EngineConformance):
    ...
"""

# ruff: noqa: D102 - the names of tests say what they show
from __future__ import annotations

import ctypes
import mmap
import sys
import time
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from weightlift.operations import ChunkReady, Engine, ExtentDone, ReadPath, Sink
from weightlift.steps import StepKind
from weightlift.testing.bench import Bench, Landing
from weightlift.testing.conformance import HOST_SINKS, PATIENCE_SECONDS, RANGES, run_to_end, stop, wait_for
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.device_operations import SlotMemory
    from weightlift.operations import ShardSource


def _pages_held(slots: SlotMemory, slot: int) -> bool:
    """Whether any page of a slot is in memory."""
    vector = ctypes.create_string_buffer(slots.slot_bytes // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(slots.address + slot * slots.slot_bytes)
    assert libc.mincore(address, ctypes.c_size_t(slots.slot_bytes), vector) == 0
    return any(entry & 1 for entry in vector.raw[:-1])


class TraceConformance(ABC):
    """That an engine can be held and trimmed, and that its trace is complete."""

    @abstractmethod
    def make_engine(self, shards: Sequence[ShardSource], slots: SlotMemory, worker_room: int) -> Engine:
        """A new engine."""

    @pytest.mark.parametrize("lane", [False, True])
    def test_without_workers_nothing_is_read_until_there_are_more(self, bench: Bench, *, lane: bool) -> None:
        engine = self.make_engine([bench.source], bench.pool(1, 64 * KIB), 2)
        engine.set_limits(0, 64 * KIB)
        extent = bench.extent(ReadPath.BUFFERED, Sink.PLACE, MIB, MIB + 3)._replace(lane=lane)
        engine.submit([extent])
        assert engine.poll(0.02) == []
        assert (engine.counters().claimed_bytes, engine.counters().workers) == (0, 0)
        engine.set_limits(1, 64 * KIB)
        while engine.counters().read_bytes == 0:
            engine.poll(0)
        engine.set_limits(0, 64 * KIB)
        claimed = engine.counters().claimed_bytes
        deadline = time.monotonic() + PATIENCE_SECONDS
        while engine.counters().landed_bytes < claimed:
            engine.poll(0.01)
            assert time.monotonic() < deadline, "what was begun has to land"
        engine.poll(0.02)
        assert engine.counters().claimed_bytes == claimed, "a chunk was read though no worker may"
        engine.set_limits(2, 64 * KIB)
        while engine.counters().landed_bytes < extent.length:
            engine.poll(0.01)
            assert time.monotonic() < deadline, "reading has to go on"
        stop(engine)
        bench.check_memory()

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems keep memory that was touched")
    def test_trimming_gives_back_free_slots_and_no_others(self, bench: Bench) -> None:
        slots = bench.pool(3, 256 * KIB)
        engine = self.make_engine([bench.source], slots, 3)
        engine.set_limits(3, 256 * KIB)
        engine.submit([bench.extent(ReadPath.BUFFERED, Sink.HAND_OVER, 0, 3 * 256 * KIB)])
        chunks = [event for event in wait_for(engine, 3, ChunkReady) if isinstance(event, ChunkReady)]
        engine.return_slot(chunks[0].slot)
        engine.return_slot(chunks[1].slot)
        engine.trim()
        held = {chunk.slot for chunk in chunks if _pages_held(slots, chunk.slot)}
        assert held == {chunks[2].slot}
        bench.check_chunk(chunks[2])
        engine.return_slot(chunks[2].slot)
        again = bench.extent(ReadPath.BUFFERED, Sink.PLACE, MIB, MIB)
        engine.submit([again])
        wait_for(engine, 1, ExtentDone)
        stop(engine)
        bench.check_memory()

    @pytest.mark.parametrize("sink", HOST_SINKS)
    def test_a_trace_has_every_chunk(self, bench: Bench, sink: Sink) -> None:
        engine = self.make_engine([bench.source], bench.pool(2, 64 * KIB), 3)
        engine.trace(1000)
        engine.set_limits(3, 64 * KIB)
        extents = [
            bench.extent(ReadPath.BUFFERED, sink, offset, length, fresh=sink is Sink.PLACE) for offset, length in RANGES
        ]
        engine.submit(extents)
        run_to_end(engine, len(extents), Landing(bench.contents))
        engine.cancel()
        assert engine.join(PATIENCE_SECONDS) == 0
        steps = engine.steps()
        kept, counters = list(steps), engine.counters()
        engine.close()
        assert (len(steps), steps.lost) == (len(kept), 0)
        reads = sorted((step.offset, step.length) for step in kept if step.kind is StepKind.READ)
        assert len(reads) == counters.reads
        for extent in sorted(extents):
            position = extent.offset
            while position < extent.offset + extent.length:
                offset, length = reads.pop(0)
                assert offset == position
                position += length
        assert reads == []
        assert (sum(step.kind is StepKind.COPY for step in kept) == counters.reads) == (sink is Sink.COPY)
        for worker in {step.worker for step in kept}:
            mine = sorted((step.start, step.end) for step in kept if step.worker == worker)
            assert all(0 <= start <= end for start, end in mine)
            assert all(end <= start for (_, end), (start, _) in pairwise(mine)), "one worker did two things at once"
        assert all((step.shard, step.path) == (0, ReadPath.BUFFERED) for step in kept if step.length)

    def test_a_long_trace_keeps_its_end(self, bench: Bench) -> None:
        engine = self.make_engine([bench.source], bench.pool(1, 64 * KIB), 1)
        engine.trace(5)
        engine.set_limits(1, 64 * KIB)
        engine.submit([bench.extent(ReadPath.BUFFERED, Sink.DISCARD, 0, 20 * 64 * KIB)])
        run_to_end(engine, 1, Landing(bench.contents))
        engine.cancel()
        assert engine.join(PATIENCE_SECONDS) == 0
        steps = engine.steps()
        assert [step.offset for step in steps] == [number * 64 * KIB for number in range(15, 20)]
        assert (len(steps), steps.lost) == (5, 15)
        engine.close()

    def test_nothing_is_kept_unless_asked_for(self, bench: Bench) -> None:
        engine = self.make_engine([bench.source], bench.pool(4, 64 * KIB), 3)
        engine.set_limits(3, 64 * KIB)
        engine.submit([bench.extent(ReadPath.BUFFERED, Sink.DISCARD, 0, MIB)])
        run_to_end(engine, 1, Landing(bench.contents))
        engine.cancel()
        assert engine.join(PATIENCE_SECONDS) == 0
        assert (list(engine.steps()), engine.steps().lost) == ([], 0)
        engine.close()
