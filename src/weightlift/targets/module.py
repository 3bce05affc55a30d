"""Existing torch tensors as the destination: parameters and buffers of a module are filled in place.

Every destination is written to directly: large ones by the engine itself, neighbouring small ones out of one slot,
those on a GPU by copies that its runtime makes. One that has another data type, lies on a device that only torch
reaches or is not contiguous is filled chunk by chunk through torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from weightlift.buffers import prepare_untouched
from weightlift.dtypes import GGML_QUANTISED
from weightlift.errors import StateMismatchError, printable
from weightlift.layout import LARGE_TENSOR_BYTES, PACKED_GAP_BYTES, SLAB_BYTES
from weightlift.operations import Sink, make_copy_table
from weightlift.plan import Wanted
from weightlift.targets.device import ReadyEvents
from weightlift.targets.frameworks import stored_shape
from weightlift.targets.host import assign_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weightlift.description import Description
    from weightlift.operations import ChunkReady, Extent
    from weightlift.targets.dequantize import Dequantizer
    from weightlift.targets.device import DeviceAccess
    from weightlift.targets.frameworks import TensorMaker


_HOST: Final = -1


class ModuleTarget:
    """Fills existing tensors.

    Args:
        description: the checkpoint.
        rows: the selected rows, in file order.
        maker: the torch maker.
        destinations: the tensor to fill, by name, for every selected row.
        accesses: the GPUs that are reached through their runtime.
        dequantizer: what makes numbers of quantised rows; ``None`` where they arrive as stored.

    Raises:
        StateMismatchError: a destination has another shape, or no memory.
    """

    host_bytes = 0
    in_order = True
    makes_ahead = False

    def __init__(
        self,
        description: Description,
        rows: Sequence[int],
        maker: TensorMaker,
        destinations: Mapping[str, Any],
        accesses: Sequence[DeviceAccess] = (),
        *,
        dequantizer: Dequantizer | None = None,
    ) -> None:
        self._description = description
        self._maker = maker
        self._destinations = destinations
        self._wanted: list[Wanted] = []
        self._handed_over: dict[int, int] = {}
        self._flat: dict[int, Any] = {}
        self._whole: dict[int, Any] = {}
        self._rows = rows
        self._dequantizer = dequantizer
        self._index_of = {access.device: index for index, access in enumerate(accesses)}
        self._ready = [ReadyEvents(access) for access in accesses]
        for row in rows:
            self._check(row)
        devices = sorted({str(destinations[description.names[row]].device) for row in rows})
        self.device = ", ".join(devices) or "cpu"

    def _check(self, row: int) -> None:
        name, shape = self._description.names[row], self._description.shape(row)
        tensor = self._destinations[name]
        dtype = self._description.dtype(row)
        expected = shape if self._is_dequantized(row) else stored_shape(dtype, shape)
        if tuple(tensor.shape) != expected:
            as_numbers = dtype.name in GGML_QUANTISED and tuple(tensor.shape) == shape
            raise StateMismatchError(
                f"{printable(name)} has shape {list(expected)} in the checkpoint, {list(tensor.shape)} in the module",
                hint=f"it holds blocks of {dtype.name}: pass dequantize=True to fill the module with numbers"
                if as_numbers
                else "the checkpoint belongs to a model of another size or architecture",
                tensor=name,
            )
        if tensor.device.type == "meta":
            raise StateMismatchError(
                f"{printable(name)} is on the meta device and has no memory to fill",
                hint='give the module memory first: module.to_empty(device="cpu")',
                tensor=name,
            )

    def prepare(self) -> Sequence[Wanted]:
        """See :class:`~weightlift.targets.base.Target`."""
        description = self._description
        small: list[tuple[int, int, int]] = []
        shard, device = -1, _HOST
        for row in self._rows:
            length, offset = description.lengths[row], description.offsets[row]
            if length == 0:
                continue
            tensor = self._destinations[description.names[row]]
            goes_to = self._index_of.get(str(tensor.device), _HOST)
            joins = (
                shard == description.shard_indexes[row]
                and device == goes_to
                and small
                and offset - small[-1][0] - small[-1][1] <= PACKED_GAP_BYTES
                and (goes_to != _HOST or offset + length - small[0][0] <= SLAB_BYTES)
            )
            if small and not joins:
                self._flush(shard, device, small)
            shard, device = description.shard_indexes[row], goes_to
            if not self._fills_directly(row, tensor):
                self._flush(shard, device, small)
                self._convert(row, tensor)
            elif length >= LARGE_TENSOR_BYTES and device == _HOST:
                self._flush(shard, device, small)
                self._wanted.append(_place(shard, offset, length, tensor.data_ptr()))
            else:
                small.append((offset, length, tensor.data_ptr()))
        self._flush(shard, device, small)
        return self._wanted

    def _flush(self, shard: int, device: int, small: list[tuple[int, int, int]]) -> None:
        if small:
            begin, end = small[0][0], small[-1][0] + small[-1][1]
            sink = Sink.COPY if device == _HOST else Sink.DEVICE
            table = make_copy_table(small)
            self._wanted.append(Wanted(shard, begin, end - begin, sink, copies=table, device=max(device, 0)))
            small.clear()

    def bind(self, extents: Sequence[Extent]) -> Sequence[Extent]:
        """See :class:`~weightlift.targets.base.Target`."""
        used = {extent.device for extent in extents if extent.sink is Sink.DEVICE}
        # The caller's own work on the tensors may still be queued.
        ready = {device: self._ready[device].record() for device in used}
        return [
            extent._replace(ready=ready[extent.device]) if extent.sink is Sink.DEVICE else extent for extent in extents
        ]

    def _is_dequantized(self, row: int) -> bool:
        return self._dequantizer is not None and row in self._dequantizer.rows

    def _fills_directly(self, row: int, tensor: Any) -> bool:
        return bool(
            not self._is_dequantized(row)
            and row not in self._description.strides
            and (tensor.device.type == "cpu" or str(tensor.device) in self._index_of)
            and tensor.is_contiguous()
            and tensor.dtype == self._maker.stored_dtype(self._description.dtype(row))
        )

    def _convert(self, row: int, tensor: Any) -> None:
        flat = tensor.detach()
        if row in self._description.strides:
            # The file has other elements in between, or these in another order.
            dtype = self._description.dtype(row)
            elements = self._description.lengths[row] // dtype.block_bytes
            flat = self._whole[row] = self._maker.empty(tensor.dtype, (elements,), str(tensor.device))
        elif not tensor.is_contiguous():
            # A strided destination has no flat view; it is gathered first and copied over at the end.
            flat = self._maker.empty(tensor.dtype, tuple(tensor.shape), str(tensor.device))
            self._whole[row] = flat
        self._flat[row] = flat.view(-1)
        self._handed_over[len(self._wanted)] = row
        description = self._description
        self._wanted.append(
            Wanted(description.shard_indexes[row], description.offsets[row], description.lengths[row], Sink.HAND_OVER)
        )

    def receive(self, chunk: ChunkReady, want: int, release: Callable[[int], None]) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        row = self._handed_over[want]
        assign_chunk(self._maker, self._description, row, self._flat[row], chunk, dequantizer=self._dequantizer)
        release(chunk.slot)

    def finish(self) -> Iterator[tuple[str, Any]]:
        """See :class:`~weightlift.targets.base.Target`."""
        for row, flat in self._whole.items():
            strides = self._description.strides.get(row)
            shape = self._description.shape(row)
            gathered = self._maker.strided(flat, 0, shape, strides) if strides is not None else flat
            self._destinations[self._description.names[row]].detach().copy_(gathered)
        for row in self._rows:
            name = self._description.names[row]
            yield name, self._destinations[name]

    def close(self) -> None:
        """See :class:`~weightlift.targets.base.Target`."""
        for events in self._ready:
            events.close()


def _place(shard: int, offset: int, length: int, address: int) -> Wanted:
    """A tensor of its own in host memory; a module that was just given memory may not have touched it yet."""
    table = make_copy_table([(offset, length, address)])
    fresh = prepare_untouched(address, length)
    return Wanted(shard, offset, length, Sink.PLACE, address, fresh=fresh, copies=table)
