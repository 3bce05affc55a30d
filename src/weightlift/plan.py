"""How the wanted ranges are read: pure decisions from facts, no I/O and no clock.

Given what is known of each shard (size, direct I/O, what the page cache holds), the options and the headroom, this
module decides whether the page cache is kept and which path every range takes. The result is a list of extents that an
engine can carry out, and the reasons in words.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.host.residency import Residency
from weightlift.operations import CopyTable, Extent, ReadPath, Sink
from weightlift.ranges import joined
from weightlift.types import CachePolicy, Method
from weightlift.units import MIB, PAGE_BYTES, align_down, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from weightlift.host.residency import ResidencyMap

GRANULE_BYTES: Final = 1 * MIB
"""Resolution at which the page cache is looked at, and so of the choice between paths."""

_INTERLEAVE_BYTES: Final = 4 * MIB
_INTERLEAVE_DEVICES_BYTES: Final = 12 * MIB
_DEVICE_BYTES: Final = 96 * MIB
_FOLIO_BYTES: Final = 2 * MIB
"""Largest unit the page cache keeps a file in: an uncached read that ends inside one drops it for the next read."""
_LANES_LEFT: Final = 16
"""How many lanes of the next one's length what is left would make."""
_LANE_BYTES_MIN: Final = 8 * MIB
_LANE_BYTES_MAX: Final = 64 * MIB
_ELEMENT_BYTES_MAX: Final = 16
_SPARE_FRACTION: Final = 0.2
"""Part of the headroom that tensors and kept page cache together must leave untouched."""


class ShardFacts(NamedTuple):
    """What is known of one shard before it is read.

    Attributes:
        name: the file's name, for sentences.
        size_bytes: its length.
        direct: whether it takes direct reads.
        direct_reason: why, in a sentence.
        dontcache: whether uncached buffered reads work on it.
        residency: what the page cache holds of it; ``None`` where that cannot be known.
    """

    name: str
    size_bytes: int
    direct: bool
    direct_reason: str
    dontcache: bool
    residency: ResidencyMap | None


class Wanted(NamedTuple):
    """One range to read and where it goes; ``copies`` makes the copy table if the range has to be staged.

    Attributes:
        shard: index of the shard.
        offset: first byte in the file.
        length: bytes.
        sink: where the bytes go.
        address: for ``PLACE``, where the byte at ``offset`` goes.
        mirrored: ``PLACE`` may be read directly (see :class:`~weightlift.operations.Extent`).
        fresh: the destination was never touched.
        copies: for ``COPY`` and ``DEVICE``, and for ``PLACE`` where it cannot be read directly: the table.
        device: for ``DEVICE``, which of the load's devices.
        tag: what its extents are tagged with; -1 for its place among the wanted ranges.
    """

    shard: int
    offset: int
    length: int
    sink: Sink
    address: int = 0
    mirrored: bool = False
    fresh: bool = False
    copies: CopyTable | None = None
    device: int = 0
    tag: int = -1


class CacheDecision(NamedTuple):
    """Whether the page cache may keep what is read, and why; ``on_trial`` until it is known what that costs."""

    keep: bool
    reason: str
    on_trial: bool = False


class Piece(NamedTuple):
    """Part of a shard and how it is read."""

    offset: int
    length: int
    path: ReadPath
    resident: bool
    drop_behind: bool


def decide_cache(
    requested: CachePolicy,
    method: Method,
    shards: Sequence[ShardFacts],
    *,
    destination_bytes: int,
    available_bytes: int | None,
) -> CacheDecision:
    """Decide whether what is read may stay in the page cache.

    Args:
        requested: the caller's policy.
        method: the caller's method; direct reads never fill the cache.
        shards: the files.
        destination_bytes: host memory the tensors themselves will take.
        available_bytes: headroom of the machine or cgroup; ``None`` where unknown.
    """
    if method is Method.DIRECT:
        return CacheDecision(keep=False, reason="direct reads leave the page cache as it is")
    if requested is not CachePolicy.AUTO:
        return CacheDecision(requested is CachePolicy.KEEP, f"cache={requested.value} was asked for")
    total = sum(shard.size_bytes for shard in shards)
    cached = sum(shard.residency.cached_bytes for shard in shards if shard.residency)
    if cached >= sum(shard.residency.looked_bytes if shard.residency else shard.size_bytes for shard in shards):
        return CacheDecision(keep=True, reason="the files are in the page cache already")
    if available_bytes is None:
        return CacheDecision(keep=False, reason="free memory is unknown here, so the page cache is left as it was")
    needed = destination_bytes + total - cached
    usable = int(available_bytes * (1 - _SPARE_FRACTION))
    if needed <= usable:
        return CacheDecision(
            keep=True,
            reason=f"the files fit into free memory ({format_bytes(needed)} of {format_bytes(available_bytes)}), "
            "so they stay cached for the next load",
            on_trial=method is Method.AUTO,
        )
    return CacheDecision(
        keep=False,
        reason=f"tensors and cached files together ({format_bytes(needed)}) would crowd free memory "
        f"({format_bytes(available_bytes)}), so the page cache is left as it was",
    )


