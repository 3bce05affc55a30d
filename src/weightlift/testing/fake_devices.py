"""Devices for whole loads without a GPU: the fake runtime, and memory that torch allocates on the CPU.

Inside the block, ``device="cuda:0"`` (or whatever the session has) goes the way of a real GPU, pinned slots, streams
and events included, and the tensors that come out can be looked at::

    with FakeGpu(build(folder)) as gpu, FakeDevices(gpu):
        state = weightlift.load(path, device="cuda:1")
"""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any, Self

from weightlift.device_staging import release_pinned_memory
from weightlift.errors import UnsupportedError
from weightlift.targets import access
from weightlift.targets.device import DeviceAccess
from weightlift.targets.device_memory import TorchMemory
from weightlift.testing.fake_gpu import UNWRITTEN

if TYPE_CHECKING:
    from weightlift.testing.fake_gpu import FakeGpu

PENDING: int = 0xEE
"""What work still queued on the caller's stream writes into freshly allocated memory."""


class FakeMemory(TorchMemory):
    """A fake device's memory: CPU tensors that pose as the device's until the session ends.

    Args:
        gpu: the session.
        ordinal: the device's number.

    Attributes:
        stream: the caller's current stream.
        pending: whatever is allocated still has work queued on that stream, which writes :data:`PENDING`.
        cached_bytes: what its allocator claims to hold without using it.
    """

    def __init__(self, gpu: FakeGpu, ordinal: int) -> None:
        self._torch = importlib.import_module("torch")
        super().__init__(self._torch, "cpu", 0, 1 << 62)
        self._gpu = gpu
        self._device_number = ordinal
        self._held: list[Any] = []
        self.stream = gpu.runtime.create_stream(ordinal)
        self.pending = False
        self.cached_bytes = 0

    def expect(self, nbytes: int) -> None:
        """See :class:`~weightlift.targets.device_memory.DeviceMemory`; the fake allocates nothing beforehand."""

    def allocate(self, dtype: Any, shape: tuple[int, ...]) -> Any:
        """See :class:`~weightlift.targets.device_memory.DeviceMemory`.

        Raises:
            torch.OutOfMemoryError: the fake device has not that much left.
        """
        tensor = super().allocate(dtype, shape)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return tensor
        tensor.view(-1).view(self._torch.uint8).fill_(UNWRITTEN)
        try:
            self._gpu.adopt(self._device_number, tensor.data_ptr(), nbytes)
        except MemoryError as err:
            raise self._torch.OutOfMemoryError(str(err)) from err
        self._held.append(tensor)
        if self.pending:
            self._gpu.fill(self.stream, tensor.data_ptr(), PENDING, nbytes)
        return tensor

    def reusable_bytes(self) -> int:
        """See :class:`~weightlift.targets.device_memory.DeviceMemory`."""
        return self.cached_bytes

    def current_stream(self) -> int:
        """See :class:`~weightlift.targets.device_memory.DeviceMemory`."""
        return self.stream

    def adopt(self, tensor: Any) -> None:
        """Let a tensor made elsewhere be one of the device's."""
        self._gpu.adopt(self._device_number, tensor.data_ptr(), tensor.nbytes)
        self._held.append(tensor)

    def close(self) -> None:
        """Give everything back to the session; the tensors stay the caller's."""
        for tensor in self._held:
            self._gpu.free(tensor.data_ptr())
        self._held = []
        self._gpu.runtime.destroy_stream(self.stream)


class FakeDevices:
    """Puts a session's devices in the place of real ones for the length of a ``with`` block.

    Args:
        gpu: the open session.
        count: how many devices it has.

    Attributes:
        memories: the memory of each device.
    """

    def __init__(self, gpu: FakeGpu, count: int = 2) -> None:
        self._gpu = gpu
        self.memories = [FakeMemory(gpu, ordinal) for ordinal in range(count)]

    def _open(self, device: str) -> DeviceAccess | str:
        kind, _, number = device.partition(":")
        if kind != "cuda":
            return f"{device} is not one of the fake devices"
        ordinal = int(number or 0)
        if ordinal >= len(self.memories):
            raise UnsupportedError(f"there is no fake device {ordinal}", hint=f"there are {len(self.memories)}")
        return DeviceAccess(f"cuda:{ordinal}", ordinal, self._gpu.runtime, self.memories[ordinal])

    def __enter__(self) -> Self:
        release_pinned_memory()
        access.provided.append(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        access.provided.remove(self._open)
        # Kept staging belongs to this session's runtime, which is about to forget it.
        release_pinned_memory()
        for memory in self.memories:
            memory.close()
