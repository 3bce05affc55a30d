"""A GPU's memory as the destination: copies straight into the final tensors, which belong to the caller.

Device memory is allocated ahead of the copies: first what the first of them need, then the rest while these move. It
may still have work queued on the caller's stream, so copies wait for an event recorded there after the allocation
(PyTorch's notes on CUDA streams describe the allocator's side of this).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from weightlift.description import picked
from weightlift.device_layout import ALIGNMENT, entries_between, lay_out_on_device
from weightlift.operations import COPY_FIELDS, Sink
from weightlift.plan import Wanted
from weightlift.targets.frameworks import stored_shape
from weightlift.units import align_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightlift.description import Description
    from weightlift.dtypes import DType
    from weightlift.host.gpu import GpuRuntime
    from weightlift.operations import ChunkReady, Extent
    from weightlift.targets.device_memory import DeviceMemory
    from weightlift.targets.frameworks import TensorMaker


_TOGETHER: Final = 2048
"""Tensors that are made at once, in a few milliseconds."""

_BLOCKS_AHEAD: Final = 1024
"""Allocations that are made before they are needed, which takes some milliseconds."""


class DeviceAccess(NamedTuple):
    """How one GPU is reached.

    Attributes:
        device: the framework's name of it, such as ``cuda:0``.
        ordinal: its number.
        runtime: the CUDA or HIP runtime of this process.
        memory: the framework's memory on it.
    """

    device: str
    ordinal: int
    runtime: GpuRuntime
    memory: DeviceMemory


class ReadyEvents:
    """Events recorded on the caller's stream, which copies wait for; kept until no copy can need them.

    Args:
        access: the device.
    """

    def __init__(self, access: DeviceAccess) -> None:
        self._access = access
        self._events: list[int] = []

    def record(self) -> int:
        """An event that happens when what the caller has queued so far is done."""
        runtime = self._access.runtime
        event = runtime.create_event(self._access.ordinal)
        self._events.append(event)
        with runtime.using(self._access.ordinal):
            runtime.check(runtime.record(event, self._access.memory.current_stream()), "record an event")
        return event

    def close(self) -> None:
        """Give the events back."""
        while self._events:
            self._access.runtime.destroy_event(self._events.pop())


class DeviceTarget:
    """Tensors in the memory of one GPU, as stored.

    Args:
        description: the checkpoint.
        rows: the selected rows, in file order.
        maker: whose tensors.
        access: the GPU.
        index: which of the load's devices it is.
    """

    host_bytes = 0
    in_order = False
    makes_ahead = True

    def __init__(
        self, description: Description, rows: Sequence[int], maker: TensorMaker, access: DeviceAccess, index: int = 0
    ) -> None:
        self._description = description
        self._maker = maker
        self._access = access
        self._index = index
        self._layout = lay_out_on_device(description, rows)
        self._ready = ReadyEvents(access)
        self._last = 0
        self._owners: list[Any] = [None] * len(self._layout.blocks)
        self.device = access.device

    def prepare(self) -> Sequence[Wanted]:
        """See :class:`~weightlift.targets.base.Target`."""
        # Before anything is read: later, a call to the driver would wait for those that pin slots and queue copies. One
        # block alone, such as each large tensor of a stream, is quicker allocated as it is.
        if len(self._layout.blocks) > 1:
            self._access.memory.expect(sum(align_up(block.nbytes, ALIGNMENT) for block in self._layout.blocks))
        return [
            Wanted(span.shard, span.offset, span.length, Sink.DEVICE, copies=table, device=self._index)
            for span, table in zip(self._layout.layout.spans, self._layout.tables, strict=True)
        ]

    def bind(self, extents: Sequence[Extent]) -> Sequence[Extent]:
        """See :class:`~weightlift.targets.base.Target`."""
        new = dict.fromkeys(
            self._layout.entry_blocks[entry]
            for extent in extents
            if extent.copies is not None
            for entry in entries_between(extent.copies, extent.offset, extent.offset + extent.length)
            if self._owners[self._layout.entry_blocks[entry]] is None
        )
        if new and self._last:
            # Each event is two calls to the driver, which wait for those that pin slots and queue copies meanwhile.
            rest = (number for number, owner in enumerate(self._owners) if owner is None and number not in new)
            new |= dict.fromkeys(itertools.islice(rest, _BLOCKS_AHEAD))
        for number in new:
            self._allocate(number)
        if new or not self._last:
            # Recorded on one stream, each event covers what was allocated before the earlier ones too.
            self._last = self._ready.record()
        return [extent._replace(ready=self._last) for extent in extents]

    def _allocate(self, number: int) -> None:
        block, description = self._layout.blocks[number], self._description
        if block.row >= 0:
            dtype = description.dtype(block.row)
            shape = stored_shape(dtype, description.shape(block.row))
            owner = self._access.memory.allocate(self._maker.stored_dtype(dtype), shape)
        else:
            owner = self._access.memory.allocate(self._maker.resolve_dtype("uint8"), (block.nbytes,))
        self._owners[number] = owner
        address, numbers = self._access.memory.address(owner), self._layout.numbers
        for entry in block.entries:
            numbers[COPY_FIELDS * entry + 2] += address

    def receive(self, chunk: ChunkReady, want: int, release: Callable[[int], None]) -> None:
        """See :class:`~weightlift.targets.base.Target`; never called, since nothing is handed over."""
        raise NotImplementedError

    def finish(self) -> Iterator[tuple[str, Any]]:
        """See :class:`~weightlift.targets.base.Target`."""
        description, layout, memory = self._description, self._layout, self._access.memory
        kinds = [self._maker.stored_dtype(dtype) for dtype in description.dtypes]
        rows, names = layout.layout.rows, description.names
        end, number, views = 0, -1, None
        while end < len(rows):
            first, row, block = end, rows[end], layout.block_of[end]
            code, end = description.dtype_codes[row], end + 1
            dtype = description.dtypes[code]
            if block >= 0 and layout.blocks[block].row >= 0:
                yield names[row], self._owners[block]
                continue
            if block < 0:
                yield names[row], memory.allocate(kinds[code], stored_shape(dtype, description.shape(row)))
                continue
            if block != number or views is None:
                number, views = block, memory.views(self._owners[block])
            if end < len(rows) and description.dtype_codes[rows[end]] == code:
                end = self._run_end(first)
            if end == first + 1:
                shape = stored_shape(dtype, description.shape(row))
                yield names[row], views.tensor(layout.offset_of[first], kinds[code], shape)
                continue
            made = views.tensors(layout.offset_of[first], kinds[code], self._shapes(first, end, dtype))
            yield from zip(map(names.__getitem__, rows[first:end]), made, strict=True)

    def _shapes(self, first: int, end: int, dtype: DType) -> Sequence[tuple[int, ...]]:
        """The shapes of the framework's tensors for some that follow each other and have one data type."""
        shapes = self._description.shapes(self._layout.layout.rows[first:end])
        return shapes if dtype.block_elements == 1 else [stored_shape(dtype, shape) for shape in shapes]

    def _run_end(self, first: int) -> int:
        """Index behind the tensors of one data type that follow each other in a slab without a gap."""
        layout, description = self._layout, self._description
        end = min(first + _TOGETHER, len(layout.layout.rows))
        rows = layout.layout.rows[first:end]
        code, block, place = description.dtype_codes[rows[0]], layout.block_of[first], layout.offset_of[first]
        lengths, codes = picked(description.lengths, rows), picked(description.dtype_codes, rows)
        found = zip(layout.block_of[first:end], layout.offset_of[first:end], codes, lengths, strict=True)
        for index, (its_block, its_place, its_code, length) in enumerate(found, first):
            if its_block != block or its_place != place or its_code != code:
                return index
            place += length
        return end

    def close(self) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        self._ready.close()
        self._owners = []