def pieces(shard: ShardFacts, offset: int, length: int, method: Method, *, keep: bool) -> Iterator[Piece]:
    """Split a range of a shard by what the page cache holds, and choose a path for each part.

    Args:
        shard: facts about the file.
        offset: first byte.
        length: bytes.
        method: the caller's method.
        keep: whether the page cache may keep what is read.
    """
    found = (
        _piece(shard, method, start, stop, state, keep=keep)
        for start, stop, state in states(shard.residency, offset, offset + length)
    )
    return joined(found, _both)


def _both(one: Piece, other: Piece) -> Piece | None:
    return one._replace(length=one.length + other.length) if one[2:] == other[2:] else None


def _piece(shard: ShardFacts, method: Method, start: int, stop: int, state: Residency, *, keep: bool) -> Piece:
    path = _path(shard, method, resident=state is Residency.RESIDENT, keep=keep)
    resident = state is Residency.RESIDENT and path is not ReadPath.DIRECT
    absent = state is Residency.ABSENT and shard.residency is not None
    through_cache = path is not ReadPath.DIRECT
    # Uncached reads drop what they bring in themselves; where they do not exist, pages are dropped chunk by chunk.
    behind = through_cache and not keep and absent and not (path is ReadPath.DONTCACHE and shard.dontcache)
    return Piece(start, stop - start, path, resident, behind)


def states(residency: ResidencyMap | None, offset: int, end: int) -> Iterator[tuple[int, int, Residency]]:
    """Parts of a file range (first byte, byte behind the last) by what the page cache holds of them."""
    if residency is None:
        # Unknown counts as cold.
        yield offset, end, Residency.ABSENT
        return
    for run in residency.runs():
        start, stop = max(offset, run.offset), min(end, run.offset + run.length)
        if start < stop:
            yield start, stop, run.state
    if end > residency.size_bytes:
        yield max(offset, residency.size_bytes), end, Residency.ABSENT


def _path(shard: ShardFacts, method: Method, *, resident: bool, keep: bool) -> ReadPath:
    if method is Method.MMAP:
        return ReadPath.MAPPED
    through_cache = ReadPath.BUFFERED if keep or resident else ReadPath.DONTCACHE
    if method is Method.BUFFERED:
        return through_cache
    if method is Method.AUTO and (resident or keep):
        return through_cache
    return ReadPath.DIRECT if shard.direct else ReadPath.DONTCACHE


def plan_extents(
    wanted: Iterable[Wanted], shards: Sequence[ShardFacts], method: Method, *, keep: bool, in_order: bool
) -> list[Extent]:
    """Turn wanted ranges into extents, in the order in which they are to be read.

    Args:
        wanted: what to read, in file order.
        shards: facts per shard.
        method: the caller's method.
        keep: whether the page cache may keep what is read.
        in_order: see :func:`in_turns`.
    """
    extents = extents_of(wanted, shards, method, keep=keep, in_order=in_order)
    return list(in_turns(extents, in_order=in_order))


def extents_of(
    wanted: Iterable[Wanted], shards: Sequence[ShardFacts], method: Method, *, keep: bool, in_order: bool
) -> list[Extent]:
    """The extents of :func:`plan_extents`, those for different devices uncut and all in file order."""
    extents = [
        _extent(want, piece, tag if want.tag < 0 else want.tag)
        for tag, want in enumerate(wanted)
        for piece in _whole_elements(want, pieces(shards[want.shard], want.offset, want.length, method, keep=keep))
    ]
    # A device's memory is allocated extent by extent, while earlier ones are being read.
    extents = [part for extent in extents for part in _in_device_steps(extent)]
    if in_order:
        return extents
    return list(_in_lanes(extents))


def _in_device_steps(extent: Extent) -> Iterator[Extent]:
    if extent.sink is Sink.DEVICE:
        yield from _cut(extent, _DEVICE_BYTES, _FOLIO_BYTES)
    else:
        yield extent


def _needs_lane(extent: Extent) -> bool:
    """Reads of storage through the page cache live on read-ahead, which wants one sequential reader per open file."""
    through_cache = extent.path in {ReadPath.BUFFERED, ReadPath.DONTCACHE}
    return through_cache and not extent.resident and extent.sink is not Sink.HAND_OVER


