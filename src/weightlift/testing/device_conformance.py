"""What every engine has to keep that copies to devices, as a test class to inherit from.

Runs without a GPU, on the fake runtime of :mod:`weightlift.testing.fake_gpu`, under CUDA's names and under HIP's::

    class TestMyEngineOnDevices(DeviceConformance):
        def make_engine(self, shards, slots, worker_room, devices):
            return MyEngine(shards, slots, worker_room, devices)

Needs pytest and a C compiler, and ``pytest.register_assert_rewrite`` for this module, ``device_bench`` and
``device_faults``, whose tests it includes.
"""

# ruff: noqa: D102, FBT001, PLR0917 - the names of tests say what they show, and their arguments are tables of cases
from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from weightlift.device_operations import SlotState
from weightlift.operations import ChunkReady, ExtentDone, ReadPath, Sink
from weightlift.testing.bench import FILE_BYTES, Landing
from weightlift.testing.conformance import PATIENCE_SECONDS, RANGES, run_to_end, stop, wait_for
from weightlift.testing.device_bench import DEVICES, HookedRuntime
from weightlift.testing.device_faults import DeviceFaults
from weightlift.units import KIB, MIB, PAGE_BYTES

if TYPE_CHECKING:
    from weightlift.testing.device_bench import DeviceBench

CHUNK = 64 * KIB
PENDING = 0xEE


