"""Tensors read one at a time lie in regions of huge pages while they are kept, and in ordinary memory otherwise."""

from __future__ import annotations

import ctypes
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy
import pytest

from weightlift import buffers
from weightlift.buffers import LeaseArena
from weightlift.units import KIB, MIB, PAGE_BYTES, align_down

KEPT = 4


def ordinary(nbytes: int) -> Any:
    return numpy.full(nbytes, 9, "u1")


def is_lease(buffer: Any) -> bool:
    return isinstance(buffer, ctypes.Array)


def filled(total_bytes: int) -> tuple[LeaseArena, list[Any]]:
    """An arena whose next buffer is a lease, and what has to be held for that."""
    arena = LeaseArena(total_bytes, ordinary)
    return arena, [arena.take(100 * KIB) for _ in range(KEPT)]


def test_leases_begin_once_enough_tensors_are_kept() -> None:
    arena, held = filled(8 * MIB)
    assert not any(map(is_lease, held))
    held += [arena.take(100 * KIB + number) for number in range(20)]
    assert all(map(is_lease, held[KEPT:]))
    assert [len(lease) for lease in held[KEPT:]] == [100 * KIB + number for number in range(20)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is resident")
@pytest.mark.parametrize("ahead_bytes", [0, 2 * MIB, 6 * MIB, 100 * MIB])
def test_a_region_is_cleared_ahead_as_far_as_is_allowed(ahead_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "available_processors", lambda: 2)
    arena = LeaseArena(20 * MIB, ordinary, ahead_bytes=ahead_bytes)
    held = [arena.take(100 * KIB) for _ in range(KEPT)]
    lease = arena.take(100 * KIB)
    for thread in threading.enumerate():
        if thread.name == "weightlift-clear":
            thread.join()
    start, nbytes = ctypes.addressof(lease), 20 * MIB - KEPT * 100 * KIB
    vector = (ctypes.c_ubyte * (nbytes // PAGE_BYTES))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), vector) == 0
    there = sum(entry & 1 for entry in vector) * PAGE_BYTES
    wanted = max(0, min(nbytes, ahead_bytes) - 2 * MIB)
    # Huge pages at both ends may reach further.
    assert align_down(wanted, PAGE_BYTES) <= there <= (wanted + 4 * MIB if wanted else 0)
    assert len(held) == KEPT


def test_no_thread_to_be_had_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(buffers, "available_processors", lambda: 2)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    arena = LeaseArena(20 * MIB, ordinary, ahead_bytes=20 * MIB)
    held = [arena.take(100 * KIB) for _ in range(KEPT + 1)]
    assert is_lease(held[-1])


def test_nothing_is_cleared_ahead_where_that_takes_the_readers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "available_processors", lambda: 1)
    arena = LeaseArena(20 * MIB, ordinary, ahead_bytes=20 * MIB)
    held = [arena.take(100 * KIB) for _ in range(KEPT + 1)]
    assert is_lease(held[-1])
    assert not any(thread.name == "weightlift-clear" for thread in threading.enumerate())


@pytest.mark.parametrize("gone", range(KEPT))
def test_letting_go_of_any_of_the_latest_ends_leases_until_enough_are_kept_again(gone: int) -> None:
    arena, held = filled(8 * MIB)
    del held[gone]
    held += [arena.take(100 * KIB) for _ in range(KEPT + 1)]
    found = [is_lease(buffer) for buffer in held[KEPT - 1 :]]
    # The place of the one that is gone among the latest decides how soon it is forgotten.
    assert found == [False] * (gone + 1) + [True] * (KEPT - gone)


def test_a_tensor_dropped_as_the_next_one_arrives_is_ordinary_memory() -> None:
    arena, latest = LeaseArena(8 * MIB, ordinary), None
    for _ in range(40):
        latest = arena.take(256 * KIB)
        assert not is_lease(latest)


def test_leases_begin_at_pages_and_share_none() -> None:
    arena, held = filled(100 * MIB)
    leases = [arena.take(64 * KIB + 1 + 977 * number) for number in range(200)]
    places = sorted((ctypes.addressof(lease), len(lease)) for lease in leases)
    assert all(first % PAGE_BYTES == 0 for first, _ in places)
    for (first, length), (following, _) in pairwise(places):
        assert first + length <= following
    for number, lease in enumerate(leases):
        ctypes.memset(lease, number % 251, len(lease))
    assert all(set(bytes(lease)) == {number % 251} for number, lease in enumerate(leases))
    assert len(held) == KEPT


def test_a_region_is_no_larger_than_what_is_left_to_ask_for() -> None:
    arena, held = filled(KEPT * 100 * KIB + MIB)
    first, second = arena.take(MIB), arena.take(300 * KIB)
    # The first region has room for all that was left, so for one more; what comes twice gets a region of its own.
    assert ctypes.addressof(second) == ctypes.addressof(first) + MIB
    third = arena.take(MIB)
    assert is_lease(third)
    assert len(held) == KEPT


@pytest.mark.parametrize("length", [0, 1, 64 * KIB - 1, 32 * MIB + 1])
def test_small_and_large_ones_are_ordinary(length: int) -> None:
    arena, held = filled(100 * MIB)
    assert not is_lease(arena.take(length))
    held += [arena.take(64 * KIB), arena.take(32 * MIB)]
    assert all(map(is_lease, held[KEPT:]))


def test_what_cannot_be_watched_is_never_followed_by_a_lease() -> None:
    arena = LeaseArena(8 * MIB, bytearray)
    assert all(isinstance(arena.take(100 * KIB), bytearray) for _ in range(3 * KEPT))


def test_threads_share_an_arena() -> None:
    arena, held = filled(200 * MIB)
    with ThreadPoolExecutor(8) as threads:
        leases = list(threads.map(arena.take, [100 * KIB] * 400))
    assert len({ctypes.addressof(lease) for lease in leases}) == 400
    places = sorted(ctypes.addressof(lease) for lease in leases)
    assert all(following - first >= 100 * KIB for first, following in pairwise(places))
    assert len(held) == KEPT
