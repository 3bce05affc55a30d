"""What every engine has to keep, as a test class to inherit from; targets have theirs in ``target_conformance``.

Tracing and pausing have a class of their own, ``trace_conformance``, to be inherited beside this one.

A project that adds an engine writes one class with one method and gets the tests::

    class TestMyEngine(EngineConformance):
        def make_engine(self, shards, slots, worker_room):
            return MyEngine(shards, slots, worker_room)

Needs pytest, and ``pytest.register_assert_rewrite("weightlift.testing.conformance")`` for readable failures.
"""

# ruff: noqa: D102 - the names of tests say what they show
from __future__ import annotations

import errno
import os
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import pytest

from weightlift.host import residency
from weightlift.operations import ChunkReady, Engine, Extent, ExtentDone, Failure, FailureKind, ReadPath, Sink
from weightlift.testing.bench import FILE_BYTES, Bench, Landing, threads_now
from weightlift.units import KIB, MIB, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from weightlift.device_operations import SlotMemory
    from weightlift.operations import Event, ShardSource

HOST_SINKS = [sink for sink in Sink if sink is not Sink.DEVICE]
"""Those that need no device; ``device_conformance`` has the other one."""

PATIENCE_SECONDS = 20.0
"""How long a test waits for something that has to happen; nothing is judged by it but a hang."""

RANGES = (
    (0, 64 * KIB),
    (128 * KIB, 1),
    (192 * KIB + 1, 4095),
    (256 * KIB - 3, 200 * KIB + 5),
    (512 * KIB + 513, 300 * KIB),
    (1 * MIB - 1, 2),
    (2 * MIB, 256 * KIB + 1),
    (1 * MIB + 7 * PAGE_BYTES, 3 * PAGE_BYTES),
    (FILE_BYTES - 70 * KIB - 5, 70 * KIB + 5),
)
"""Aligned and odd beginnings and lengths, ranges within one page and over two, and the last block of the file."""


def wait_for(engine: Engine, count: int, kind: type = object) -> list[Event]:
    """Poll until ``count`` events of a kind, or a failure, have come; returns all events."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    events: list[Event] = []
    while sum(isinstance(event, kind) for event in events) < count:
        events += engine.poll(0.1)
        if any(isinstance(event, Failure) for event in events):
            break
        assert time.monotonic() < deadline, f"the engine told only {events} in {PATIENCE_SECONDS} s"
    return events


def run_to_end(engine: Engine, extents: int, landing: Landing) -> list[Event]:
    """Take in everything until ``extents`` extents are done or one failed; handed-over chunks go to ``landing``."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    events: list[Event] = []
    done = 0
    while done < extents:
        for event in engine.poll(0.1):
            events.append(event)
            if isinstance(event, ChunkReady):
                landing.take(event)
                engine.return_slot(event.slot)
            elif isinstance(event, ExtentDone):
                done += 1
            else:
                return events
        assert time.monotonic() < deadline, f"{done} of {extents} extents were done in {PATIENCE_SECONDS} s"
    return events


def stop(engine: Engine) -> None:
    """Cancel, join and close; fails if a worker stays."""
    engine.cancel()
    assert engine.join(PATIENCE_SECONDS) == 0, "a worker has not left"
    engine.close()


