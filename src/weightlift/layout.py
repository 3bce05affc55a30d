"""Where tensors land in host memory: pure arithmetic over a description, no memory and no I/O.

A *span* is a contiguous file range with one rule for where its bytes go. Mostly a span mirrors the file page for page:
its address is congruent to its file offset modulo the page size, so that direct reads of whole blocks go straight to
the final place, whatever tensors they hold. A span whose tensors would then be misaligned for their data type (files
with unpadded headers exist) is shifted by a few bytes, and tensors in very short runs are packed one by one.

A *group* is what one owner holds: one large tensor, or a run of small ones that share a slab.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec import Struct

from weightlift.description import picked
from weightlift.operations import make_copy_table
from weightlift.units import KIB, MIB, PAGE_BYTES, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.description import Description
    from weightlift.operations import CopyTable

LARGE_TENSOR_BYTES: Final = 1 * MIB
"""From this size on a tensor owns its storage alone."""

SLAB_BYTES: Final = 16 * MIB
"""Most bytes that small tensors share: what one of them, kept, keeps alive."""

_SHORT_RUN_BYTES: Final = 64 * KIB
"""Runs under this size are packed: whole pages around each would cost more memory than copying costs time."""

PACKED_GAP_BYTES: Final = 64 * KIB
"""Unwanted bytes between packed tensors that are read along, since another read would cost more."""

_PACKED_ALIGNMENT: Final = 64
_RESIDUES: Final = 8


class Span(NamedTuple):
    """A contiguous file range and where it goes.

    Attributes:
        shard: index of the shard.
        offset: first byte in the file.
        length: bytes.
        place: where in the region the byte at ``offset`` goes; unused if packed.
        mirrored: ``place`` is congruent to ``offset`` modulo the page size, with whole pages of its own around it.
        first: index of the first selected tensor in it.
        end: index behind the last.
        packed: its tensors have places of their own.
    """

    shard: int
    offset: int
    length: int
    place: int
    mirrored: bool
    first: int
    end: int
    packed: bool


class Group(NamedTuple):
    """Neighbouring selected tensors that share one lease of the region.

    Attributes:
        first: index of the first selected tensor.
        end: index behind the last.
        place: first byte of the lease in the region.
        length: bytes of the lease.
    """

    first: int
    end: int
    place: int
    length: int


class Layout(Struct, frozen=True):
    """Where the selected tensors go.

    Attributes:
        rows: rows of the description, in file order; "selected tensor ``i``" is ``rows[i]``.
        places: first byte of each selected tensor in the region.
        spans: what to read; tensors without bytes are in none.
        groups: who shares a lease; every selected tensor with bytes is in exactly one.
        region_bytes: size of the region.
    """

    rows: Sequence[int]
    places: array[int]
    spans: tuple[Span, ...]
    groups: tuple[Group, ...]
    region_bytes: int


class _Run(NamedTuple):
    shard: int
    first: int
    end: int
    offset: int
    length: int
    shift: int


def lay_out(
    description: Description,
    rows: Sequence[int],
    *,
    large_bytes: int = LARGE_TENSOR_BYTES,
    slab_bytes: int = SLAB_BYTES,
) -> Layout:
    """Find a place for every selected tensor.

    Args:
        description: the checkpoint.
        rows: the selected rows, rising.
        large_bytes: from this size on a tensor is a group of its own.
        slab_bytes: most bytes of a group of smaller ones.
    """
    places = array("Q", bytes(8 * len(rows)))
    lengths, offsets = picked(description.lengths, rows), picked(description.offsets, rows)
    spans: list[Span] = []
    cursor = 0
    for run in _merged_short_runs(list(_runs(description, rows))):
        if run.shift < 0:
            cursor = _pack(lengths, run, cursor, places)
            spans.append(Span(run.shard, run.offset, run.length, 0, False, run.first, run.end, packed=True))
            continue
        # Pages of its own on both sides, so that reading whole blocks around the span hits nobody else's bytes.
        place = align_up(cursor, PAGE_BYTES) + (run.offset + run.shift) % PAGE_BYTES
        members, moved = slice(run.first, run.end), place - run.offset
        # Tensors without bytes may lie anywhere, even in the next shard.
        placed = zip(offsets[members], lengths[members], strict=True)
        places[members] = array("Q", [offset + moved if length else 0 for offset, length in placed])
        cursor = align_up(place + run.length, PAGE_BYTES)
        spans.append(Span(run.shard, run.offset, run.length, place, run.shift == 0, run.first, run.end, packed=False))
    groups = tuple(_groups(lengths, spans, places, (large_bytes, slab_bytes)))
    return Layout(rows, places, tuple(spans), groups, align_up(cursor, PAGE_BYTES))


def _runs(description: Description, rows: Sequence[int]) -> Iterator[_Run]:
    """Maximal sequences of tensors that touch in the file and that one shift aligns."""
    columns = (description.offsets, description.lengths, description.shard_indexes, description.dtype_codes)
    alignments = [dtype.alignment for dtype in description.dtypes]
    shard, first, begin, end, shift = -1, 0, 0, 0, 0
    tensors = zip(*(picked(column, rows) for column in columns), strict=True)
    for index, (offset, length, found_in, code) in enumerate(tensors):
        if length == 0:
            continue
        same_shard = found_in == shard
        if same_shard and offset == end and (offset + shift) % alignments[code] == 0:
            end = offset + length
            continue
        if end > begin:
            yield _Run(shard, first, index, begin, end - begin, shift)
        if not same_shard:
            shard = found_in
            # An unpadded header shifts every tensor of the file alike.
            shift = -description.shards[shard].data_offset % _RESIDUES
        if (offset + shift) % alignments[code]:
            shift = -offset % _RESIDUES
        first, begin, end = index, offset, offset + length
    if end > begin:
        yield _Run(shard, first, len(rows), begin, end - begin, shift)


def _merged_short_runs(runs: list[_Run]) -> Iterator[_Run]:
    """Long runs as they are; neighbouring short ones as one packed run (``shift`` -1)."""
    pending: _Run | None = None
    for run in runs:
        if run.length >= _SHORT_RUN_BYTES:
            if pending:
                yield pending
            pending = None
            yield run
        elif (
            pending
            and pending.shard == run.shard
            and run.offset - pending.offset - pending.length <= PACKED_GAP_BYTES
            and run.offset + run.length - pending.offset <= SLAB_BYTES
        ):
            pending = pending._replace(end=run.end, length=run.offset + run.length - pending.offset)
        else:
            if pending:
                yield pending
            pending = run._replace(shift=-1)
    if pending:
        yield pending


def _pack(lengths: Sequence[int], run: _Run, cursor: int, places: array[int]) -> int:
    for index, length in enumerate(lengths[run.first : run.end], run.first):
        if length:
            cursor = align_up(cursor, _PACKED_ALIGNMENT)
            places[index] = cursor
            cursor += length
    return cursor


def _groups(
    lengths: Sequence[int], spans: Sequence[Span], places: array[int], sizes: tuple[int, int]
) -> Iterator[Group]:
    large_bytes, slab_bytes = sizes
    for span in spans:
        first = -1
        begin = end = 0
        members = slice(span.first, span.end)
        for index, (length, place) in enumerate(zip(lengths[members], places[members], strict=True), span.first):
            if length == 0:
                continue
            large = length >= large_bytes
            if first >= 0 and (large or place + length - begin > slab_bytes):
                yield Group(first, index, begin, end - begin)
                first = -1
            if first < 0:
                first, begin = index, place
            end = place + length
            if large:
                yield Group(first, index + 1, begin, end - begin)
                first = -1
        if first >= 0:
            yield Group(first, span.end, begin, end - begin)


def copy_table(description: Description, layout: Layout, span: Span, region_address: int) -> CopyTable:
    """The copy table of a span: where in memory each of its tensors goes, one entry per tensor (or one in all).

    Args:
        description: the checkpoint.
        layout: the layout the span belongs to.
        span: which range.
        region_address: address of the region's first byte.
    """
    if not span.packed:
        return make_copy_table([(span.offset, span.length, region_address + span.place)])
    packed = ((layout.rows[index], layout.places[index]) for index in range(span.first, span.end))
    offsets, lengths = description.offsets, description.lengths
    return make_copy_table(
        (offsets[row], lengths[row], region_address + place) for row, place in packed if lengths[row]
    )
