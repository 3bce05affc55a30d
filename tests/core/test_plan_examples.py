"""Plans worked out by hand: which path, cut where, in which order, and what is said about it."""

from __future__ import annotations

import pytest

from weightlift.host.residency import Residency, ResidencyMap, ResidencyRun
from weightlift.operations import Extent, ReadPath, Sink, make_copy_table
from weightlift.plan import (
    GRANULE_BYTES,
    CacheDecision,
    Piece,
    ShardFacts,
    Wanted,
    batches,
    decide_cache,
    pieces,
    plan_extents,
    states,
)
from weightlift.types import CachePolicy, Method
from weightlift.units import GIB, KIB, MIB

RESIDENT, ABSENT, PARTIAL = Residency.RESIDENT, Residency.ABSENT, Residency.PARTIAL
DIRECT, BUFFERED, DONTCACHE, MAPPED = ReadPath.DIRECT, ReadPath.BUFFERED, ReadPath.DONTCACHE, ReadPath.MAPPED


def facts(
    size: int, *runs: tuple[int, Residency], direct: bool = True, dontcache: bool = True, known: bool = True
) -> ShardFacts:
    """A shard of which the page cache holds runs of these lengths, in order; all of it absent without runs."""
    position, made, cached = 0, [], 0
    for length, state in runs or ((size, ABSENT),):
        made.append(ResidencyRun(position, length, state))
        position += length
        cached += length if state is RESIDENT else 0
    residency = ResidencyMap(GRANULE_BYTES, position, cached, tuple(made)) if known else None
    return ShardFacts("shard", size, direct, "because", dontcache, residency)


# ---- one range, one state of the page cache: the table in the architecture


@pytest.mark.parametrize(
    ("method", "keep", "state", "direct", "path", "resident"),
    [
        (Method.AUTO, True, RESIDENT, True, BUFFERED, True),
        (Method.AUTO, True, ABSENT, True, BUFFERED, False),
        (Method.AUTO, False, RESIDENT, True, BUFFERED, True),
        (Method.AUTO, False, ABSENT, True, DIRECT, False),
        (Method.AUTO, False, PARTIAL, True, DIRECT, False),
        (Method.AUTO, False, ABSENT, False, DONTCACHE, False),
        (Method.BUFFERED, True, RESIDENT, True, BUFFERED, True),
        (Method.BUFFERED, True, ABSENT, True, BUFFERED, False),
        (Method.BUFFERED, False, RESIDENT, True, BUFFERED, True),
        (Method.BUFFERED, False, ABSENT, True, DONTCACHE, False),
        (Method.DIRECT, False, RESIDENT, True, DIRECT, False),
        (Method.DIRECT, False, ABSENT, True, DIRECT, False),
        (Method.DIRECT, False, ABSENT, False, DONTCACHE, False),
        (Method.MMAP, True, RESIDENT, True, MAPPED, True),
        (Method.MMAP, False, ABSENT, True, MAPPED, False),
    ],
)
def test_the_path_of_a_range(
    method: Method, keep: bool, state: Residency, direct: bool, path: ReadPath, resident: bool
) -> None:
    shard = facts(MIB, (MIB, state), direct=direct)
    (piece,) = pieces(shard, 100, 1000, method, keep=keep)
    assert piece[:4] == (100, 1000, path, resident)


@pytest.mark.parametrize(
    ("method", "keep", "state", "dontcache", "known", "behind"),
    [
        # Uncached reads drop their pages themselves; where there are none, what was absent is dropped behind the read.
        (Method.BUFFERED, False, ABSENT, True, True, False),
        (Method.BUFFERED, False, ABSENT, False, True, True),
        (Method.MMAP, False, ABSENT, True, True, True),
        # What was there before, or may have been, stays.
        (Method.BUFFERED, False, PARTIAL, False, True, False),
        (Method.BUFFERED, False, RESIDENT, False, True, False),
        (Method.MMAP, False, RESIDENT, True, True, False),
        (Method.BUFFERED, False, ABSENT, False, False, False),
        # What may stay is not dropped, and direct reads bring nothing in.
        (Method.BUFFERED, True, ABSENT, False, True, False),
        (Method.MMAP, True, ABSENT, True, True, False),
        (Method.DIRECT, False, ABSENT, False, True, False),
    ],
)
def test_what_is_dropped_behind_the_read(
    method: Method, keep: bool, state: Residency, dontcache: bool, known: bool, behind: bool
) -> None:
    shard = facts(MIB, (MIB, state), dontcache=dontcache, known=known)
    (piece,) = pieces(shard, 0, MIB, method, keep=keep)
    assert piece.drop_behind is behind


