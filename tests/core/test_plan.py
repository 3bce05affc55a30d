"""Properties of plans on random checkpoints: nothing lost, nothing twice, nothing over the budget."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightlift.errors import BudgetError
from weightlift.host.residency import Residency, ResidencyMap, ResidencyRun
from weightlift.layout import Layout, copy_table, lay_out
from weightlift.operations import Extent, ReadPath, Sink
from weightlift.options import CHUNK_BYTES_MIN, SMALLEST_HOST_MEMORY_BYTES, WORKERS_MAX
from weightlift.plan import GRANULE_BYTES, ShardFacts, Wanted, decide_cache, pieces, plan_extents
from weightlift.staging import ALIGNMENT_SLACK_BYTES, Pool, plan_device_pool, plan_pool
from weightlift.testing.strategies import residencies, selections
from weightlift.types import CachePolicy, Method
from weightlift.units import GIB, KIB, MIB, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.description import Description

REGION = 1 << 40
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def wanted_by(description: Description, layout: Layout, sinks: list[Sink]) -> list[Wanted]:
    """What targets ask for: the spans to be placed, or each range for another sink."""
    wanted = []
    for number, span in enumerate(layout.spans):
        sink = sinks[number % len(sinks)]
        if sink in {Sink.PLACE, Sink.COPY}:
            copies = copy_table(description, layout, span, REGION)
            place = Sink.COPY if span.packed else Sink.PLACE
            address = 0 if span.packed else REGION + span.place
            wanted.append(
                Wanted(span.shard, span.offset, span.length, place, address, span.mirrored, not span.packed, copies)
            )
        else:
            wanted.append(Wanted(span.shard, span.offset, span.length, sink))
    return wanted


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    description, rows = draw(selections())
    layout = lay_out(description, rows)
    facts = [
        ShardFacts(
            shard.path.name,
            shard.identity.size_bytes,
            draw(st.booleans()),
            "because",
            draw(st.booleans()),
            draw(residencies(shard.identity.size_bytes)),
        )
        for shard in description.shards
    ]
    sinks = draw(st.lists(st.sampled_from([Sink.PLACE, Sink.DISCARD, Sink.HAND_OVER]), min_size=1, max_size=3))
    wanted = wanted_by(description, layout, sinks)
    method, keep = draw(st.sampled_from(list(Method))), draw(st.booleans())
    in_order = draw(st.booleans()) or Sink.HAND_OVER in sinks
    extents = plan_extents(wanted, facts, method, keep=keep, in_order=in_order)
    return {
        "wanted": wanted,
        "facts": facts,
        "method": method,
        "keep": keep,
        "in_order": in_order,
        "extents": extents,
    }


def state_at(facts: ShardFacts, offset: int) -> Residency | None:
    if facts.residency is None:
        return None
    for run in facts.residency.runs():
        if run.offset <= offset < run.offset + run.length:
            return run.state
    return Residency.ABSENT


@QUICK
@given(plans())
def test_extents_cover_what_is_wanted_once(plan: dict[str, Any]) -> None:
    wanted, extents = plan["wanted"], plan["extents"]
    by_want: dict[int, list[Extent]] = {}
    for extent in extents:
        by_want.setdefault(extent.tag, []).append(extent)
    assert sorted(by_want) == list(range(len(wanted)))
    for tag, parts in by_want.items():
        want, position = wanted[tag], wanted[tag].offset
        for part in sorted(parts, key=lambda extent: extent.offset):
            assert (part.shard, part.offset) == (want.shard, position)
            assert part.length > 0
            position += part.length
            check_part(plan, want, part)
        assert position == want.offset + want.length
    if plan["in_order"]:
        assert [extent.tag for extent in extents] == sorted(extent.tag for extent in extents)
        assert all(a.offset < b.offset for a, b in pairwise(extents) if a.tag == b.tag)


def check_part(plan: dict[str, Any], want: Wanted, part: Extent) -> None:
    """One extent against what is known of its shard."""
    facts, keep, method = plan["facts"][part.shard], plan["keep"], plan["method"]
    if want.sink is Sink.PLACE and part.sink is Sink.PLACE:
        assert part.address - want.address == part.offset - want.offset
        assert part.copies is None
        assert part.path is not ReadPath.DIRECT or (
            want.mirrored and part.address % PAGE_BYTES == part.offset % PAGE_BYTES
        )
    elif want.sink in {Sink.PLACE, Sink.COPY}:
        assert part.sink is Sink.COPY
        assert part.copies == want.copies
        assert not part.fresh
    else:
        assert part.sink is want.sink
    if want.sink is Sink.HAND_OVER and part.offset + part.length < want.offset + want.length:
        assert (part.offset + part.length - want.offset) % 16 == 0, "no element is divided"
    assert part.path is not ReadPath.DIRECT or facts.direct
    assert (part.path is ReadPath.MAPPED) == (method is Method.MMAP)
    assert method is not Method.BUFFERED or part.path is not ReadPath.DIRECT
    state = state_at(facts, part.offset + 15 if want.sink is Sink.HAND_OVER else part.offset)
    if part.drop_behind:
        assert not keep
        assert state is Residency.ABSENT
        assert facts.residency is not None
    if part.path is ReadPath.DONTCACHE and method is not Method.DIRECT:
        assert not keep


@given(st.data())
def test_pieces_follow_what_the_cache_holds(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40 * MIB))
    facts = ShardFacts("shard", size, True, "", data.draw(st.booleans()), data.draw(residencies(size)))
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    keep = data.draw(st.booleans())
    for piece in pieces(facts, offset, length, Method.AUTO, keep=keep):
        for probe in (piece.offset, piece.offset + piece.length - 1):
            state = state_at(facts, probe)
            assert piece.resident == (state is Residency.RESIDENT)
            through_cache = keep or state is Residency.RESIDENT
            assert piece.path is (ReadPath.BUFFERED if through_cache else ReadPath.DIRECT)
            assert not piece.drop_behind


@QUICK
@given(plans(), st.data())
def test_the_pool_never_exceeds_the_budget(plan: dict[str, Any], data: st.DataObject) -> None:
    extents = plan["extents"]
    budget = data.draw(st.one_of(st.integers(SMALLEST_HOST_MEMORY_BYTES, 20 * MIB), st.integers(20 * MIB, 2 * GIB)))
    workers = data.draw(st.one_of(st.none(), st.integers(1, WORKERS_MAX)))
    chunk = data.draw(st.one_of(st.none(), st.integers(CHUNK_BYTES_MIN // PAGE_BYTES, 16 * KIB)))
    chunk_bytes = chunk * PAGE_BYTES if chunk else None
    processors = data.draw(st.integers(1, 128))

    def plan_with(budget_bytes: int) -> Any:
        return plan_pool(
            extents, budget_bytes=budget_bytes, processors=processors, workers=workers, chunk_bytes=chunk_bytes
        )

    smallest = smallest_needed(lambda: plan_with(budget))
    if smallest is not None:
        assert workers is not None or chunk_bytes is not None, "free to choose, there is always a plan"
        assert smallest > budget
        budget = smallest
    pool = plan_with(budget)
    assert sum(term.nbytes for term in pool.terms) <= budget
    own = {term.name: term.nbytes for term in pool.terms}["bookkeeping"]
    assert own > 0, "Python needs memory too while it loads"
    assert pool.slot_count * pool.slot_bytes <= budget - own
    assert 1 <= pool.workers <= pool.worker_room
    assert 0 < pool.chunk_bytes <= pool.chunk_bytes_max
    assert pool.chunk_bytes % PAGE_BYTES == 0 == pool.chunk_bytes_max % PAGE_BYTES
    assert workers is None or (pool.workers, pool.worker_room) == (workers, workers)
    assert chunk_bytes is None or pool.chunk_bytes == pool.chunk_bytes_max == chunk_bytes
    if any(extent.sink is not Sink.PLACE for extent in extents):
        assert pool.slot_count >= 1
        assert pool.slot_bytes >= pool.chunk_bytes_max + ALIGNMENT_SLACK_BYTES
        if workers is None and chunk_bytes is None:
            enough = -(-sum(extent.length for extent in extents) // pool.chunk_bytes_max)
            assert pool.slot_count >= min(4, enough), "reading goes on while slots are copied out of"
    else:
        assert pool.slot_count == 0


def test_copying_out_of_the_page_cache_gives_every_worker_a_slot() -> None:
    extents = [Extent(0, ReadPath.BUFFERED, Sink.DISCARD, 0, GIB, resident=True)]
    pool = plan_pool(extents, budget_bytes=8 * MIB, processors=16, workers=None, chunk_bytes=None)
    assert pool.workers == pool.worker_room == pool.slot_count == 16
    assert 400 * KIB < pool.chunk_bytes <= 512 * KIB


@pytest.mark.parametrize(("cached", "workers"), [(0, 4), (1, 7), (2, 10), (3, 13), (4, 16)])
def test_concurrency_starts_between_storage_and_cache_by_what_is_cached(cached: int, workers: int) -> None:
    path = ReadPath.BUFFERED
    extents = [
        Extent(0, path, Sink.PLACE, part * GIB, GIB, part * GIB, fresh=True, resident=part < cached)
        for part in range(4)
    ]
    pool = plan_pool(extents, budget_bytes=128 * MIB, processors=16, workers=None, chunk_bytes=None)
    assert (pool.workers, pool.chunk_bytes) == (workers, 2 * MIB)


def smallest_needed(plan: Callable[[], Any]) -> int | None:
    """The budget a refusal asks for; ``None`` if there was none."""
    with suppress(BudgetError):
        plan()
        return None
    with pytest.raises(BudgetError) as caught:
        plan()
    assert caught.value.smallest_bytes is not None
    assert str(caught.value.smallest_bytes) in caught.value.hint
    return caught.value.smallest_bytes


@given(st.data())
def test_ranges_handed_over_are_cut_between_elements(data: st.DataObject) -> None:
    size = data.draw(st.integers(4 * MIB, 40 * MIB))
    facts = ShardFacts("shard", size, True, "", True, data.draw(residencies(size)))
    offset = data.draw(st.integers(0, 3 * MIB))
    length = data.draw(st.integers(1, size - offset))
    wanted = [Wanted(0, offset, length, Sink.HAND_OVER), Wanted(0, offset, length, Sink.HAND_OVER)]
    extents = plan_extents(wanted, [facts], Method.AUTO, keep=False, in_order=True)
    for tag in (0, 1):
        parts = [extent for extent in extents if extent.tag == tag]
        ends = [extent.offset + extent.length for extent in parts]
        assert [extent.offset for extent in parts] == [offset, *ends[:-1]]
        assert ends[-1] == offset + length
        assert all((end - offset) % 16 == 0 for end in ends[:-1])


def facts_of(size: int, cached: int | None) -> ShardFacts:
    if cached is None:
        return ShardFacts("shard", size, True, "", True, None)
    runs = [ResidencyRun(0, cached, Residency.RESIDENT), ResidencyRun(cached, size - cached, Residency.ABSENT)]
    kept = tuple(run for run in runs if run.length)
    return ShardFacts("shard", size, True, "", True, ResidencyMap(GRANULE_BYTES, size, cached, kept))


@pytest.mark.parametrize(
    ("requested", "method", "cached", "destination", "available", "keep", "words"),
    [
        ("keep", Method.AUTO, 0, 0, 0, True, "asked for"),
        ("drop", Method.BUFFERED, 0, 0, 100 * GIB, False, "asked for"),
        ("keep", Method.DIRECT, 0, 0, 100 * GIB, False, "direct"),
        ("auto", Method.DIRECT, 0, 0, 100 * GIB, False, "direct"),
        ("auto", Method.AUTO, 10 * GIB, 10 * GIB, 1 * GIB, True, "already"),
        ("auto", Method.AUTO, 0, 10 * GIB, None, False, "unknown"),
        ("auto", Method.AUTO, None, 10 * GIB, 25 * GIB, True, "fit"),
        ("auto", Method.AUTO, None, 10 * GIB, 24 * GIB, False, "crowd"),
        ("auto", Method.BUFFERED, 5 * GIB, 10 * GIB, 19 * GIB, True, "fit"),
        ("auto", Method.BUFFERED, 5 * GIB, 10 * GIB, 18 * GIB, False, "crowd"),
        ("auto", Method.AUTO, 0, 0, 13 * GIB, True, "fit"),
    ],
)
def test_whether_the_cache_is_kept(
    requested: str, method: Method, cached: int | None, destination: int, available: int | None, keep: bool, words: str
) -> None:
    decision = decide_cache(
        CachePolicy(requested),
        method,
        [facts_of(10 * GIB, cached)],
        destination_bytes=destination,
        available_bytes=available,
    )
    assert decision.keep == keep
    assert words in decision.reason


def test_cached_and_stored_ranges_take_turns() -> None:
    runs = tuple(
        ResidencyRun(n * 16 * MIB, 16 * MIB, Residency.RESIDENT if n % 2 else Residency.ABSENT) for n in range(8)
    )
    facts = ShardFacts("shard", 128 * MIB, True, "", True, ResidencyMap(GRANULE_BYTES, 128 * MIB, 64 * MIB, runs))
    extents = plan_extents([Wanted(0, 0, 128 * MIB, Sink.DISCARD)], [facts], Method.AUTO, keep=False, in_order=False)
    assert sum(extent.length for extent in extents) == 128 * MIB
    for first in range(0, len(extents), 8):
        part = extents[first : first + 8]
        cached = sum(extent.length for extent in part if extent.resident)
        assert cached * 2 == sum(extent.length for extent in part), "every stretch keeps both busy"


def cached_file(size: int) -> ShardFacts:
    return ShardFacts(
        "shard",
        size,
        True,
        "",
        False,
        ResidencyMap(GRANULE_BYTES, size, size, (ResidencyRun(0, size, Residency.RESIDENT),)),
    )


def test_links_to_several_devices_are_fed_in_turns() -> None:
    # As layers are split over cards: the first tensors for one card, twice as many after them for the other.
    sizes, step = (200 * MIB, 400 * MIB), 12 * MIB
    wanted = [
        Wanted(0, 0, sizes[0], Sink.DEVICE, device=0),
        Wanted(0, sizes[0], sizes[1], Sink.DEVICE, device=1),
    ]
    facts = [cached_file(sum(sizes))]
    extents = plan_extents(wanted, facts, Method.AUTO, keep=True, in_order=False)
    done = [0, 0]
    for extent in extents:
        assert extent.offset == done[0] if extent.device == 0 else extent.offset == sizes[0] + done[1]
        done[extent.device] += extent.length
        ahead = done[0] * sizes[1] - done[1] * sizes[0]
        assert abs(ahead) <= step * max(sizes), "no more than a step further in one than in the other"
    assert done == list(sizes)
    assert {extent.length for extent in extents if extent.device} == {step, 4 * MIB}, "in large steps, and the rest"
    ordered = plan_extents(wanted, facts, Method.AUTO, keep=True, in_order=True)
    assert [extent.device for extent in ordered] == sorted(extent.device for extent in ordered)


def test_tensors_in_host_memory_take_turns_with_those_for_devices() -> None:
    size = 24 * MIB
    wanted = [
        Wanted(0, 0, size, Sink.DISCARD),
        Wanted(0, size, size, Sink.DEVICE, device=0),
        Wanted(0, 2 * size, size, Sink.DEVICE, device=1),
    ]
    extents = plan_extents(wanted, [cached_file(3 * size)], Method.AUTO, keep=True, in_order=False)
    assert [(extent.tag, extent.length) for extent in extents] == [
        (tag, 12 * MIB) for _ in range(2) for tag in range(3)
    ]


def test_what_is_looked_at_decides_whether_all_is_cached() -> None:
    runs = (ResidencyRun(0, 16 * MIB, Residency.RESIDENT), ResidencyRun(16 * MIB, 48 * MIB, Residency.UNSEEN))
    shard = ShardFacts("shard", 64 * MIB, True, "", False, ResidencyMap(GRANULE_BYTES, 64 * MIB, 16 * MIB, runs))
    decision = decide_cache(CachePolicy.AUTO, Method.AUTO, [shard], destination_bytes=0, available_bytes=0)
    assert decision == (True, "the files are in the page cache already", False)


def warm_pool(budget: int, devices: int, processors: int) -> Pool:
    """Staging for 64 GiB out of the page cache onto devices."""
    return plan_device_pool(
        (),
        budget_bytes=budget,
        processors=processors,
        workers=None,
        chunk_bytes=None,
        total_bytes=64 * GIB,
        stored_bytes=0,
        pinned=True,
        devices=devices,
    )


@pytest.mark.parametrize("processors", [2, 16, 32, 192])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("budget", [8 * MIB, 32 * MIB, 128 * MIB, 512 * MIB])
def test_staging_for_devices_stays_within_the_budget(budget: int, devices: int, processors: int) -> None:
    pool = warm_pool(budget, devices, processors)
    assert sum(term.nbytes for term in pool.terms) <= budget
    assert pool.workers <= pool.slot_count
    assert pool.workers <= max(2, processors)


def test_several_links_are_fed_by_more_workers_than_one() -> None:
    one, two = (warm_pool(128 * MIB, devices, processors=32) for devices in (1, 2))
    assert (one.chunk_bytes, two.chunk_bytes) == (4 * MIB, 2 * MIB)
    assert two.workers > 1.5 * one.workers
    for pool in (one, two):
        assert pool.slot_count >= 1.25 * pool.workers, "some slots wait for the link while every worker fills one"


@pytest.mark.parametrize(("stored", "workers"), [(0, 5), (64 * GIB, 4)])
def test_few_workers_feed_copies_out_of_pageable_memory(stored: int, workers: int) -> None:
    pool = plan_device_pool(
        (),
        budget_bytes=128 * MIB,
        processors=32,
        workers=None,
        chunk_bytes=None,
        total_bytes=64 * GIB,
        stored_bytes=stored,
        pinned=False,
    )
    assert pool.worker_room == workers
    assert pool.chunk_bytes <= 4 * MIB
    assert sum(term.nbytes for term in pool.terms) <= 128 * MIB


def test_a_tight_budget_has_slots_to_spare_too() -> None:
    pool = warm_pool(32 * MIB, 1, processors=32)
    assert pool.chunk_bytes == 2 * MIB
    assert pool.slot_count >= 1.25 * pool.workers
