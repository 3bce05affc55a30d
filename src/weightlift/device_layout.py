"""Where tensors land in a device's memory: pure arithmetic over a description, no memory and no I/O.

A *block* is one allocation: a large tensor alone, or a slab that many small ones share. What touches in the file
touches in the slab too, so that one copy brings many small tensors: a copy costs some microseconds however small it is.
But no tensor lies worse than in memory of its own: with less alignment kernels take slower ways, or ways that round
differently (cuBLASLt looks at up to 256 bytes, vectorised kernels at 16).
"""

from __future__ import annotations

import functools
import itertools
import operator
from array import array
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec import Struct

from weightlift.description import picked
from weightlift.layout import Layout, lay_out
from weightlift.operations import COPY_FIELDS, CopyTable
from weightlift.units import MIB, align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.description import Description
    from weightlift.layout import Group, Span

LARGE_BYTES: Final = 10 * MIB
"""From this size on a tensor has a block of its own. Allocators take smaller ones out of larger pieces, with waste;
this is where torch's begins to reserve what was asked for, rounded up to 2 MiB."""

SLAB_BYTES: Final = 32 * MIB
"""Most bytes of a slab: what one small tensor, kept, keeps alive."""

ALIGNMENT: Final = 512
"""What blocks begin at multiples of, and tensors of as many bytes in a slab: what torch's own allocations do."""

_SMALL_ALIGNMENT: Final = 16
"""The same for smaller tensors, down to this size. Smaller ones are no kernel's vectors."""


class Block(NamedTuple):
    """One allocation.

    Attributes:
        nbytes: its size.
        row: for a tensor alone, its row; -1 for a slab.
        entries: indexes of the copy-table entries that fill it.
    """

    nbytes: int
    row: int
    entries: tuple[int, ...]


class DeviceLayout(Struct, frozen=True):
    """Where the selected tensors go on a device.

    Attributes:
        layout: runs and groups of the selected tensors.
        blocks: the allocations.
        block_of: for each selected tensor, its block; -1 for tensors without bytes.
        offset_of: for each selected tensor, its first byte in the block.
        numbers: copy table of all spans one after the other; until a block is allocated, the addresses of its entries
            are offsets in it.
        tables: for each span, its part of the table.
        entry_blocks: for each entry of the table, its block.
    """

    layout: Layout
    blocks: tuple[Block, ...]
    block_of: array[int]
    offset_of: array[int]
    numbers: array[int]
    tables: tuple[CopyTable, ...]
    entry_blocks: array[int]


