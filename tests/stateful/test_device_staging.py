"""What is pinned for devices against a model: lent once, kept once, within the budget, all of it given back."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weightlift.device_operations import SlotState
from weightlift.device_staging import DeviceStaging, StagingLoan, borrow_staging, release_pinned_memory
from weightlift.testing.fake_gpu import FakeGpu, FakeGpuUnavailable, build
from weightlift.units import PAGE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

PICK = st.integers(0, 1000)
DEVICES = 2
BUDGET_BYTES = 64 * PAGE_BYTES
OUT_OF_MEMORY = 2

_library: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        _library[:] = [build(tmp_path_factory.mktemp("fake-gpu"))]
    except FakeGpuUnavailable as err:
        pytest.skip(str(err))


@dataclass
class Staging:
    """Staging memory as it should be: its shape, and what of it is pinned."""

    pinned: bool
    slot_bytes: int
    count: int
    registered: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    ordinals: set[int] = field(default_factory=set)

    @property
    def pinned_bytes(self) -> int:
        return len(self.registered) * self.slot_bytes


@dataclass
class Loan:
    """A load that stages, and what it was lent."""

    loan: StagingLoan
    staging: Staging
    count: int
    ordinals: list[int]


class DeviceStagingMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        release_pinned_memory()
        self._stack = contextlib.ExitStack()
        self.gpu = self._stack.enter_context(FakeGpu(_library[0], "cuda", devices=DEVICES, seed=1))
        self.target = self.gpu.allocate(0, BUDGET_BYTES)
        self._stack.callback(self.gpu.free, self.target)
        self.loans: list[Loan] = []
        self.kept: Staging | None = None
        self.real: dict[int, DeviceStaging] = {}

    # ---- what loads do

    @rule(
        slot_pages=st.integers(1, 4),
        count=st.integers(1, 4),
        pinned=st.booleans(),
        budget_pages=st.integers(16, 64),
        ordinals=st.sampled_from([[0], [1], [0, 1]]),
    )
    def borrow(self, slot_pages: int, count: int, pinned: bool, budget_pages: int, ordinals: list[int]) -> None:
        slot_bytes, most = slot_pages * PAGE_BYTES, budget_pages * PAGE_BYTES
        kept, self.kept = self.kept, None
        fits = (
            kept is not None
            and pinned
            and kept.slot_bytes >= slot_bytes
            and kept.count >= count
            and kept.slot_bytes * kept.count <= most
        )
        loan = borrow_staging(self.gpu.runtime, ordinals, slot_bytes, count, pinned=pinned, most_bytes=most)
        staging = kept if kept is not None and fits else Staging(pinned, slot_bytes, count)
        assert (loan._staging is self.real.get(id(staging))) == fits, "what is kept is used where it fits"
        self.real[id(staging)] = loan._staging
        staging.ordinals |= set(ordinals)
        assert loan.memory.count == count
        assert loan.memory.slot_bytes == staging.slot_bytes >= slot_bytes
        assert [queue.ordinal for queue in loan.devices.queues] == ordinals
        assert all(len(queue.events) >= count for queue in loan.devices.queues)
        self.loans.append(Loan(loan, staging, count, ordinals))

    @precondition(lambda self: self.loans)
    @rule(which=PICK, slot=PICK, value=st.integers(1, 255), is_refused=st.booleans())
    def stage_a_chunk(self, which: int, slot: int, value: int, is_refused: bool) -> None:
        """What a worker does: pin the slot before its first use, fill it, copy it, wait for the event."""
        one = self.loans[which % len(self.loans)]
        memory, runtime = one.loan.memory, self.gpu.runtime
        slot %= one.count
        address = memory.address + slot * memory.slot_bytes
        if memory.states is not None and memory.states[slot] == SlotState.UNTRIED:
            if is_refused:
                self.gpu.fail("HostRegister", OUT_OF_MEMORY)
            answer = runtime.register(address, memory.slot_bytes)
            assert (answer != 0) == is_refused
            memory.states[slot] = SlotState.REFUSED if is_refused else SlotState.REGISTERED
            (one.staging.refused if is_refused else one.staging.registered).add(slot)
        ctypes.memset(address, value, memory.slot_bytes)
        queue = one.loan.devices.queues[0]
        if queue.ordinal != 0:
            return
        assert runtime.set_device(queue.ordinal) == 0
        assert runtime.copy_to_device(self.target, address, memory.slot_bytes, queue.streams[0]) == 0
        assert runtime.record(queue.events[slot], queue.streams[0]) == 0
        runtime.synchronize_stream(queue.streams[0])
        assert runtime.query(queue.events[slot]) == 0
        assert ctypes.string_at(self.target, memory.slot_bytes) == bytes([value]) * memory.slot_bytes

    @precondition(lambda self: self.loans)
    @rule(which=PICK)
    def end_a_load(self, which: int) -> None:
        one = self.loans.pop(which % len(self.loans))
        assert one.loan.pinned_bytes == one.staging.pinned_bytes
        assert one.loan.refused_bytes == len(one.staging.refused) * one.staging.slot_bytes
        one.loan.close()
        if self.kept is None and one.staging.pinned_bytes > 0:
            self.kept = one.staging

    @rule()
    def release(self) -> None:
        kept, self.kept = self.kept, None
        assert release_pinned_memory() == (kept.pinned_bytes if kept else 0)

    # ---- what always holds

    @invariant()
    def nothing_is_pinned_but_what_is_lent_or_kept(self) -> None:
        there = [one.staging for one in self.loans] + ([self.kept] if self.kept else [])
        counters = self.gpu.counters()
        assert counters.registered_bytes == sum(staging.pinned_bytes for staging in there)
        assert counters.registrations == sum(len(staging.registered) for staging in there)
        assert counters.streams == sum(len(staging.ordinals) for staging in there)
        assert counters.events == sum(len(staging.ordinals) * staging.count for staging in there)
        assert (counters.queued_operations, counters.stray_copies) == (0, 0)

    @invariant()
    def no_two_loads_stage_in_the_same_memory(self) -> None:
        ranges = sorted((one.loan.memory.address, one.loan.memory.slot_bytes * one.count) for one in self.loans)
        for (first, nbytes), (second, _) in itertools.pairwise(ranges):
            assert first + nbytes <= second

    def teardown(self) -> None:
        for one in self.loans:
            one.loan.close()
        release_pinned_memory()
        # The session fails if a registration, a stream or an event is left.
        self._stack.close()


DeviceStagingMachine.TestCase.settings = hypothesis.settings(max_examples=hypothesis.settings().max_examples // 2)
TestDeviceStaging = DeviceStagingMachine.TestCase
