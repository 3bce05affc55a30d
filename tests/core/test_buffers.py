"""Leases keep memory alive and give it back; slots are one fixed pool."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weightlift.buffers import HostRegion, SlotPool, prepare_untouched
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


class NoHugePages(mmap.mmap):
    """Mappings of a kernel that was built without transparent huge pages."""

    def madvise(self, option: int, *where: int) -> None:
        if option == mmap.MADV_HUGEPAGE:
            raise OSError(errno.EINVAL, "Invalid argument")
        super().madvise(option, *where)


@linux
def test_a_kernel_without_huge_pages_gives_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", NoHugePages)
    region = HostRegion(4 * MIB)
    lease = region.lease(0, 2 * MIB)
    ctypes.memset(region.address, 7, 4 * MIB)
    del lease
    gc.collect()
    assert ctypes.string_at(region.address, 4 * MIB) == bytes(2 * MIB) + b"\7" * (2 * MIB)


def test_windows_is_asked_for_memory_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []

    def mapped(descriptor: int, length: int, **more: int) -> mmap.mmap:
        asked.append(more)
        return original(descriptor, length, **more)

    original = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", mapped)
    monkeypatch.setattr(sys, "platform", "win32")
    HostRegion(PAGE_BYTES)
    assert asked == [{}], "there are no flags for mappings"


def test_windows_keeps_what_leases_leave_until_the_region_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    region = HostRegion(4 * MIB)
    lease = region.lease(PAGE_BYTES, 2 * MIB)
    ctypes.memset(region.address, 7, 4 * MIB)
    del lease
    gc.collect()
    assert ctypes.string_at(region.address, 4 * MIB) == b"\7" * (4 * MIB)


@linux
def test_regions_and_slots_are_private_and_ask_for_huge_pages() -> None:
    """A child's writes are its own, and the kernel is told that large pages are welcome."""
    region, pool = HostRegion(4 * MIB), SlotPool(4, MIB)
    for address in (region.address, pool.memory.address):
        flags = mapping_flags(address)
        assert "sh" not in flags, "shared memory takes no huge pages, and counts as such"
        assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    pool.close()
    assert "hg" not in mapping_flags(HostRegion(2 * MIB - PAGE_BYTES).address)
    smallest = HostRegion(2 * MIB)
    assert "hg" in mapping_flags(smallest.address) or not Path("/sys/kernel/mm/transparent_hugepage").exists()


@linux
def test_a_callers_memory_takes_huge_pages_if_it_was_never_touched() -> None:
    for touched in (None, 0, 5 * MIB, MIB, 5 * MIB - 1):
        mapping = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_ubyte.from_buffer(mapping))
        # From the middle of a huge page to a page behind one: it has two whole ones.
        address = start + -start % (2 * MIB) + MIB
        if touched is not None:
            ctypes.memset(address + touched, 1, 1)
        fresh = prepare_untouched(address, 5 * MIB + PAGE_BYTES)
        inside = touched is not None and MIB <= touched < 5 * MIB
        assert fresh is not inside
        flags = mapping_flags(address + 2 * MIB)
        assert ("hg" in flags) is fresh or not Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_memory_without_a_whole_huge_page_is_left_alone() -> None:
    mapping = mmap.mmap(-1, 4 * MIB)
    start = ctypes.addressof(ctypes.c_ubyte.from_buffer(mapping))
    assert not prepare_untouched(start + -start % (2 * MIB) + 1, 2 * MIB - 1)


def mapping_flags(address: int) -> list[str]:
    """The kernel's flags of the mapping around an address (see `man 5 proc_pid_smaps`)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found is not None:
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("the address is not mapped")


@linux
def test_memory_stays_until_the_process_has_ended() -> None:
    """What is called last of all when an interpreter ends finds in a lease what is found in one while it runs."""
    program = """
import atexit
atexit.register(lambda: print(bytes(lease[8000:8004])))
from weightlift.buffers import HostRegion
region = HostRegion(1 << 16)
lease = region.lease(0, 1 << 16)
lease[8000:8004] = [7] * 4
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # Only what this process calls itself is known to `make mutation` as tested here.
    lease = HostRegion(1 << 16).lease(0, 1 << 16)
    lease[8000:8004] = [7] * 4
    assert done.stdout == f"{bytes(lease[8000:8004])!r}\n" == "b'\\x07\\x07\\x07\\x07'\n"


def test_memory_that_the_system_refuses_is_told() -> None:
    with pytest.raises(InsufficientMemoryError, match=r"would not reserve .* for tensors \(") as caught:
        HostRegion(1 << 62)
    assert caught.value.hint == 'load fewer tensors (names=…), use method="mmap", or add swap'
    with pytest.raises(InsufficientMemoryError, match=r"would not reserve .* for staging slots \("):
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
    assert (empty.nbytes, empty.memory.count, empty.memory.address) == (0, 0, 0)
    empty.close()