class EngineConformance(ABC):
    """The guarantees of :class:`weightlift.operations.Engine`, as tests."""

    @abstractmethod
    def make_engine(self, shards: Sequence[ShardSource], slots: SlotMemory, worker_room: int) -> Engine:
        """A new engine."""

    @pytest.fixture
    def bench(self, tmp_path: Path) -> Iterator[Bench]:
        """A file of known contents, open in every way, and memory to read it into."""
        threads = threads_now()
        with Bench(tmp_path) as bench:
            yield bench
        deadline = time.monotonic() + PATIENCE_SECONDS
        while threads_now() > threads:
            assert time.monotonic() < deadline, f"{threads_now() - threads} threads were left behind"

    def start(self, bench: Bench, *, slots: int = 4, workers: int = 3, chunk_bytes: int = 64 * KIB) -> Engine:
        """An engine over the bench's file, ready for extents."""
        pool = bench.pool(slots, chunk_bytes)
        engine = self.make_engine([bench.source], pool, max(workers, 4))
        engine.set_limits(workers, chunk_bytes)
        return engine

    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize("chunk_bytes", [16 * KIB, 256 * KIB])
    @pytest.mark.parametrize("sink", HOST_SINKS)
    @pytest.mark.parametrize("path", list(ReadPath))
    def test_every_byte_lands_once_and_nothing_else_is_touched(
        self, bench: Bench, path: ReadPath, sink: Sink, chunk_bytes: int, workers: int
    ) -> None:
        bench.require(path)
        extents = [
            bench.extent(path, sink, offset, length, fresh=sink is Sink.PLACE and index % 2 == 0)
            for index, (offset, length) in enumerate(RANGES)
        ]
        total = sum(extent.length for extent in extents)
        engine = self.start(bench, workers=workers, chunk_bytes=chunk_bytes)
        engine.submit(extents)
        landing = Landing(bench.contents)
        events = run_to_end(engine, len(extents), landing)
        counters, use = engine.counters(), engine.shard_use(0)
        stop(engine)
        done = [event.extent for event in events if isinstance(event, ExtentDone)]
        assert sorted(done) == list(range(len(extents))), "every extent is told once"
        bench.check_memory()
        landing.check(extents if sink is Sink.HAND_OVER else [], chunk_bytes)
        assert (counters.claimed_bytes, counters.read_bytes, counters.landed_bytes) == (total, total, total)
        assert counters.reads >= sum(-(-extent.length // chunk_bytes) for extent in extents)
        by_path = {ReadPath.DIRECT: use.direct_bytes, ReadPath.MAPPED: use.mapped_bytes}
        assert by_path.get(path, use.buffered_bytes) == total
        assert use.direct_bytes + use.buffered_bytes + use.mapped_bytes == total
        assert (use.refused_bytes, counters.fallbacks) == (0, 0)

    def test_chunks_are_claimed_in_order_and_only_with_a_slot(self, bench: Bench) -> None:
        engine = self.start(bench, slots=2, workers=4)
        engine.submit([bench.extent(ReadPath.BUFFERED, Sink.HAND_OVER, 3, 10 * 64 * KIB)])
        held = [event for event in wait_for(engine, 2, ChunkReady) if isinstance(event, ChunkReady)]
        assert sorted(chunk.offset for chunk in held) == [3, 3 + 64 * KIB]
        seen = list(held)
        while len(seen) < 10:
            assert engine.poll(0.02) == [], "there is no slot for another chunk"
            assert len({chunk.slot for chunk in held}) == len(held)
            for chunk in held:
                bench.check_chunk(chunk)
            # The slot that goes back is never the one of the oldest chunk, so order cannot come from the slots.
            engine.return_slot(held.pop().slot)
            events = wait_for(engine, 1, ChunkReady)
            new = [event for event in events if isinstance(event, ChunkReady)]
            assert [chunk.offset for chunk in new] == [3 + len(seen) * 64 * KIB]
            held += new
            seen += new
        assert engine.counters().slot_wait_seconds > 0
        assert [chunk.extent for chunk in seen] == [0] * 10
        stop(engine)

    def test_extents_may_follow_when_the_engine_was_idle(self, bench: Bench) -> None:
        engine = self.start(bench)
        landing = Landing(bench.contents)
        extents: list[Extent] = []
        for step, path in enumerate((ReadPath.BUFFERED, ReadPath.MAPPED, ReadPath.BUFFERED)):
            more = [bench.extent(path, sink, step * 512 * KIB + 9, 100_001) for sink in (Sink.PLACE, Sink.HAND_OVER)]
            engine.submit(more)
            extents += more
            events = run_to_end(engine, len(more), landing)
            done = sorted(event.extent for event in events if isinstance(event, ExtentDone))
            assert done == [2 * step, 2 * step + 1]
            engine.submit([])
            assert engine.poll(0.01) == []
        stop(engine)
        bench.check_memory()
        landing.check([extent for extent in extents if extent.sink is Sink.HAND_OVER], 64 * KIB)

    def test_limits_may_change_while_it_runs(self, bench: Bench) -> None:
        engine = self.start(bench, slots=1, workers=1, chunk_bytes=256 * KIB)
        extent = bench.extent(ReadPath.BUFFERED, Sink.HAND_OVER, 0, FILE_BYTES)
        landing = Landing(bench.contents)
        engine.set_limits(1, 16 * KIB)
        engine.submit([extent])
        lengths, settings = [], [(4, 32 * KIB), (2, 256 * KIB), (1, 64 * KIB), (4, 16 * KIB)]
        for workers, chunk_bytes in settings:
            # One slot: the next chunk is claimed when this one goes back, by the limits of that moment.
            (chunk,) = (event for event in wait_for(engine, 1, ChunkReady) if isinstance(event, ChunkReady))
            landing.take(chunk)
            lengths.append(chunk.length)
            engine.set_limits(workers, chunk_bytes)
            assert engine.counters().workers == workers
            engine.return_slot(chunk.slot)
        assert lengths == [16 * KIB, 32 * KIB, 256 * KIB, 64 * KIB]
        run_to_end(engine, 1, landing)
        stop(engine)
        landing.check([extent], 256 * KIB)

    @pytest.mark.parametrize("path", [ReadPath.BUFFERED, ReadPath.DONTCACHE, ReadPath.DIRECT])
    @pytest.mark.parametrize("sink", [Sink.PLACE, Sink.HAND_OVER])
    def test_the_end_of_the_file_is_a_failure(self, bench: Bench, path: ReadPath, sink: Sink) -> None:
        bench.require(path)
        bench.source = bench.source._replace(size_bytes=FILE_BYTES + 8)
        engine = self.start(bench)
        engine.submit([bench.extent(path, sink, FILE_BYTES - 10_001, 10_009)])
        failure = self._failure(engine)
        assert (failure.extent, failure.kind, failure.offset) == (0, FailureKind.END_OF_FILE, FILE_BYTES)
        assert failure.error_number == 0

    @pytest.mark.parametrize(("kind", "number"), [("folder", errno.EISDIR), ("write-only", errno.EBADF)])
    @pytest.mark.parametrize("path", [ReadPath.BUFFERED, ReadPath.DONTCACHE, ReadPath.DIRECT])
    def test_a_failed_read_is_told_once_and_stops_everything(
        self, bench: Bench, path: ReadPath, kind: str, number: int
    ) -> None:
        descriptor = bench.descriptor(bench.folder) if kind == "folder" else bench.descriptor(bench.path, os.O_WRONLY)
        bench.source = bench.source._replace(descriptor=descriptor, direct_descriptor=descriptor)
        engine = self.start(bench, workers=4)
        engine.submit([bench.extent(path, Sink.DISCARD, 64 * KIB, 2 * MIB)])
        failure = self._failure(engine)
        assert (failure.extent, failure.kind, failure.error_number) == (0, FailureKind.READ, number)
        assert failure.offset % (64 * KIB) == 0
        assert 64 * KIB <= failure.offset < 64 * KIB + 2 * MIB
        assert failure.length == 64 * KIB

    def _failure(self, engine: Engine) -> Failure:
        """The failure the engine tells; afterwards nothing more is claimed and every worker leaves."""
        events = wait_for(engine, 1, Failure)
        assert engine.join(PATIENCE_SECONDS) == 0
        events += engine.poll(0)
        claimed = engine.counters().claimed_bytes
        failures = [event for event in events if isinstance(event, Failure)]
        assert len(failures) == 1, events
        assert not any(isinstance(event, ExtentDone) for event in events)
        assert (engine.counters().claimed_bytes, engine.counters().running) == (claimed, 0)
        stop(engine)
        return failures[0]

    def test_after_cancel_nothing_is_claimed_and_join_leaves_no_thread(self, bench: Bench) -> None:
        engine = self.start(bench, slots=2, workers=4)
        engine.submit([bench.extent(ReadPath.BUFFERED, Sink.HAND_OVER, 0, 2 * MIB)])
        held = [event for event in wait_for(engine, 2, ChunkReady) if isinstance(event, ChunkReady)]
        engine.cancel()
        for chunk in held:
            engine.return_slot(chunk.slot)
        assert engine.join(PATIENCE_SECONDS) == 0
        assert engine.counters().claimed_bytes == 2 * 64 * KIB
        assert (engine.counters().running, engine.activity(), engine.poll(0)) == (0, [], [])
        engine.set_limits(4, 64 * KIB)
        assert engine.counters().running == 0, "a cancelled engine starts no thread"
        stop(engine)

    def test_an_engine_that_never_ran_can_be_closed(self, bench: Bench) -> None:
        stop(self.make_engine([bench.source], bench.pool(0, 64 * KIB), 2))
        stop(self.make_engine([], bench.pool(1, 64 * KIB), 1))

    @pytest.mark.parametrize("alignment", [1, 2])
    @pytest.mark.parametrize("sinks", [HOST_SINKS, [Sink.HAND_OVER]])
    def test_direct_reads_that_are_refused_go_through_the_cache(
        self, bench: Bench, sinks: list[Sink], alignment: int
    ) -> None:
        bench.require(ReadPath.DIRECT)
        if not bench.refuses_odd_direct_reads():
            pytest.skip(f"the file system under {bench.folder} takes direct reads at any offset")
        # Told that any offset, or any even one, will do, the engine asks for what the file system refuses.
        bench.source = bench.source._replace(offset_alignment=alignment)
        extents = [
            bench.extent(ReadPath.DIRECT, sink, index * 300 * KIB + 1, 200 * KIB) for index, sink in enumerate(sinks)
        ]
        total = sum(extent.length for extent in extents)
        engine = self.start(bench)
        engine.submit(extents)
        landing = Landing(bench.contents)
        run_to_end(engine, len(extents), landing)
        counters, use = engine.counters(), engine.shard_use(0)
        stop(engine)
        bench.check_memory()
        landing.check(extents[-1:], 64 * KIB)
        assert use.refused_errno == errno.EINVAL
        assert (use.direct_bytes + use.buffered_bytes, use.buffered_bytes) == (total, use.refused_bytes)
        assert 0 < counters.fallbacks <= counters.reads
        # Chunks may be cut so that some begin on a block after all, but those handed over all begin at the odd offset.
        handed_over = extents[-1].length
        assert use.refused_bytes == handed_over if len(extents) == 1 else use.refused_bytes >= handed_over

    def test_drop_behind_leaves_nothing_in_the_cache(self, bench: Bench) -> None:
        bench.evict()
        engine = self.start(bench)
        extents = [
            bench.extent(ReadPath.BUFFERED, sink, index * MIB, MIB)._replace(drop_behind=True)
            for index, sink in enumerate((Sink.PLACE, Sink.DISCARD))
        ]
        engine.submit(extents)
        run_to_end(engine, len(extents), Landing(bench.contents))
        stop(engine)
        bench.check_memory()
        cached = residency.residency(bench.source.descriptor, FILE_BYTES)
        assert cached is not None
        assert cached < FILE_BYTES // 100

    def test_time_and_activity_are_counted(self, bench: Bench) -> None:
        engine = self.start(bench)
        resident = bench.extent(ReadPath.BUFFERED, Sink.COPY, 5, MIB)._replace(resident=True)
        engine.submit([resident])
        run_to_end(engine, 1, Landing(bench.contents))
        first = engine.counters()
        engine.submit([bench.extent(ReadPath.BUFFERED, Sink.DISCARD, 5, MIB)])
        run_to_end(engine, 1, Landing(bench.contents))
        second = engine.counters()
        assert first.cache_seconds > 0 == first.storage_seconds
        assert first.copy_seconds > 0
        assert second.storage_seconds > 0
        assert (second.cache_seconds, second.copy_seconds) == (first.cache_seconds, first.copy_seconds)
        assert (second.running, second.workers) == (3, 3)
        stop(engine)

    def test_time_in_which_any_worker_is_busy_counts_once(self, bench: Bench) -> None:
        engine = self.start(bench)
        begin = time.monotonic()
        engine.submit([bench.extent(ReadPath.BUFFERED, Sink.COPY, 0, FILE_BYTES)])
        run_to_end(engine, 1, Landing(bench.contents))
        elapsed, busy = time.monotonic() - begin, engine.counters()
        assert 0 < busy.busy_seconds <= elapsed
        spent = busy.storage_seconds + busy.cache_seconds + busy.copy_seconds
        assert spent <= busy.workers * busy.busy_seconds
        # Nothing is to be done, and no time goes by.
        assert engine.counters().busy_seconds == busy.busy_seconds
        stop(engine)
