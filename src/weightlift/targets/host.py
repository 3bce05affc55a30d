"""Host memory as the destination: a region filled in place, and tensors made over it.

Tensors that are stored in one type and wanted in another, and tensors for devices that only their framework can reach,
are converted chunk by chunk out of staging slots, so that the budget holds for tensors of any size.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

from weightlift.buffers import HostRegion
from weightlift.layout import copy_table, lay_out
from weightlift.operations import ChunkReady, Sink
from weightlift.plan import Wanted
from weightlift.targets.base import Bound
from weightlift.targets.frameworks import FLOATING, stored_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightlift.description import Description
    from weightlift.dtypes import DType
    from weightlift.layout import Layout
    from weightlift.targets.dequantize import Dequantizer
    from weightlift.targets.frameworks import TensorMaker


def slot_buffer(address: int, length: int) -> Any:
    """A buffer over bytes in a slot, valid until the slot is returned."""
    return (ctypes.c_ubyte * length).from_address(address)


class HostTarget(Bound):
    """Private, writable tensors in host memory, as stored.

    Args:
        description: the checkpoint.
        rows: the selected rows, in file order.
        maker: whose tensors.
    """

    device = "cpu"
    in_order = False
    makes_ahead = True

    def __init__(self, description: Description, rows: Sequence[int], maker: TensorMaker) -> None:
        self._description = description
        self._maker = maker
        self._layout: Layout = lay_out(description, rows)
        self._region: HostRegion | None = None
        self._is_leased = False
        self.host_bytes = self._layout.region_bytes

    @property
    def staged_bytes(self) -> int:
        """Most bytes that pass through slots: what is packed, and what a direct read cannot bring to its place."""
        return sum(span.length for span in self._layout.spans if span.packed or not span.mirrored)

    def prepare(self) -> Sequence[Wanted]:
        """See :class:`~weightlift.targets.base.Target`."""
        layout = self._layout
        region = self._region = HostRegion(layout.region_bytes)
        return [
            Wanted(
                span.shard,
                span.offset,
                span.length,
                Sink.COPY if span.packed else Sink.PLACE,
                0 if span.packed else region.address + span.place,
                span.mirrored,
                not span.packed,
                copy_table(self._description, layout, span, region.address),
            )
            for span in layout.spans
        ]

    def receive(self, chunk: ChunkReady, want: int, release: Callable[[int], None]) -> None:
        """See :class:`~weightlift.targets.base.Target`; never called, since nothing is handed over."""
        raise NotImplementedError

    def stored(self) -> Iterator[tuple[str, Any]]:
        """The bytes of every selected tensor, by name; valid until :meth:`close`."""
        region, layout = self._region, self._layout
        assert region is not None
        for index, row in enumerate(layout.rows):
            yield (
                self._description.names[row],
                slot_buffer(region.address + layout.places[index], self._description.lengths[row]),
            )

    def finish(self) -> Iterator[tuple[str, Any]]:
        """See :class:`~weightlift.targets.base.Target`."""
        region = self._region
        assert region is not None
        # The memory of a lease is given back when it dies, so there is one of each.
        assert not self._is_leased
        self._is_leased = True
        description, layout, over = self._description, self._layout, self._maker.over
        index = 0
        for group in layout.groups:
            yield from self._without_bytes(index, group.first)
            buffer = region.lease(group.place, group.length)
            shapes = description.shapes(layout.rows[group.first : group.end])
            for index, shape in enumerate(shapes, group.first):
                row = layout.rows[index]
                if description.lengths[row]:
                    place = layout.places[index] - group.place
                    yield description.names[row], over(buffer, place, description.dtype(row), shape)
                else:
                    yield from self._without_bytes(index, index + 1)
            index = group.end
        yield from self._without_bytes(index, len(layout.rows))

    def close(self) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        self._region = None

    def _without_bytes(self, first: int, end: int) -> Iterator[tuple[str, Any]]:
        for index in range(first, end):
            row = self._layout.rows[index]
            shape = self._description.shape(row)
            yield (
                self._description.names[row],
                self._maker.over(bytearray(0), 0, self._description.dtype(row), shape),
            )


class ConvertingTarget(Bound):
    """Tensors in another data type, or on a device that only the framework reaches.

    Args:
        description: the checkpoint.
        rows: the selected rows, in file order.
        maker: whose tensors.
        dtype: the framework's type for floating-point tensors; ``None`` keeps what is stored.
        device: the framework's name of the device.
        dequantizer: what makes numbers of quantised rows; ``None`` where they arrive as stored.
    """

    in_order = True

    def __init__(
        self,
        description: Description,
        rows: Sequence[int],
        maker: TensorMaker,
        *,
        dtype: Any,
        device: str,
        dequantizer: Dequantizer | None = None,
    ) -> None:
        self._description = description
        self._rows = rows
        self._maker = maker
        self._dtype = dtype
        self._dequantizer = dequantizer
        self.device = device
        self._with_bytes = [row for row in rows if description.lengths[row]]
        self._tensors: dict[int, Any] = {}
        self._flat: dict[int, Any] = {}
        self.host_bytes = self._bytes_here() if device == "cpu" else 0

    def _type_of(self, row: int) -> Any:
        if self._dequantizer and row in self._dequantizer.rows:
            return self._dequantizer.dtype
        dtype = self._description.dtype(row)
        return self._dtype if converts(dtype, self._dtype, self._maker) else self._maker.stored_dtype(dtype)

    def _shape_of(self, row: int) -> tuple[int, ...]:
        shape = self._description.shape(row)
        if self._dequantizer and row in self._dequantizer.rows:
            return shape
        return stored_shape(self._description.dtype(row), shape)

    def _bytes_here(self) -> int:
        return sum(math.prod(self._shape_of(row)) * int(self._type_of(row).itemsize) for row in self._rows)

    def prepare(self) -> Sequence[Wanted]:
        """See :class:`~weightlift.targets.base.Target`."""
        description = self._description
        for row in self._rows:
            tensor = self._maker.empty(self._type_of(row), self._shape_of(row), self.device)
            self._tensors[row] = tensor
            self._flat[row] = tensor.reshape(-1)
        return [
            Wanted(description.shard_indexes[row], description.offsets[row], description.lengths[row], Sink.HAND_OVER)
            for row in self._with_bytes
        ]

    def receive(self, chunk: ChunkReady, want: int, release: Callable[[int], None]) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        row = self._with_bytes[want]
        assign_chunk(self._maker, self._description, row, self._flat[row], chunk, dequantizer=self._dequantizer)
        release(chunk.slot)

    def finish(self) -> Iterator[tuple[str, Any]]:
        """See :class:`~weightlift.targets.base.Target`."""
        self._flat.clear()
        for row in self._rows:
            yield self._description.names[row], self._tensors.pop(row)

    def close(self) -> None:
        """See :class:`~weightlift.targets.base.Target`."""


def converts(dtype: DType, wanted: Any, maker: TensorMaker) -> bool:
    """Whether a stored data type has to be converted into a wanted one of the framework (``None``: as stored)."""
    return wanted is not None and dtype.name in FLOATING and maker.stored_dtype(dtype) != wanted


def assign_chunk(
    maker: TensorMaker,
    description: Description,
    row: int,
    flat: Any,
    chunk: ChunkReady,
    *,
    dequantizer: Dequantizer | None = None,
) -> None:
    """Convert a chunk of a tensor into its part of the flattened destination.

    Args:
        maker: whose tensor the destination is.
        description: the checkpoint.
        row: which tensor.
        flat: the destination, one-dimensional.
        chunk: whole elements of the tensor, or any part of a quantised one.
        dequantizer: what makes numbers of quantised rows, if anything does.
    """
    if dequantizer and row in dequantizer.rows:
        buffer = slot_buffer(chunk.address, chunk.length)
        dequantizer.assign(row, flat, buffer, chunk.offset - description.offsets[row])
        return
    dtype = description.dtype(row)
    # Packed types arrive as bytes, whatever the size of their blocks.
    item = dtype.block_bytes if dtype.block_elements == 1 else 1
    buffer = slot_buffer(chunk.address, chunk.length)
    if chunk.address % dtype.alignment:
        # Direct reads of files with unpadded headers leave elements at odd addresses.
        buffer = bytearray(buffer)
    maker.assign(flat, (chunk.offset - description.offsets[row]) // item, buffer, dtype, chunk.length // item)
