"""Loads against a perfect model: targets submitted, chunks received, limits, faults, endings, one load after the other.

The model knows the contents of every tensor, what each load was asked for and how it may end. Rules have no
preconditions, since what a load has done by now differs from run to run; one that is not possible does nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from weightlift.errors import FileChangedError, ReadError, TruncatedFileError
from weightlift.formats import describe
from weightlift.open_ended import OpenTransfer
from weightlift.operations import UNBOUNDED, ChunkReady, ExtentDone
from weightlift.options import LoadOptions
from weightlift.reach import Reach
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.host import ConvertingTarget, HostTarget
from weightlift.targets.null import NullTarget
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.testing.conformance import PATIENCE_SECONDS
from weightlift.testing.faults import FaultingReader
from weightlift.testing.leaks import held
from weightlift.types import EngineName, Framework
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.targets.base import Target

PICK = st.integers(0, 1000)
SPECS = [
    TensorSpec("first", "F32", (100, 333)),
    TensorSpec("empty", "F32", (0, 7)),
    TensorSpec("long", "F64", (300, 333)),
    TensorSpec("half", "F16", (77, 999)),
    TensorSpec("small", "U8", (3,)),
    TensorSpec("odd", "U8", (100_001,)),
]
CONTENTS = {spec.name: tensor_bytes(spec) for spec in SPECS}
OPTIONS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["auto", "direct", "buffered", "mmap"]),
        "cache": st.sampled_from(["auto", "keep", "drop"]),
        "host_memory": st.sampled_from([8 * MIB, 128 * MIB]),
        "workers": st.sampled_from([None, 1, 4]),
        "chunk_bytes": st.sampled_from([None, 64 * KIB]),
    }
)


@dataclass
class Submitted:
    """One target: its rows, what of it has not landed, and chunks that wait to be received."""

    target: Target
    rows: list[int]
    left: int
    waiting: list[ChunkReady]


class TransferMachine(RuleBasedStateMachine):
    engine: EngineName

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.before: Counter[str] = held(self.folder)
        self.transfer: OpenTransfer | None = None
        self.reader = FaultingReader(0) if self.engine is EngineName.PYTHON else None
        self.kept: list[tuple[str, Any]] = []

    @initialize(padding=st.sampled_from(["reference", 5]), shards=st.integers(1, 3))
    def write(self, padding: Any, shards: int) -> None:
        self.path = write_checkpoint(self.folder / "model", SPECS, shards=shards, padding=padding)

    # ---- a load from its beginning to its end

    @rule(options=OPTIONS)
    def begin(self, options: dict[str, Any]) -> None:
        if self.transfer is not None:
            return
        self.description = describe(self.path)
        self.maker = pick_framework(Framework.NUMPY)
        self.submitted: list[Submitted] = []
        self.by_extent: list[Submitted] = []
        self.submitted_bytes = 0
        self.may_fail = self.has_changed = False
        if self.reader is not None:
            self.reader.faults = replace(self.reader.faults, fail_at_read=None)
        self.transfer = OpenTransfer(
            self.description,
            Reach(range(len(self.description.shards)), {}),
            LoadOptions(engine=self.engine, **options),
            destination_bytes=4 * MIB,
            reader=self.reader,
        )
        with self.transfer.aborting():
            self.transfer.begin_stream(4 * MIB)

    @rule(first=PICK, count=st.integers(0, 4), kind=st.sampled_from(["host", "converting", "null"]))
    def submit(self, first: int, count: int, kind: str) -> None:
        if not (self.transfer is not None):
            return
        assert self.transfer is not None
        first %= len(self.description)
        rows = list(range(first, min(first + count, len(self.description))))
        target: Target
        if kind == "host":
            target = HostTarget(self.description, rows, self.maker)
        elif kind == "converting":
            target = ConvertingTarget(self.description, rows, self.maker, dtype=None, device="cpu")
        else:
            target = NullTarget(self.description, rows)
        extents = self.transfer.submit(target)
        one = Submitted(target, rows, len(extents), [])
        self.submitted.append(one)
        self.by_extent += [one] * len(extents)
        self.submitted_bytes += sum(extent.length for extent in extents)

    @rule()
    def take_events(self) -> None:
        if not (self.transfer is not None):
            return
        with self._possible_failure():
            self._take(wait=False)

    @rule(which=PICK)
    def receive_a_chunk(self, which: int) -> None:
        if not (self.transfer is not None and any(one.waiting for one in self.submitted)):
            return
        waiting = [one for one in self.submitted if one.waiting]
        self._receive(waiting[which % len(waiting)])

    @rule(which=PICK, keep=st.booleans())
    def finish_a_target(self, which: int, keep: bool) -> None:
        if not (self.transfer is not None):
            return
        assert self.transfer is not None
        landed = [one for one in self.submitted if one.left == 0 and not one.waiting]
        if not landed:
            return
        one = landed[which % len(landed)]
        tensors = list(one.target.finish())
        names = [self.description.names[row] for row in one.rows]
        assert [name for name, _ in tensors] == ([] if isinstance(one.target, NullTarget) else names)
        self._require_contents(tensors)
        self.transfer.drop(one.target)
        self.submitted.remove(one)
        self.kept += tensors if keep else []

    @rule(workers=st.integers(0, 4), more=st.one_of(st.integers(0, 300 * KIB), st.just(UNBOUNDED)))
    def restrict_the_engine(self, workers: int, more: int) -> None:
        if not (self.transfer is not None):
            return
        assert self.transfer is not None
        engine = self.transfer._engine
        assert engine is not None
        engine.set_limits(workers, 64 * KIB)
        engine.allow(min(engine.counters().claimed_bytes + more, UNBOUNDED))
        engine.trim()

    @rule()
    def look_at_memory(self) -> None:
        if not (self.transfer is not None):
            return
        assert self.transfer is not None
        self.transfer.tick(host_bytes=None)

    @rule(kind=st.sampled_from([KeyboardInterrupt, RuntimeError]))
    def interrupt(self, kind: type[BaseException]) -> None:
        if not (self.transfer is not None):
            return
        assert self.transfer is not None
        with pytest.raises(kind, match="enough"), self.transfer.aborting():
            raise kind("enough")
        self._ended()

    @rule()
    def finish(self) -> None:
        if not (self.transfer is not None):
            return
        with self._possible_failure():
            self._drain()
        if self.transfer is None:
            return
        with self._possible_failure(aborts_itself=True):
            counters, _, _ = self.transfer.finish()
            assert not self.has_changed, "a changed file was not noticed"
            total = self.submitted_bytes
            assert (counters.claimed_bytes, counters.read_bytes, counters.landed_bytes) == (total, total, total)
            uses = self.transfer.uses.values()
            assert sum(use.direct_bytes + use.buffered_bytes + use.mapped_bytes for use in uses) == total
            self._ended()

    # ---- trouble

    @rule(shard=PICK)
    def append_to_a_shard(self, shard: int) -> None:
        if not (self.transfer is not None and not self.has_changed):
            return
        shards = self.description.shards
        with shards[shard % len(shards)].path.open("ab") as file:
            file.write(b"more")
        self.has_changed = True

    @rule(
        short_reads=st.sampled_from([0.0, 0.7]),
        fail_after=st.one_of(st.none(), st.integers(1, 5)),
        number=st.sampled_from([errno.EIO, errno.ETIMEDOUT]),
    )
    def misbehave(self, short_reads: float, fail_after: int | None, number: int) -> None:
        if not (self.reader is not None and self.transfer is not None):
            return
        assert self.reader is not None
        fail_at = None if fail_after is None else self.reader.reads + fail_after
        self.may_fail |= fail_at is not None
        self.reader.faults = replace(
            self.reader.faults, short_reads=short_reads, fail_at_read=fail_at, error_number=number
        )

    # ---- the model

    @contextlib.contextmanager
    def _possible_failure(self, *, aborts_itself: bool = False) -> Iterator[None]:
        """A failure that the model knows may come ends the load, as it does for every caller."""
        transfer = self.transfer
        assert transfer is not None
        try:
            with contextlib.nullcontext() if aborts_itself else transfer.aborting():
                yield
        except ReadError as error:
            self._require_known(error)
            self._ended()
        except (FileChangedError, TruncatedFileError):
            assert self.has_changed
            self._ended()

    def _require_known(self, error: ReadError) -> None:
        assert self.may_fail
        assert error.errno in {errno.EIO, errno.ETIMEDOUT}
        assert error.path in [shard.path for shard in self.description.shards]
        assert error.offset is not None
        assert error.hint

    def _take(self, *, wait: bool) -> None:
        assert self.transfer is not None
        for event in self.transfer.events(wait=wait):
            assert isinstance(event, ExtentDone | ChunkReady)
            one = self.by_extent[event.extent]
            if isinstance(event, ExtentDone):
                one.left -= 1
                assert one.left >= 0, "told twice"
            else:
                assert one.left > 0, "a chunk of an extent that was done"
                one.waiting.append(event)

    def _receive(self, one: Submitted) -> None:
        assert self.transfer is not None
        event, returned = one.waiting.pop(), Counter[int]()

        def release(slot: int) -> None:
            assert self.transfer is not None
            returned[slot] += 1
            self.transfer.release_slot(slot)

        tag = self.transfer.tag(event.extent)
        one.target.receive(event, tag, release)
        assert returned == {event.slot: 1}, "the slot is returned exactly once"

    def _drain(self) -> None:
        assert self.transfer is not None
        engine = self.transfer._engine
        assert engine is not None
        engine.set_limits(2, 64 * KIB)
        engine.allow(UNBOUNDED)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while any(one.left or one.waiting for one in self.submitted):
            for one in self.submitted:
                while one.waiting:
                    self._receive(one)
            self._take(wait=True)
            assert time.monotonic() < deadline, "not everything has landed"
        for one in self.submitted:
            self._require_contents(list(one.target.finish()))

    @staticmethod
    def _require_contents(tensors: list[tuple[str, Any]]) -> None:
        for name, tensor in tensors:
            assert tensor.tobytes() == CONTENTS[name], name

    def _ended(self) -> None:
        """Nothing of the load is left, and whatever was appended to its files is taken off again."""
        self.transfer = None
        self.submitted, self.by_extent = [], []
        self._require_nothing_left()
        for shard in self.description.shards:
            os.truncate(shard.path, shard.identity.size_bytes)

    def _require_nothing_left(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        # The system takes a moment to bury a thread that has been joined.
        while left := held(self.folder) - self.before:
            assert time.monotonic() < deadline, f"left behind: {dict(left)}"

    @invariant()
    def tensors_handed_out_stay_as_they_are(self) -> None:
        self._require_contents(self.kept[-3:])

    def teardown(self) -> None:
        try:
            if self.transfer is not None:
                self.finish()
            self._require_contents(self.kept)
        finally:
            self._stack.close()


class NativeMachine(TransferMachine):
    engine = EngineName.NATIVE


class PythonMachine(TransferMachine):
    engine = EngineName.PYTHON


for machine in (NativeMachine, PythonMachine):
    machine.TestCase.settings = hypothesis.settings(max_examples=hypothesis.settings().max_examples // 4)

TestNativeEngine = pytest.mark.native(NativeMachine.TestCase)
TestPythonEngine = PythonMachine.TestCase
