"""Regions, leases and slots against a model of every byte: what is held keeps its contents, the rest is gone."""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weightlift.buffers import HostRegion, SlotPool
from weightlift.units import PAGE_BYTES, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.device_operations import SlotMemory

PICK = st.integers(0, 1000)
"""Which of those that are there, counted round."""


@dataclass
class Mapping:
    """A region or a pool as it should be: what holds it, and every byte of its memory."""

    owner: HostRegion | SlotPool | None
    alive: Callable[[], Any]
    address: int
    image: bytearray
    cursor: int = 0


@dataclass
class Held:
    """A lease, or a view of one that nobody else holds any more."""

    holder: Any
    mapping: Mapping
    start: int
    length: int


class HostMemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.regions: list[Mapping] = []
        self.pools: list[Mapping] = []
        self.leases: list[Held] = []

    # ---- regions and leases

    @rule(nbytes=st.integers(1, 6 * PAGE_BYTES))
    def make_region(self, nbytes: int) -> None:
        region = HostRegion(nbytes)
        assert region.address % PAGE_BYTES == 0
        assert region.nbytes == align_up(nbytes, PAGE_BYTES)
        self.regions.append(Mapping(region, weakref.ref(region._mapping), region.address, bytearray(region.nbytes)))

    @precondition(lambda self: self.regions)
    @rule(which=PICK, gap=st.integers(0, PAGE_BYTES), length=st.integers(1, 3 * PAGE_BYTES), value=st.integers(1, 255))
    def lease(self, which: int, gap: int, length: int, value: int) -> None:
        mapping = self.regions[which % len(self.regions)]
        start = mapping.cursor + gap
        if not isinstance(mapping.owner, HostRegion) or start + length > len(mapping.image):
            return
        mapping.cursor = start + length
        held = Held(mapping.owner.lease(start, length), mapping, start, length)
        assert ctypes.addressof(held.holder) == mapping.address + start
        self.leases.append(held)
        self._fill(held, value)

    @precondition(lambda self: self.leases)
    @rule(which=PICK, value=st.integers(1, 255))
    def write(self, which: int, value: int) -> None:
        self._fill(self.leases[which % len(self.leases)], value)

    def _fill(self, held: Held, value: int) -> None:
        # No two neighbouring bytes are alike, so that bytes at a wrong place show.
        contents = bytes((value + index) % 255 + 1 for index in range(held.length))
        memoryview(held.holder).cast("B")[:] = contents
        held.mapping.image[held.start : held.start + held.length] = contents

    @precondition(lambda self: self.leases)
    @rule(which=PICK)
    def hold_by_a_view_only(self, which: int) -> None:
        held = self.leases[which % len(self.leases)]
        held.holder = memoryview(held.holder)

    @precondition(lambda self: self.leases)
    @rule(which=PICK, on_a_thread=st.booleans())
    def let_go_of_a_lease(self, which: int, on_a_thread: bool) -> None:
        held = self.leases.pop(which % len(self.leases))
        if on_a_thread:
            thread = threading.Thread(target=lambda: setattr(held, "holder", None))
            thread.start()
            thread.join()
        held.holder = None
        if sys.platform == "linux":
            # Its whole pages are fresh again; those at its ends may be shared with neighbours.
            first, end = align_up(held.start, PAGE_BYTES), align_down(held.start + held.length, PAGE_BYTES)
            held.mapping.image[first : max(first, end)] = bytes(max(0, end - first))

    @precondition(lambda self: self.regions)
    @rule(which=PICK)
    def let_go_of_a_region(self, which: int) -> None:
        self.regions[which % len(self.regions)].owner = None

    # ---- pools of slots

    @rule(count=st.integers(0, 4), pages=st.integers(1, 3))
    def make_pool(self, count: int, pages: int) -> None:
        pool = SlotPool(count, pages * PAGE_BYTES)
        memory = pool.memory
        assert (memory.count, memory.slot_bytes, pool.nbytes) == (count, pages * PAGE_BYTES, count * pages * PAGE_BYTES)
        alive = weakref.ref(pool._mapping) if pool._mapping is not None else lambda: None
        self.pools.append(Mapping(pool, alive, memory.address, bytearray(pool.nbytes)))

    @precondition(lambda self: self.pools)
    @rule(which=PICK, slot=PICK, value=st.integers(1, 255))
    def fill_a_slot(self, which: int, slot: int, value: int) -> None:
        mapping = self.pools[which % len(self.pools)]
        assert isinstance(mapping.owner, SlotPool)
        memory: SlotMemory = mapping.owner.memory
        if memory.count and mapping.alive() is not None:
            first = slot % memory.count * memory.slot_bytes
            ctypes.memset(memory.address + first, value, memory.slot_bytes)
            mapping.image[first : first + memory.slot_bytes] = bytes([value]) * memory.slot_bytes

    @precondition(lambda self: self.pools)
    @rule(which=PICK)
    def close_a_pool(self, which: int) -> None:
        mapping = self.pools[which % len(self.pools)]
        assert isinstance(mapping.owner, SlotPool)
        mapping.owner.close()
        assert mapping.alive() is None

    # ---- what always holds

    @invariant()
    def every_byte_is_as_the_model_says(self) -> None:
        for mapping in [*self.regions, *self.pools]:
            if mapping.alive() is not None:
                assert ctypes.string_at(mapping.address, len(mapping.image)) == bytes(mapping.image)

    @invariant()
    def memory_lives_as_long_as_somebody_holds_it(self) -> None:
        for mapping in self.regions:
            is_held = mapping.owner is not None or any(held.mapping is mapping for held in self.leases)
            assert (mapping.alive() is not None) == is_held
        self.regions = [mapping for mapping in self.regions if mapping.alive() is not None]

    def teardown(self) -> None:
        for mapping in self.pools:
            assert isinstance(mapping.owner, SlotPool)
            mapping.owner.close()
        self.leases.clear()
        for mapping in self.regions:
            mapping.owner = None
        self.memory_lives_as_long_as_somebody_holds_it()
        assert self.regions == []


HostMemoryMachine.TestCase.settings = hypothesis.settings(max_examples=hypothesis.settings().max_examples // 2)
TestHostMemory = HostMemoryMachine.TestCase
