"""Leases keep memory alive and give it back; slots are one fixed pool."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import pytest

from weightlift.buffers import HostRegion, SlotPool
from weightlift.errors import InsufficientMemoryError
from weightlift.units import MIB, PAGE_BYTES

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is resident")


def resident_bytes(address: int, length: int) -> int:
    """Resident bytes of a range of this process's memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    vector = (ctypes.c_ubyte * (length // PAGE_BYTES))()
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), vector) == 0
    return sum(entry & 1 for entry in vector) * PAGE_BYTES


@linux
def test_a_lease_gives_back_its_whole_pages_and_no_others() -> None:
    region = HostRegion(12 * MIB)
    ctypes.memset(region.address, 7, 12 * MIB)
    before = region.lease(0, 4 * MIB + 100)
    lease = region.lease(4 * MIB + 100, 4 * MIB)
    behind = region.lease(8 * MIB + 100, 4 * MIB - 100)
    assert resident_bytes(region.address, 12 * MIB) == 12 * MIB
    view = memoryview(lease)
    del lease
    gc.collect()
    assert resident_bytes(region.address, 12 * MIB) == 12 * MIB, "a view keeps the lease"
    view.release()
    del view
    gc.collect()
    # The pages at both ends are shared with the neighbours.
    assert resident_bytes(region.address, 12 * MIB) == 8 * MIB + PAGE_BYTES
    assert bytes(before) == b"\7" * len(before)
    assert bytes(behind) == b"\7" * len(behind)


@linux
def test_a_lease_outlives_its_region_and_the_last_one_unmaps_it() -> None:
    region = HostRegion(3 * MIB + 5)
    assert region.nbytes == 3 * MIB + PAGE_BYTES
    address = region.address
    lease = region.lease(PAGE_BYTES + 8, 1000)
    lease[:] = list(bytes(range(250)) * 4)
    del region
    gc.collect()
    assert bytes(lease) == bytes(range(250)) * 4
    assert is_mapped(address)
    del lease
    gc.collect()
    assert not is_mapped(address)


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = re.match(r"(\w+)-(\w+) ", line)
        assert found is not None
        if int(found[1], 16) <= address < int(found[2], 16):
            return True
    return False


def test_a_lease_of_a_few_bytes_gives_back_no_page() -> None:
    region = HostRegion(PAGE_BYTES)
    ctypes.memset(region.address, 9, PAGE_BYTES)
    first, second = region.lease(0, 100), region.lease(100, 100)
    del first
    gc.collect()
    assert bytes(second) == b"\t" * 100


def test_memory_that_the_system_refuses_is_told() -> None:
    with pytest.raises(InsufficientMemoryError, match="tensors") as caught:
        HostRegion(1 << 62)
    assert "names" in caught.value.hint
    with pytest.raises(InsufficientMemoryError, match="staging slots"):
        SlotPool(1 << 40, 1 << 22)


def test_the_pool_is_one_range_of_whole_slots() -> None:
    pool = SlotPool(5, MIB)
    memory = pool.memory
    assert (memory.count, memory.slot_bytes, pool.nbytes) == (5, MIB, 5 * MIB)
    assert memory.address % PAGE_BYTES == 0
    ctypes.memset(memory.address, 1, 5 * MIB)
    pool.close()
    pool.close()
    empty = SlotPool(0, MIB)
    assert (empty.nbytes, empty.memory.count) == (0, 0)
    empty.close()
