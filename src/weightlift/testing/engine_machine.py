"""An engine against a perfect model, whatever its caller does in which order; a state machine to inherit from.

The model knows every byte: where it has to land, that it lands once, which slots are out, how much may be claimed::

    class MyMachine(EngineMachine):
        def make_engine(self, shards, slots):
            return MyEngine(shards, self.bench.pool(slots, CHUNK_BYTES_MAX), WORKER_ROOM)

    TestMyEngine = MyMachine.TestCase

Needs hypothesis, and ``pytest.register_assert_rewrite`` for this module.
"""

# ruff: noqa: D102, FBT001, SLF001 - rules are named after what they do; arenas are the kit's own
from __future__ import annotations

import contextlib
import ctypes
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from weightlift.operations import (
    UNBOUNDED,
    ChunkReady,
    Engine,
    Event,
    Extent,
    ExtentDone,
    Failure,
    FailureKind,
    ReadPath,
    Sink,
)
from weightlift.testing.bench import FILE_BYTES, Arena, Bench, threads_now
from weightlift.testing.conformance import HOST_SINKS, PATIENCE_SECONDS
from weightlift.units import KIB, MIB, PAGE_BYTES, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.operations import ShardSource

PICK = st.integers(0, 1000)
CHUNK_BYTES_MAX = 64 * KIB
CHUNKS = st.sampled_from([PAGE_BYTES, 16 * KIB, CHUNK_BYTES_MAX])
LENGTHS = st.one_of(st.integers(1, 5000), st.integers(1, 300 * KIB))
ARENA_USED_MAX = 8 * MIB
WORKER_ROOM = 4
BEYOND = 64 * KIB
"""The file is said to be so much longer than it is, for reads that meet its end."""

WANTED = st.fixed_dictionaries(
    {
        "path": st.sampled_from(list(ReadPath)),
        "sink": st.sampled_from(HOST_SINKS),
        "offset": st.integers(0, FILE_BYTES - 1),
        "length": LENGTHS,
        "lane": st.booleans(),
        "fresh": st.booleans(),
        "resident": st.booleans(),
    }
)


@dataclass
class Sent:
    """An extent that was submitted, and what has been told of it."""

    extent: Extent
    arena: Arena
    first_place: int
    end_place: int
    handed: list[tuple[int, int]] = field(default_factory=list)
    done: bool = False


