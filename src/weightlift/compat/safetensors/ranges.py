"""Which bytes of a tensor a view of it needs, and how to bring them together: pure arithmetic, no I/O.

A view is a shape with strides, as indexing makes it. Its elements lie in runs; runs that are closer together than it
costs to ask for them one by one are read with what lies between them.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GAP_BYTES: Final = 4096
"""Unwanted bytes between two runs that are read along: the page cache does not hold less than a page anyway."""

BLOCK_BYTES: Final = 4 << 20
"""Most bytes that one read brings into scratch memory."""


class View(NamedTuple):
    """Elements of a tensor.

    Attributes:
        shape: the shape of the result.
        strides: elements from one entry to the next in each dimension, falling from left to right.
        offset: the first element's number in the tensor.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Its elements follow each other without a gap."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.elements == 0
            expected *= size
        return True


class Piece(NamedTuple):
    """One read, and what to take from it.

    Attributes:
        offset: first byte, counted from the tensor's first.
        length: bytes to read.
        shape: elements to take from what was read.
        strides: bytes from one of them to the next in each dimension.
        place: first byte of the result that they fill, without gaps.
        whole: everything that is read is wanted, in the order in which it lies in the file.
    """

    offset: int
    length: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    place: int
    whole: bool


def pieces(
    view: View, item_bytes: int, *, gap_bytes: int = GAP_BYTES, block_bytes: int = BLOCK_BYTES
) -> Iterator[Piece]:
    """The reads that bring a view's elements together.

    Args:
        view: the elements wanted.
        item_bytes: bytes of one element.
        gap_bytes: see :data:`GAP_BYTES`.
        block_bytes: see :data:`BLOCK_BYTES`; runs without gaps may be longer.
    """
    if not view.elements:
        return
    dims = [(size, stride * item_bytes) for size, stride in zip(view.shape, view.strides, strict=True) if size != 1]
    inner: list[tuple[int, int]] = [(1, item_bytes)]
    span, gapless = item_bytes, True
    while dims:
        size, pitch = dims[-1]
        reach = (size - 1) * pitch + span
        follows = gapless and pitch == span
        if not follows and (pitch - span > gap_bytes or reach > block_bytes):
            break
        inner.insert(0, dims.pop())
        span, gapless = reach, follows
    size, pitch = dims.pop() if dims else (1, span)
    # Rows that lie close together are read several at a time even where all of them are too many for one read.
    group = max((block_bytes - span) // pitch + 1, 1) if pitch - span <= gap_bytes else 1
    taken_bytes = math.prod(count for count, _ in inner) * item_bytes
    place = 0
    for outer in _starts(dims):
        for first in range(0, size, group):
            count = min(group, size - first)
            yield Piece(
                view.offset * item_bytes + outer + first * pitch,
                (count - 1) * pitch + span,
                (count, *(number for number, _ in inner)),
                (pitch, *(step for _, step in inner)),
                place,
                gapless and (count == 1 or pitch == span),
            )
            place += count * taken_bytes


def _starts(dims: Sequence[tuple[int, int]]) -> Iterator[int]:
    return map(sum, itertools.product(*(range(0, size * pitch, pitch) for size, pitch in dims)))
