"""Looking at a measured process from outside: its host memory in ``/proc``, device memory in the driver's library.

Nothing here makes a device context, so the looking changes neither the figures nor the process looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from weightlift.bench.memory import memory_by_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

DRIVER_FILES = ("/dev/nvidia", "/dev/zero", "/dev/dri", "/dev/kfd")
MAPPINGS_SECONDS = 0.05
"""How often mappings are read: the kernel holds the process's map while it writes them."""
DEVICE_SECONDS = 0.01


class Usage(NamedTuple):
    """Memory in bytes; what was not looked at, or is not to be had, is -1.

    Attributes:
        anonymous: resident private memory.
        shared: resident shared memory that no file backs.
        pinned: memory the kernel itself counts as pinned or locked for the process.
        driver_mapped: shared writable mappings of the device driver: what the runtime itself allocated as pinned.
        device: memory in use on the devices, by everybody.
    """

    anonymous: int
    shared: int
    pinned: int
    driver_mapped: int
    device: int


def driver_mapped(text: str) -> int:
    """Bytes of shared writable mappings of driver files in the text of ``/proc/PID/maps``."""
    total = 0
    for line in text.splitlines():
        fields = line.split(maxsplit=5)
        shared = len(fields) == 6 and fields[1].startswith("rw") and fields[1].endswith("s")
        if shared and fields[5].startswith(DRIVER_FILES):
            first, _, end = fields[0].partition("-")
            total += int(end, 16) - int(first, 16)
    return total


class _MemoryInfo(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class DeviceMemory:
    """Bytes in use on devices, from NVIDIA's management library; without it nothing is known.

    Args:
        ordinals: the devices' numbers as programs see them.
    """

    def __init__(self, ordinals: Sequence[int]) -> None:
        self._handles: list[ctypes.c_void_p] = []
        self._library: ctypes.CDLL | None = None
        if not ordinals:
            return
        with contextlib.suppress(OSError, AttributeError, ValueError, IndexError):
            library = ctypes.CDLL("libnvidia-ml.so.1")
            if library.nvmlInit_v2():
                return
            for ordinal in ordinals:
                handle = ctypes.c_void_p()
                if library.nvmlDeviceGetHandleByIndex_v2(_physical(ordinal), ctypes.byref(handle)):
                    return
                self._handles.append(handle)
            self._library = library

    def used(self) -> int:
        """Bytes in use on all of them together; -1 where nobody knows."""
        if self._library is None:
            return -1
        total = 0
        for handle in self._handles:
            info = _MemoryInfo()
            if self._library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(info)):
                return -1
            total += info.used
        return total


def _physical(ordinal: int) -> int:
    """The number of a device among all, where ``CUDA_VISIBLE_DEVICES`` shows only some."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return int(visible.split(",")[ordinal]) if visible else ordinal


class Watch:
    """Peaks of a process's memory over what it had when the watch began.

    Args:
        pid: the process.
        device: the devices' memory.
    """

    def __init__(self, pid: int, device: DeviceMemory) -> None:
        self._process_id = pid
        self._device = device
        self._next_mappings = self._next_device = 0.0
        self.base = self.peak = self._look()

    def look(self) -> None:
        """Look once; mappings and devices less often."""
        now = time.monotonic()
        self._raise(self._look(mappings=now >= self._next_mappings, device=now >= self._next_device))

    def finish(self) -> dict[str, int | None]:
        """Look a last time; growth of every kind of memory at its peak, by the names results use."""
        self._raise(self._look())
        known = self.base.device >= 0 and self.peak.device >= 0
        return {
            "peak_anonymous_bytes": self.peak.anonymous - self.base.anonymous,
            "peak_shared_bytes": self.peak.shared - self.base.shared,
            "peak_kernel_pinned_bytes": self.peak.pinned - self.base.pinned,
            "peak_driver_mapped_bytes": self.peak.driver_mapped - self.base.driver_mapped,
            "device_grown_bytes": self.peak.device - self.base.device if known else None,
        }

    def _raise(self, seen: Usage) -> None:
        self.peak = Usage(*map(max, self.peak, seen))

    def _look(self, *, mappings: bool = True, device: bool = True) -> Usage:
        kinds = memory_by_kind(self._process_id)
        mapped, now = -1, time.monotonic()
        if mappings:
            self._next_mappings = now + MAPPINGS_SECONDS
            with contextlib.suppress(PermissionError), open(f"/proc/{self._process_id}/maps") as file:
                mapped = driver_mapped(file.read())
        if device:
            self._next_device = now + DEVICE_SECONDS
        return Usage(
            kinds.get("RssAnon", 0),
            kinds.get("RssShmem", 0),
            kinds.get("VmPin", 0) + kinds.get("VmLck", 0),
            mapped,
            self._device.used() if device else -1,
        )