class _Builder:
    """Collects blocks and entries; a slab stays open until it is full."""

    def __init__(self, description: Description, layout: Layout) -> None:
        self.description, self.layout = description, layout
        self.lengths = picked(description.lengths, layout.rows)
        self.sizes: list[int] = []
        self.rows: list[int] = []
        self.entries: list[list[int]] = []
        count = len(layout.rows)
        self.block_of, self.offset_of = array("q", [-1]) * count, array("Q", [0]) * count
        self.numbers, self.entry_blocks = array("Q"), array("Q")
        self._slab = -1
        self._span_first = 0

    def own(self, nbytes: int, row: int) -> int:
        """A block for one tensor."""
        self.sizes.append(nbytes)
        self.rows.append(row)
        self.entries.append([])
        return len(self.sizes) - 1

    def shared(self, nbytes: int, alignment: int) -> tuple[int, int]:
        """Room in a slab, at a multiple of ``alignment``."""
        offset = align_up(self.sizes[self._slab], alignment) if self._slab >= 0 else 0
        if self._slab < 0 or offset + nbytes > SLAB_BYTES:
            self._slab, offset = self.own(0, -1), 0
        self.sizes[self._slab] = offset + nbytes
        return self._slab, offset

    def entry(self, offset: int, length: int, block: int, place: int) -> None:
        """One entry of the copy table."""
        self.entries[block].append(len(self.entry_blocks))
        self.entry_blocks.append(block)
        self.numbers.extend((offset, length, place))

    def extend(self, offset: int, length: int, block: int, place: int) -> None:
        """The same, as part of the entry before if it goes on there in the file and in the block."""
        last = len(self.entry_blocks) - 1
        if last >= self._span_first and self.entry_blocks[last] == block:
            before, nbytes, at = self.numbers[COPY_FIELDS * last : COPY_FIELDS * (last + 1)]
            if before + nbytes == offset and at + nbytes == place:
                self.numbers[COPY_FIELDS * last + 1] = nbytes + length
                return
        self.entry(offset, length, block, place)

    def begin_span(self) -> int:
        """Begin another span, whose entries are its own; returns the index of its first."""
        self._span_first = len(self.entry_blocks)
        return self._span_first

    def together(self, group: Group, block: int, place: int) -> None:
        """Put the tensors of a group where they touch as in the file, by one entry."""
        moved, offset = place - group.place, self.description.offsets[self.layout.rows[group.first]]
        self.entry(offset, group.length, block, place)
        if group.end == group.first + 1:
            self.block_of[group.first], self.offset_of[group.first] = block, place
            return
        members = slice(group.first, group.end)
        placed = list(zip(self.lengths[members], self.layout.places[members], strict=True))
        self.block_of[members] = array("q", [block if length else -1 for length, _ in placed])
        self.offset_of[members] = array("Q", [place + moved if length else 0 for length, place in placed])

    def one_by_one(self, group: Group) -> None:
        """Put every tensor of a group where its size wants it, by as few entries as that takes."""
        description = self.description
        alignments = [dtype.alignment for dtype in description.dtypes]
        for index in range(group.first, group.end):
            length, row = self.lengths[index], self.layout.rows[index]
            if not length:
                continue
            alignment = alignments[description.dtype_codes[row]]
            if length >= _SMALL_ALIGNMENT:
                alignment = ALIGNMENT if length >= ALIGNMENT else _SMALL_ALIGNMENT
            block, place = self.shared(length, alignment)
            self.block_of[index], self.offset_of[index] = block, place
            self.extend(description.offsets[row], length, block, place)


def lay_out_on_device(description: Description, rows: Sequence[int]) -> DeviceLayout:
    """Find a place for every selected tensor.

    Args:
        description: the checkpoint.
        rows: the selected rows, rising.
    """
    layout = lay_out(description, rows, large_bytes=LARGE_BYTES, slab_bytes=SLAB_BYTES - ALIGNMENT)
    builder = _Builder(description, layout)
    firsts: list[int] = []
    position = 0
    for span in layout.spans:
        firsts.append(builder.begin_span())
        while position < len(layout.groups) and layout.groups[position].first < span.end:
            _place(builder, span, layout.groups[position])
            position += 1
    firsts.append(len(builder.entry_blocks))
    tables = tuple(CopyTable(builder.numbers, first, end - first) for first, end in itertools.pairwise(firsts))
    blocks = tuple(
        # Whole elements of any type fill a slab, so that it can be seen as any.
        Block(size if row >= 0 else align_up(size, ALIGNMENT), row, tuple(entries))
        for size, row, entries in zip(builder.sizes, builder.rows, builder.entries, strict=True)
    )
    return DeviceLayout(
        layout, blocks, builder.block_of, builder.offset_of, builder.numbers, tables, builder.entry_blocks
    )


def _place(builder: _Builder, span: Span, group: Group) -> None:
    first, last = group.first, group.end - 1
    if builder.lengths[first] == group.length >= LARGE_BYTES:
        builder.together(group, builder.own(group.length, builder.layout.rows[first]), 0)
    elif span.packed or functools.reduce(operator.or_, builder.lengths[first:last], 0) % ALIGNMENT:
        builder.one_by_one(group)
    else:
        builder.together(group, *builder.shared(group.length, ALIGNMENT))


def entries_between(table: CopyTable, offset: int, end: int) -> range:
    """The entries of a table (as indexes into its numbers) that a file range overlaps."""
    numbers, low, high = table.numbers, table.first, table.first + table.count
    while low < high:
        middle = (low + high) // 2
        if numbers[COPY_FIELDS * middle] + numbers[COPY_FIELDS * middle + 1] <= offset:
            low = middle + 1
        else:
            high = middle
    last = low
    while last < table.first + table.count and numbers[COPY_FIELDS * last] < end:
        last += 1
    return range(low, last)