class EngineMachine(RuleBasedStateMachine):
    """What a caller may do with an engine, and what has to be true of it meanwhile and in the end.

    Rules have no preconditions, since what an engine has done by now differs from run to run, and hypothesis wants the
    same rules to be possible each time; one that is not possible does nothing.

    Attributes:
        engine: the engine.
        bench: the file, and the memory that it goes to.
        sent: what was submitted.
        held: chunks in slots that were not returned yet, by slot.
        failure: the failure that was told.
        possible_failures: kinds and error numbers of the failures that may be told.
    """

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.bench = self.open_bench(Path(folder))
        self.threads = threads_now()
        self.bench.source = self.bench.source._replace(size_bytes=FILE_BYTES + BEYOND)
        self.sent: list[Sent] = []
        self.held: dict[int, ChunkReady] = {}
        self.failure: Failure | None = None
        self.claimed_at_the_end: int | None = None
        self.claimed_max = UNBOUNDED
        self.possible_failures: set[tuple[FailureKind, int]] = set()

    def open_bench(self, folder: Path) -> Bench:
        return self.stack.enter_context(Bench(folder))

    def make_engine(self, shards: Sequence[ShardSource], slots: int) -> Engine:
        """An engine with so many slots, which chunks of ``CHUNK_BYTES_MAX`` fit in."""
        raise NotImplementedError

    @initialize(slots=st.integers(1, 4), workers=st.integers(0, 4), chunk_bytes=CHUNKS)
    def begin(self, slots: int, workers: int, chunk_bytes: int) -> None:
        self.slots = slots
        self.engine = self.make_engine([self.bench.source], slots)
        self.engine.set_limits(workers, chunk_bytes)

    @property
    def has_ended(self) -> bool:
        return self.failure is not None or self.claimed_at_the_end is not None

    @property
    def arenas(self) -> list[Arena]:
        return [self.bench._arena]

    @property
    def arena_used(self) -> int:
        return max(arena._cursor for arena in self.arenas)

    # ---- what a caller may do

    @rule(wanted=st.lists(WANTED, min_size=0, max_size=3))
    def submit_some(self, wanted: list[dict[str, Any]]) -> None:
        if not (not self.has_ended and self.arena_used < ARENA_USED_MAX):
            return
        self.submit([self._extent(**item) for item in wanted])

    def _extent(
        self, path: ReadPath, sink: Sink, offset: int, length: int, *, lane: bool, fresh: bool, resident: bool
    ) -> Sent:
        if path is ReadPath.DIRECT and self.bench.source.direct_descriptor < 0:
            path = ReadPath.BUFFERED
        length = min(length, FILE_BYTES - offset)
        arena = self.bench._arena
        first = len(arena._places)
        extent = self.bench.extent(path, sink, offset, length, fresh=fresh and sink is Sink.PLACE)
        extent = extent._replace(lane=lane and sink is not Sink.HAND_OVER, resident=resident)
        return Sent(extent, arena, first, len(arena._places))

    def submit(self, more: list[Sent]) -> None:
        self.sent += more
        self.engine.submit([sent.extent for sent in more])

    @rule(
        path=st.sampled_from([ReadPath.BUFFERED, ReadPath.DONTCACHE, ReadPath.DIRECT]),
        sink=st.sampled_from(HOST_SINKS),
        before=st.integers(0, 100 * KIB),
        beyond=st.integers(1, BEYOND),
    )
    def submit_what_the_file_does_not_have(self, path: ReadPath, sink: Sink, before: int, beyond: int) -> None:
        if not (not self.has_ended and self.arena_used < ARENA_USED_MAX):
            return
        if path is ReadPath.DIRECT and self.bench.source.direct_descriptor < 0:
            path = ReadPath.BUFFERED
        self.possible_failures.add((FailureKind.END_OF_FILE, 0))
        arena = self.bench._arena
        first = len(arena._places)
        extent = self.bench.extent(path, sink, FILE_BYTES - before, before + beyond)
        self.submit([Sent(extent, arena, first, len(arena._places))])

    @rule(workers=st.integers(0, 4), chunk_bytes=CHUNKS)
    def set_limits(self, workers: int, chunk_bytes: int) -> None:
        self.engine.set_limits(workers, chunk_bytes)
        # One that has failed starts no more threads, though the failure is yet to be told.
        if not self.has_ended and not self.possible_failures:
            assert self.engine.counters().workers == workers

    @rule(more=st.one_of(st.integers(0, 200 * KIB), st.just(UNBOUNDED)))
    def allow(self, more: int) -> None:
        claimed = self.engine.counters().claimed_bytes
        self.engine.allow(min(claimed + more, UNBOUNDED))
        # What was claimed before the call is claimed; from then on a chunk may begin below the bound and end behind it.
        already = self.engine.counters().claimed_bytes
        self.claimed_max = max(already, min(claimed + more, UNBOUNDED) + CHUNK_BYTES_MAX - 1)

    @rule()
    def trim(self) -> None:
        self.engine.trim()
        for chunk in self.held.values():
            self.bench.check_chunk(chunk)

    @rule(patiently=st.booleans())
    def poll(self, patiently: bool) -> None:
        self._take(self.engine.poll(0.002 if patiently else 0.0))

    @rule(which=PICK)
    def return_slot(self, which: int) -> None:
        if not (self.held):
            return
        self._return(sorted(self.held)[which % len(self.held)])

    def _return(self, slot: int) -> None:
        chunk = self.held.pop(slot)
        self.bench.check_chunk(chunk)
        self.engine.return_slot(slot)

    @rule()
    def look_at_what_workers_do(self) -> None:
        for doing in self.engine.activity():
            assert doing.shard == 0
            # First calls to a device belong to no chunk, and are told with the next one's place and no length.
            assert 0 <= doing.length <= CHUNK_BYTES_MAX
            assert doing.length == 0 or any(
                sent.extent.offset <= doing.offset < sent.extent.offset + sent.extent.length for sent in self.sent
            )

    @rule()
    def everything_lands_once_nothing_holds_it_up(self) -> None:
        if self.has_ended:
            return
        self.drain()

    @rule()
    def cancel(self) -> None:
        if self.has_ended:
            return
        self.engine.cancel()
        self.claimed_at_the_end = self.engine.counters().claimed_bytes

    # ---- what the engine tells

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, ChunkReady):
                self._take_chunk(event)
            elif isinstance(event, ExtentDone):
                sent = self.sent[event.extent]
                assert not sent.done, "told twice"
                sent.done = True
                if sent.extent.sink is Sink.HAND_OVER:
                    self._check_whole(sent)
            else:
                assert self.failure is None, "there is one first failure"
                assert (event.kind, event.error_number) in self.possible_failures, event
                extent = self.sent[event.extent].extent
                assert extent.offset <= event.offset <= extent.offset + extent.length
                self.failure = event
                if self.claimed_at_the_end is None:
                    self.claimed_at_the_end = self.engine.counters().claimed_bytes

    def _take_chunk(self, chunk: ChunkReady) -> None:
        assert 0 <= chunk.slot < self.slots
        assert chunk.slot not in self.held, "a slot is one chunk's until it is returned"
        self.bench.check_chunk(chunk)
        sent = self.sent[chunk.extent]
        assert sent.extent.sink is Sink.HAND_OVER
        assert not sent.done
        assert 0 < chunk.length <= CHUNK_BYTES_MAX
        sent.handed.append((chunk.offset, chunk.length))
        self.held[chunk.slot] = chunk

    @staticmethod
    def _check_whole(sent: Sent) -> None:
        position = sent.extent.offset
        for offset, length in sorted(sent.handed):
            assert offset == position
            position += length
        assert position == sent.extent.offset + sent.extent.length

    # ---- what always holds

    @invariant()
    def counters_agree_with_the_model(self) -> None:
        if not hasattr(self, "engine"):
            return
        counters = self.engine.counters()
        total = sum(sent.extent.length for sent in self.sent)
        assert counters.landed_bytes <= counters.read_bytes <= counters.claimed_bytes <= min(total, self.claimed_max)
        if self.claimed_at_the_end is not None:
            assert counters.claimed_bytes == self.claimed_at_the_end, "nothing is claimed after the end"
        assert counters.landed_bytes >= sum(sent.extent.length for sent in self.sent if sent.done)

    # ---- the end

    def drain(self) -> None:
        self.engine.allow(UNBOUNDED)
        self.claimed_max = UNBOUNDED
        self.engine.set_limits(3, CHUNK_BYTES_MAX)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.failure is None and not all(sent.done for sent in self.sent):
            for slot in list(self.held):
                self._return(slot)
            self._take(self.engine.poll(0.1))
            assert time.monotonic() < deadline, f"{self.sent} did not land in {PATIENCE_SECONDS} s"
        if self.failure is None:
            self._check_landed()

    def _check_landed(self) -> None:
        total = sum(sent.extent.length for sent in self.sent)
        counters, use = self.engine.counters(), self.engine.shard_use(0)
        assert (counters.claimed_bytes, counters.read_bytes, counters.landed_bytes) == (total, total, total)
        assert use.direct_bytes + use.buffered_bytes + use.mapped_bytes == total
        for arena in self.arenas:
            arena.check()

    def _check_no_slot_is_lost(self) -> None:
        """As many chunks can be handed over at once as there are slots, and no more."""
        for slot in list(self.held):
            self._return(slot)
        self.engine.set_limits(2, PAGE_BYTES)
        extent = Extent(0, ReadPath.BUFFERED, Sink.HAND_OVER, 3, (self.slots + 1) * PAGE_BYTES)
        self.submit([Sent(extent, self.bench._arena, 0, 0)])
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(self.held) < self.slots and self.failure is None:
            self._take(self.engine.poll(0.1))
            assert time.monotonic() < deadline, f"{self.slots - len(self.held)} slots are lost"
        assert self.failure is not None or self.engine.poll(0.0) == []

    def _check_rest_untouched(self) -> None:
        """What was not claimed was not touched; what did not land may be anything within its place."""
        claimed, begin = self.engine.counters().claimed_bytes, 0
        in_order = not any(sent.extent.lane for sent in self.sent)
        for sent in self.sent:
            arena, guard = sent.arena, bytes([sent.arena._guard])
            for place in arena._places[sent.first_place : sent.end_place]:
                first, end = place.start, place.start + place.length
                if place.whole_pages:
                    first, end = align_down(first, PAGE_BYTES), align_up(end, PAGE_BYTES)
                if in_order and begin >= claimed:
                    assert ctypes.string_at(arena.address + first, end - first) == guard * (end - first)
                if not sent.done:
                    ctypes.memset(arena.address + first, guard[0], end - first)
            begin += sent.extent.length
        for arena in self.arenas:
            # Places that were never finished are nobody's any more, so that the arena wants its guard in them.
            mine = [sent for sent in self.sent if sent.arena is arena and not sent.done]
            unfinished = {number for sent in mine for number in range(sent.first_place, sent.end_place)}
            arena._places = [place for number, place in enumerate(arena._places) if number not in unfinished]
            arena.check()

    def teardown(self) -> None:
        try:
            if hasattr(self, "engine"):
                self.end()
        finally:
            self.stack.close()

    def end(self) -> None:
        if not self.has_ended:
            self.drain()
        if not self.has_ended:
            self._check_no_slot_is_lost()
        self.engine.cancel()
        claimed = self.engine.counters().claimed_bytes
        for slot in list(self.held):
            self._return(slot)
        assert self.engine.join(PATIENCE_SECONDS) == 0, "a worker has not left"
        self._take(self.engine.poll(0.0))
        for slot in list(self.held):
            self._return(slot)
        counters = self.engine.counters()
        assert (counters.claimed_bytes, counters.running) == (claimed, 0)
        assert (self.engine.activity(), self.engine.poll(0.0)) == ([], [])
        self._check_rest_untouched()
        self.engine.close()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while threads_now() > self.threads:
            assert time.monotonic() < deadline, f"{threads_now() - self.threads} threads were left behind"