class DeviceConformance(DeviceFaults):
    """The guarantees of :class:`weightlift.operations.Engine` about devices, as tests."""

    @pytest.mark.parametrize(("workers", "streams"), [(1, 1), (4, 1), (4, 3)])
    @pytest.mark.parametrize("chunk_bytes", [16 * KIB, 256 * KIB])
    @pytest.mark.parametrize("lane", [False, True])
    @pytest.mark.parametrize("path", list(ReadPath))
    def test_every_byte_lands_once_at_its_device_address(
        self, bench: DeviceBench, path: ReadPath, lane: bool, chunk_bytes: int, workers: int, streams: int
    ) -> None:
        bench.files.require(path)
        engine = self.start(bench, workers=workers, chunk_bytes=chunk_bytes, streams=streams)
        # Every second one alone on its device: both devices in one pass, and changes between them.
        extents = [
            bench.extent(path, offset, length, index % 2, lane=lane) for index, (offset, length) in enumerate(RANGES)
        ]
        engine.submit(extents)
        events = run_to_end(engine, len(extents), Landing(bench.files.contents))
        counters, use = engine.counters(), engine.shard_use(0)
        stop(engine)
        assert sorted(event.extent for event in events if isinstance(event, ExtentDone)) == list(range(len(extents)))
        bench.check_memory()
        total = sum(extent.length for extent in extents)
        assert (counters.claimed_bytes, counters.landed_bytes) == (total, total)
        by_path = {ReadPath.DIRECT: use.direct_bytes, ReadPath.MAPPED: use.mapped_bytes}
        assert by_path.get(path, use.buffered_bytes) == total
        assert counters.device_seconds > 0
        assert counters.register_seconds > 0
        assert bench.gpu.counters().unregistered_copies == 0

    def test_direct_reads_that_are_refused_go_through_the_cache(self, bench: DeviceBench) -> None:
        bench.files.require(ReadPath.DIRECT)
        if not bench.files.refuses_odd_direct_reads():
            pytest.skip(f"the file system under {bench.files.folder} takes direct reads at any offset")
        bench.files.source = bench.files.source._replace(offset_alignment=1)
        engine = self.start(bench)
        engine.submit([bench.extent(ReadPath.DIRECT, 4097, 3 * CHUNK)])
        run_to_end(engine, 1, Landing(bench.files.contents))
        use = engine.shard_use(0)
        stop(engine)
        bench.check_memory()
        assert use.refused_bytes > 0
        assert use.direct_bytes + use.buffered_bytes == 3 * CHUNK

    def test_entries_are_copied_one_by_one_even_where_they_touch(self, bench: DeviceBench) -> None:
        engine = self.start(bench, workers=1)
        extents = [
            # Neighbours in memory may belong to different allocations, which no copy may span.
            bench.divided(0, 4 * CHUNK, 8),
            # One piece that begins in one chunk and ends in the next, and a gap of more than a chunk.
            bench.table([(5 * CHUNK, 100), (5 * CHUNK + 100, CHUNK), (8 * CHUNK - 3, 3)]),
        ]
        engine.submit(extents)
        run_to_end(engine, len(extents), Landing(bench.files.contents))
        assert engine.counters().landed_bytes == 7 * CHUNK
        stop(engine)
        bench.check_memory()
        assert bench.gpu.calls("MemcpyAsync") == 8 + 4
        assert bench.gpu.calls("EventRecord") == 4 + 3, "a chunk of which nothing is wanted lands as it was read"

    def test_the_current_device_changes_only_where_it_has_to(self, bench: DeviceBench) -> None:
        engine = self.make(bench)
        before = bench.gpu.calls("SetDevice")
        engine.set_limits(1, CHUNK)
        extents = [bench.whole(index * 2 * CHUNK, 2 * CHUNK, device) for index, device in enumerate((0, 0, 1, 0, 0))]
        engine.submit(extents)
        run_to_end(engine, len(extents), Landing(bench.files.contents))
        stop(engine)
        bench.check_memory()
        copied = [bench.gpu.copied_bytes(bench.ordinal(device)) for device in range(DEVICES)]
        assert copied == [8 * CHUNK, 2 * CHUNK]
        assert bench.gpu.calls("SetDevice") - before == self.FIRST_CALLS + 3

    @pytest.mark.parametrize("slots", [1, 2])
    @pytest.mark.parametrize("lane", [False, True])
    def test_fewer_slots_than_workers_are_enough(self, bench: DeviceBench, lane: bool, slots: int) -> None:
        engine = self.start(bench, slots=slots, workers=4)
        extents = []
        for index in range(3):
            first = index * 10 * CHUNK
            extents.append(bench.whole(first, 5 * CHUNK + 1, index % 2, lane=lane))
            extents += [
                bench.files.extent(ReadPath.BUFFERED, sink, first + 6 * CHUNK, 2 * CHUNK + 7)
                for sink in Sink
                if sink is not Sink.DEVICE
            ]
        engine.submit(extents)
        landing = Landing(bench.files.contents)
        run_to_end(engine, len(extents), landing)
        stop(engine)
        bench.check_memory()
        bench.files.check_memory()
        landing.check([extent for extent in extents if extent.sink is Sink.HAND_OVER], CHUNK)

    def test_a_lane_goes_on_while_a_consumer_in_order_keeps_all_other_slots(self, bench: DeviceBench) -> None:
        taken = threading.Event()
        bench.runtime = HookedRuntime(bench.gpu.runtime, before_copy=lambda: taken.wait(PATIENCE_SECONDS))
        engine = self.start(bench, slots=3, workers=4)
        later = bench.files.extent(ReadPath.BUFFERED, Sink.HAND_OVER, 8 * CHUNK, 6 * CHUNK)
        engine.submit([bench.whole(0, 7 * CHUNK, lane=True), later])
        # The lane is in the middle of its first chunk when the others take what slots there are.
        held = [event for event in wait_for(engine, 2, ChunkReady) if isinstance(event, ChunkReady)]
        taken.set()
        done, *rest = wait_for(engine, 1, ExtentDone)
        assert done == ExtentDone(0)
        # The slot that the lane has left.
        held += [event for event in rest if isinstance(event, ChunkReady)]
        landing = Landing(bench.files.contents)
        for chunk in held:
            landing.take(chunk)
            engine.return_slot(chunk.slot)
        run_to_end(engine, 1, landing)
        stop(engine)
        bench.check_memory()
        landing.check([later], CHUNK)

    def test_copies_wait_for_the_events_of_their_destinations(self, bench: DeviceBench) -> None:
        caller, ready = bench.stream(bench.ordinal(0)), bench.event(bench.ordinal(0))
        engine = self.start(bench, workers=1)
        for step in range(2):
            # The same event with another meaning the second time.
            extents = [bench.whole((4 * step + 2 * part) * CHUNK, 2 * CHUNK, ready=ready) for part in range(2)]
            bench.gpu.hold(caller)
            for extent in extents:
                assert extent.copies is not None
                bench.gpu.fill(caller, extent.copies.numbers[2], PENDING, extent.length)
            assert bench.gpu.runtime.record(ready, caller) == 0
            engine.submit(extents)
            bench.gpu.wait_for_calls("EventRecord", (step + 1) * (4 + 1))
            bench.gpu.settle()
            for extent in extents:
                bench.check_untouched(extent)
            assert engine.counters().landed_bytes == 4 * step * CHUNK
            bench.gpu.release(caller)
            run_to_end(engine, len(extents), Landing(bench.files.contents))
        stop(engine)
        bench.check_memory()
        assert bench.gpu.calls("StreamWaitEvent") == 2, "one worker waits once for each meaning"

    @pytest.mark.parametrize(("slots", "workers"), [(1, 1), (2, 1), (3, 2), (4, 4)])
    @pytest.mark.parametrize("lane", [False, True])
    def test_a_slot_is_refilled_only_after_its_copies(
        self, bench: DeviceBench, lane: bool, slots: int, workers: int
    ) -> None:
        engine = self.start(bench, slots=slots, workers=workers)
        bench.gpu.pause()
        # Lanes first, so that every worker has one.
        lanes = workers if lane else 1
        extents = [bench.whole(index * 12 * CHUNK, 12 * CHUNK // lanes, lane=lane) for index in range(lanes)]
        engine.submit(extents)
        bench.gpu.wait_for_calls("EventRecord", slots)
        bench.gpu.wait_for_calls("EventQuery", self.FIRST_CALLS + 1)
        assert engine.poll(0.05) == []
        counters = engine.counters()
        assert (counters.claimed_bytes, counters.landed_bytes) == (slots * CHUNK, 0)
        for extent in extents:
            bench.check_untouched(extent)
        bench.gpu.resume()
        run_to_end(engine, len(extents), Landing(bench.files.contents))
        stop(engine)
        bench.check_memory()

    @pytest.mark.parametrize("workers", [1, 4])
    def test_a_chunk_lands_when_its_copies_have_completed(self, bench: DeviceBench, workers: int) -> None:
        engine = self.start(bench, workers=workers)
        bench.gpu.pause()
        extents = [bench.whole(index * CHUNK, 1000, index % 2) for index in range(3)]
        engine.submit(extents)
        bench.gpu.wait_for_calls("EventRecord", 3)
        bench.gpu.wait_for_calls("EventQuery", self.FIRST_CALLS + 1)
        assert engine.poll(0.05) == []
        assert engine.counters().landed_bytes == 0
        bench.gpu.resume()
        run_to_end(engine, 3, Landing(bench.files.contents))
        assert engine.counters().landed_bytes == 3000
        stop(engine)
        bench.check_memory()

    def test_a_link_that_is_behind_holds_up_no_other(self, bench: DeviceBench) -> None:
        caller, ready = bench.stream(bench.ordinal(0)), bench.event(bench.ordinal(0))
        engine = self.start(bench, slots=4, workers=4)
        bench.gpu.hold(caller)
        assert bench.gpu.runtime.record(ready, caller) == 0
        engine.submit([bench.whole(0, 2 * CHUNK, ready=ready), bench.whole(10 * CHUNK, 20 * CHUNK, 1)])
        assert wait_for(engine, 1, ExtentDone) == [ExtentDone(1)]
        bench.gpu.release(caller)
        run_to_end(engine, 1, Landing(bench.files.contents))
        stop(engine)
        bench.check_memory()

    def test_slots_are_registered_once_and_stay_so_for_the_next_engine(self, bench: DeviceBench) -> None:
        pool = bench.slots(3, CHUNK)
        for first in (0, 1 * MIB):
            engine = self.make_engine([bench.files.source], pool, self.WORKER_ROOM, bench.devices(3))
            engine.set_limits(3, CHUNK)
            engine.submit([bench.extent(ReadPath.BUFFERED, first, 10 * CHUNK)])
            run_to_end(engine, 1, Landing(bench.files.contents))
            spent = engine.counters().register_seconds
            stop(engine)
            bench.check_memory()
            assert (spent > 0) == (first == 0)
        assert pool.states is not None
        # One worker may be quick enough to need no other slot.
        registered = pool.states.count(SlotState.REGISTERED)
        assert bench.gpu.calls("HostRegister") == registered > 0
        counters = bench.gpu.counters()
        assert (counters.registered_bytes, counters.unregistered_copies) == (registered * pool.slot_bytes, 0)
        assert SlotState.REFUSED not in pool.states

    def test_nothing_is_registered_where_the_slots_are_to_stay_pageable(self, bench: DeviceBench) -> None:
        pool = bench.slots(2, CHUNK, registered=False)
        engine = self.make_engine([bench.files.source], pool, self.WORKER_ROOM, bench.devices(2))
        engine.set_limits(2, CHUNK)
        engine.submit([bench.extent(ReadPath.BUFFERED, 5, 3 * CHUNK)])
        run_to_end(engine, 1, Landing(bench.files.contents))
        stop(engine)
        bench.check_memory()
        assert bench.gpu.calls("HostRegister") == 0

    def test_limits_may_change_while_copies_are_under_way(self, bench: DeviceBench) -> None:
        engine = self.start(bench, slots=4, workers=4)
        bench.gpu.pause()
        engine.submit([bench.whole(0, 8 * CHUNK), bench.whole(8 * CHUNK, FILE_BYTES - 8 * CHUNK, 1, lane=True)])
        bench.gpu.wait_for_calls("EventRecord", 4)
        engine.set_limits(1, 4 * PAGE_BYTES)
        assert (engine.counters().workers, engine.counters().running) == (1, self.WORKER_ROOM)
        bench.gpu.resume()
        run_to_end(engine, 2, Landing(bench.files.contents))
        stop(engine)
        bench.check_memory()

    def test_other_sinks_go_on_beside_copies_under_way(self, bench: DeviceBench) -> None:
        engine = self.start(bench, slots=2, workers=2)
        bench.gpu.pause()
        placed = bench.files.extent(ReadPath.BUFFERED, Sink.PLACE, 1 * MIB, MIB)
        engine.submit([placed, bench.whole(0, CHUNK), bench.files.extent(ReadPath.BUFFERED, Sink.COPY, 0, 3 * CHUNK)])
        events = wait_for(engine, 2, ExtentDone)
        assert {event.extent for event in events if isinstance(event, ExtentDone)} == {0, 2}
        bench.gpu.resume()
        run_to_end(engine, 1, Landing(bench.files.contents))
        stop(engine)
        bench.check_memory()
        bench.files.check_memory()