def test_neighbouring_runs_that_are_read_alike_are_one_piece() -> None:
    shard = facts(5 * MIB, (MIB, ABSENT), (MIB, PARTIAL), (MIB, RESIDENT), (2 * MIB, ABSENT))
    assert list(pieces(shard, 10, 5 * MIB - 20, Method.AUTO, keep=False)) == [
        Piece(10, 2 * MIB - 10, DIRECT, False, False),
        Piece(2 * MIB, MIB, BUFFERED, True, False),
        Piece(3 * MIB, 2 * MIB - 10, DIRECT, False, False),
    ]
    assert list(pieces(shard, 10, 0, Method.AUTO, keep=False)) == []


def test_states_are_cut_to_the_range_and_unknown_ends_count_as_absent() -> None:
    residency = facts(3 * MIB, (MIB, RESIDENT), (2 * MIB, ABSENT)).residency
    assert list(states(residency, MIB - 1, MIB + 1)) == [(MIB - 1, MIB, RESIDENT), (MIB, MIB + 1, ABSENT)]
    assert list(states(residency, MIB, 3 * MIB)) == [(MIB, 3 * MIB, ABSENT)]
    # The file has grown since its pages were counted.
    assert list(states(residency, 2 * MIB, 3 * MIB + 5)) == [(2 * MIB, 3 * MIB, ABSENT), (3 * MIB, 3 * MIB + 5, ABSENT)]
    assert list(states(residency, 3 * MIB + 1, 3 * MIB + 5)) == [(3 * MIB + 1, 3 * MIB + 5, ABSENT)]
    assert list(states(None, 7, 9)) == [(7, 9, ABSENT)]


# ---- extents


def lengths(extents: list[Extent]) -> list[int]:
    return [extent.length for extent in extents]


def plan(
    shard: ShardFacts, *wanted: Wanted, method: Method = Method.AUTO, keep: bool = False, in_order: bool = False
) -> list[Extent]:
    return plan_extents(wanted, [shard], method, keep=keep, in_order=in_order)


@pytest.mark.parametrize(
    ("size", "offset", "lanes"),
    [
        # A sixteenth of what is left, 8 MiB at least and 64 MiB at most, that end at multiples of 2 MiB in the file.
        (208 * MIB, 0, [n * MIB for n in (12, 12, 10, 10, 10, *[8] * 19, 2)]),
        (20 * MIB, 0, [8 * MIB, 8 * MIB, 4 * MIB]),
        (20 * MIB, 3, [8 * MIB - 3, 8 * MIB, 4 * MIB + 3]),
        (20 * MIB, 2 * MIB - 1, [6 * MIB + 1, 8 * MIB, 6 * MIB - 1]),
        (5, 11, [5]),
    ],
)
def test_what_storage_gives_through_the_cache_is_cut_into_lanes(size: int, offset: int, lanes: list[int]) -> None:
    want = Wanted(0, offset, size, Sink.PLACE, address=1 << 40, mirrored=True, fresh=True)
    extents = plan(facts(offset + size, direct=False), want)
    assert lengths(extents) == lanes
    assert {type(length) for length in lengths(extents)} == {int}, "engines count in whole bytes"
    position = offset
    for extent in extents:
        assert extent == Extent(
            0, DONTCACHE, Sink.PLACE, position, extent.length, (1 << 40) + position - offset, fresh=True, lane=True
        )
        position += extent.length


def test_lanes_are_long_first_and_short_last_so_that_workers_end_together() -> None:
    lanes = lengths(plan(facts(4 * GIB, direct=False), Wanted(0, 0, 4 * GIB, Sink.DISCARD)))
    assert lanes == sorted(lanes, reverse=True)
    assert (set(lanes[:48]), set(lanes[-17:-1])) == ({64 * MIB}, {8 * MIB})
    assert sum(lanes) == 4 * GIB


@pytest.mark.parametrize(
    ("sink", "method", "keep", "state"),
    [
        (Sink.DISCARD, Method.AUTO, False, ABSENT),
        (Sink.DISCARD, Method.MMAP, False, ABSENT),
        (Sink.DISCARD, Method.AUTO, True, RESIDENT),
        (Sink.HAND_OVER, Method.AUTO, True, ABSENT),
    ],
)
def test_what_lives_without_read_ahead_has_no_lanes(sink: Sink, method: Method, keep: bool, state: Residency) -> None:
    (extent,) = plan(facts(100 * MIB, (100 * MIB, state)), Wanted(0, 0, 100 * MIB, sink), method=method, keep=keep)
    assert (extent.length, extent.lane) == (100 * MIB, False)


def test_in_order_there_are_no_lanes_and_no_turns() -> None:
    shard = facts(32 * MIB, (16 * MIB, ABSENT), (16 * MIB, RESIDENT), direct=False)
    extents = plan(shard, Wanted(0, 0, 32 * MIB, Sink.DISCARD), in_order=True)
    assert extents == [
        Extent(0, DONTCACHE, Sink.DISCARD, 0, 16 * MIB),
        Extent(0, BUFFERED, Sink.DISCARD, 16 * MIB, 16 * MIB, resident=True),
    ]