def _in_lanes(extents: Sequence[Extent]) -> Iterator[Extent]:
    """Cut what needs lanes into them: long ones first, as each begins slowly, and short ones last.

    Workers then end at about the same time, however many there are; one left alone with a long lane reads it at a
    fraction of the drive's speed.
    """
    left = sum(extent.length for extent in extents if _needs_lane(extent))
    for extent in extents:
        if not _needs_lane(extent):
            yield extent
            continue
        start, end = extent.offset, extent.offset + extent.length
        while start < end:
            lane_bytes = min(max(left // _LANES_LEFT, _LANE_BYTES_MIN), _LANE_BYTES_MAX)
            stop = min(align_down(start + lane_bytes, _FOLIO_BYTES), end)
            yield _part(extent, start, stop)._replace(lane=True)
            left -= stop - start
            start = stop


def _whole_elements(want: Wanted, parts: Iterable[Piece]) -> Iterator[Piece]:
    """For ranges handed over, move cuts so that no element of any type is divided between two chunks."""
    if want.sink is not Sink.HAND_OVER:
        yield from parts
        return
    end = want.offset + want.length
    start = want.offset
    for part in parts:
        stop = part.offset + part.length
        if stop < end:
            stop = want.offset + align_down(stop - want.offset, _ELEMENT_BYTES_MAX)
        if stop > start:
            yield part._replace(offset=start, length=stop - start)
            start = stop


def _extent(want: Wanted, piece: Piece, tag: int) -> Extent:
    sink, address, copies = want.sink, want.address, want.copies
    if sink is Sink.PLACE:
        if piece.path is ReadPath.MAPPED or (piece.path is ReadPath.DIRECT and not want.mirrored):
            sink = Sink.COPY
        else:
            address, copies = address + piece.offset - want.offset, None
    if sink is not Sink.PLACE:
        address = 0
    return Extent(
        want.shard,
        piece.path,
        sink,
        piece.offset,
        piece.length,
        address,
        copies if sink in {Sink.COPY, Sink.DEVICE} else None,
        want.fresh and sink is Sink.PLACE,
        piece.drop_behind,
        piece.resident,
        device=want.device,
        tag=tag,
    )


def in_turns(extents: Sequence[Extent], *, in_order: bool) -> Iterator[Extent]:
    """Alternate in proportion between what can be busy at the same time: storage, page cache, and each device's link.

    Tensors of one layer lie together in most files and go to one device, so that in file order the other links idle.
    One by one, since the first are read while the rest is still being worked out.

    Args:
        extents: in file order.
        in_order: leave them so.
    """
    kinds: dict[tuple[bool, bool, int], list[Extent]] = {}
    for extent in extents:
        kinds.setdefault((extent.resident, extent.sink is Sink.DEVICE, extent.device), []).append(extent)
    if in_order or len(kinds) < 2:
        yield from extents
        return
    step = _INTERLEAVE_BYTES if len({resident for resident, *_ in kinds}) > 1 else _INTERLEAVE_DEVICES_BYTES
    queues = [_Queue(kind, step) for _, kind in sorted(kinds.items())]
    while queues:
        # The one that is done with the smallest part of its bytes goes on.
        behind = min(queues, key=attrgetter("done_fraction"))
        part = next(behind.parts, None)
        if part is None:
            queues.remove(behind)
            continue
        behind.done_fraction += part.length / behind.total_bytes
        yield part


class _Queue:
    """Extents of one kind, cut into the parts that take turns with others', and how far they are."""

    def __init__(self, extents: Sequence[Extent], step: int) -> None:
        self.parts = _parts(extents, step)
        self.total_bytes = sum(extent.length for extent in extents)
        self.done_fraction = 0.0


def _parts(extents: Sequence[Extent], step: int) -> Iterator[Extent]:
    for extent in extents:
        if extent.lane:
            yield extent
        else:
            yield from _cut(extent, step, PAGE_BYTES)


def _cut(extent: Extent, step: int, alignment: int) -> Iterator[Extent]:
    """An extent in parts of at most ``step`` bytes, cut at multiples of ``alignment``, no larger, in the file."""
    start, end = extent.offset, extent.offset + extent.length
    while start < end:
        stop = min(align_down(start + step, alignment), end)
        yield _part(extent, start, stop)
        start = stop


def _part(extent: Extent, start: int, stop: int) -> Extent:
    address = extent.address + start - extent.offset if extent.sink is Sink.PLACE else 0
    # Thousands are made while devices wait; `_replace` takes twice as long.
    return Extent._make((*extent[:3], start, stop - start, address, *extent[6:]))


def batches(extents: Iterable[Extent], first_bytes: int, most_bytes: int) -> Iterator[Sequence[Extent]]:
    """Extents in parts of growing size: little has to be allocated before the first bytes move, nor at any one time."""
    batch: list[Extent] = []
    nbytes = 0
    for extent in extents:
        batch.append(extent)
        nbytes += extent.length
        if nbytes >= first_bytes:
            yield batch
            batch, nbytes, first_bytes = [], 0, min(2 * first_bytes, max(first_bytes, most_bytes))
    if batch:
        yield batch