def test_drive_and_memory_take_turns_in_proportion() -> None:
    shard = facts(40 * MIB, (8 * MIB, RESIDENT), (32 * MIB, ABSENT))
    extents = plan(shard, Wanted(0, 100, 40 * MIB - 100, Sink.DISCARD))
    # Parts of 4 MiB that end at pages; the drive has four times as much to give, and as many turns to one.
    assert [(extent.path, extent.offset, extent.length) for extent in extents] == [
        (DIRECT, 8 * MIB, 4 * MIB),
        (BUFFERED, 100, 4 * MIB - 100),
        *((DIRECT, (12 + 4 * n) * MIB, 4 * MIB) for n in range(3)),
        (BUFFERED, 4 * MIB, 4 * MIB),
        *((DIRECT, (24 + 4 * n) * MIB, 4 * MIB) for n in range(4)),
    ]
    assert [extent.resident for extent in extents] == [extent.path is BUFFERED for extent in extents]


def test_turns_are_counted_to_the_byte() -> None:
    """After both single bytes of the cache, two thirds of the drive's three bytes are behind all of the cache's two."""
    shard = facts(2 * MIB, (MIB, ABSENT), (MIB, RESIDENT))
    ranges = [(0, 2), (10, 1), (MIB, 1), (MIB + 10, 1)]
    extents = plan(shard, *(Wanted(0, offset, length, Sink.DISCARD) for offset, length in ranges))
    assert [extent.offset for extent in extents] == [0, MIB, MIB + 10, 10]


def test_what_is_not_copied_carries_no_copies() -> None:
    table = make_copy_table([(5, 10, 4096)])
    for sink in (Sink.DISCARD, Sink.HAND_OVER):
        (extent,) = plan(facts(MIB), Wanted(0, 5, 10, sink, copies=table), in_order=True)
        assert extent.copies is None


def test_lanes_take_turns_whole() -> None:
    shard = facts(48 * MIB, (16 * MIB, RESIDENT), (32 * MIB, ABSENT), direct=False)
    extents = plan(shard, Wanted(0, 0, 48 * MIB, Sink.DISCARD))
    assert [(extent.offset // MIB, extent.length // MIB, extent.lane) for extent in extents] == [
        (16, 8, True),
        (0, 4, False),
        (24, 8, True),
        (4, 4, False),
        (32, 8, True),
        (8, 4, False),
        (40, 8, True),
        (12, 4, False),
    ]


def test_devices_get_memory_in_steps() -> None:
    table = make_copy_table([(3, 200 * MIB, 77)])
    want = Wanted(0, 3, 200 * MIB, Sink.DEVICE, address=9, copies=table, device=1, fresh=True)
    extents = plan(facts(300 * MIB), want, in_order=True)
    assert extents == [
        Extent(0, DIRECT, Sink.DEVICE, 3, 96 * MIB - 3, copies=table, device=1),
        Extent(0, DIRECT, Sink.DEVICE, 96 * MIB, 96 * MIB, copies=table, device=1),
        Extent(0, DIRECT, Sink.DEVICE, 192 * MIB, 8 * MIB + 3, copies=table, device=1),
    ]


@pytest.mark.parametrize(
    ("method", "mirrored", "sink"),
    [
        (Method.AUTO, True, Sink.PLACE),
        (Method.AUTO, False, Sink.COPY),
        (Method.BUFFERED, False, Sink.PLACE),
        (Method.MMAP, True, Sink.COPY),
    ],
)
def test_what_cannot_be_read_into_place_is_copied_there(method: Method, mirrored: bool, sink: Sink) -> None:
    table = make_copy_table([(5, 10, 4096)])
    want = Wanted(0, 5, 10, Sink.PLACE, 1 << 40, mirrored, True, table, tag=12)
    (extent,) = plan(facts(MIB), want, method=method, in_order=True)
    placed = sink is Sink.PLACE
    assert extent == Extent(
        0,
        extent.path,
        sink,
        5,
        10,
        (1 << 40) if placed else 0,
        None if placed else table,
        fresh=placed,
        drop_behind=method is Method.MMAP,
        tag=12,
    )


def test_elements_that_are_handed_over_stay_whole() -> None:
    shard = facts(4 * MIB, (MIB, RESIDENT), (MIB, ABSENT), (2 * MIB, RESIDENT))
    extents = plan(shard, Wanted(0, 3, 2 * MIB + 9, Sink.HAND_OVER), in_order=True)
    # Cuts lie at multiples of 16 bytes from the beginning of the tensor, so each moves down by 13.
    assert [(extent.offset, extent.offset + extent.length) for extent in extents] == [
        (3, MIB - 13),
        (MIB - 13, 2 * MIB - 13),
        (2 * MIB - 13, 2 * MIB + 12),
    ]


def test_a_tensor_smaller_than_an_element_of_any_type_is_one_chunk() -> None:
    shard = facts(4 * MIB, (MIB, RESIDENT), (3 * MIB, ABSENT))
    (extent,) = plan(shard, Wanted(0, MIB - 3, 8, Sink.HAND_OVER), in_order=True)
    assert (extent.offset, extent.length, extent.path) == (MIB - 3, 8, DIRECT)


def test_extents_are_tagged_with_their_place_unless_they_bring_a_tag() -> None:
    wanted = [Wanted(0, 0, 10, Sink.DISCARD), Wanted(0, 10, 10, Sink.DISCARD, tag=0), Wanted(0, 20, 10, Sink.DISCARD)]
    assert [extent.tag for extent in plan(facts(MIB), *wanted)] == [0, 0, 2]


# ---- batches


def test_batches_grow_to_the_largest() -> None:
    extents = [Extent(0, DIRECT, Sink.DISCARD, n, 10) for n in range(17)]
    assert [len(batch) for batch in batches(extents, 20, 50)] == [2, 4, 5, 5, 1]
    assert [extent for batch in batches(extents, 20, 50) for extent in batch] == extents
    assert [len(batch) for batch in batches(extents, 170, 50)] == [17]
    # A first one that is larger than the largest stays what it is.
    assert [len(batch) for batch in batches(extents, 80, 50)] == [8, 8, 1]
    assert [len(batch) for batch in batches(extents, 1, 1)] == [1] * 17
    # One byte more is one extent more, in the first and in later ones.
    assert [len(batch) for batch in batches(extents, 21, 31)] == [3, 4, 4, 4, 2]
    assert list(batches([], 20, 50)) == []


# ---- the page cache


@pytest.mark.parametrize(("needed", "keep"), [(80 * MIB, True), (80 * MIB + 1, False)])
def test_a_fifth_of_free_memory_stays_free(needed: int, keep: bool) -> None:
    shards = [facts(needed)]
    decision = decide_cache(CachePolicy.AUTO, Method.BUFFERED, shards, destination_bytes=0, available_bytes=100 * MIB)
    assert decision.keep is keep


def test_what_is_cached_already_needs_no_room() -> None:
    shards = [facts(10 * MIB, (6 * MIB, RESIDENT), (4 * MIB, ABSENT)), facts(10 * MIB, known=False)]
    # 4 MiB of the first, all of the second and 2 MiB of tensors are to come, and a fifth stays free: 20 MiB.
    kept, not_kept = (
        decide_cache(CachePolicy.AUTO, Method.AUTO, shards, destination_bytes=2 * MIB, available_bytes=nbytes)
        for nbytes in (20 * MIB, 20 * MIB - 2)
    )
    assert kept == CacheDecision(
        keep=True,
        reason="the files fit into free memory (16.0 MiB of 20.0 MiB), so they stay cached for the next load",
        on_trial=True,
    )
    assert not_kept == CacheDecision(
        keep=False,
        reason="tensors and cached files together (16.0 MiB) would crowd free memory (20.0 MiB), so the page cache is "
        "left as it was",
        on_trial=False,
    )


@pytest.mark.parametrize(
    ("requested", "method", "available", "decision"),
    [
        (CachePolicy.KEEP, Method.DIRECT, GIB, (False, "direct reads leave the page cache as it is", False)),
        (CachePolicy.KEEP, Method.AUTO, 0, (True, "cache=keep was asked for", False)),
        (CachePolicy.DROP, Method.MMAP, GIB, (False, "cache=drop was asked for", False)),
        (
            CachePolicy.AUTO,
            Method.AUTO,
            None,
            (False, "free memory is unknown here, so the page cache is left as it was", False),
        ),
        (
            CachePolicy.AUTO,
            Method.BUFFERED,
            GIB,
            (
                True,
                "the files fit into free memory (64.0 KiB of 1.00 GiB), so they stay cached for the next load",
                False,
            ),
        ),
    ],
)
def test_the_reason_for_keeping_or_not(
    requested: CachePolicy, method: Method, available: int | None, decision: tuple[bool, str, bool]
) -> None:
    found = decide_cache(requested, method, [facts(64 * KIB)], destination_bytes=0, available_bytes=available)
    assert found == CacheDecision(*decision)


def test_files_that_are_cached_whole_stay() -> None:
    shards = [facts(MIB, (MIB, RESIDENT)), facts(5 * MIB, (5 * MIB, RESIDENT))]
    decision = decide_cache(CachePolicy.AUTO, Method.AUTO, shards, destination_bytes=GIB, available_bytes=0)
    assert decision == CacheDecision(keep=True, reason="the files are in the page cache already")
