"""How a GPU is reached: the runtime its framework has loaded, and the framework's memory on it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from weightlift.host.gpu import find_runtime
from weightlift.options import from_environment
from weightlift.targets.device import DeviceAccess
from weightlift.targets.device_memory import TorchMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.targets.frameworks import TensorMaker

_used: set[str] = set()

provided: list[Callable[[str], DeviceAccess | str]] = []
"""What the test kit puts in place of real devices."""


def gpu_access(device: str, maker: TensorMaker) -> DeviceAccess | str:
    """How a device is reached, or a sentence that says why its framework's own copies are used.

    Args:
        device: the framework's name of it.
        maker: the framework.

    Raises:
        UnsupportedError: the framework cannot use the device.
    """
    if provided:
        return provided[-1](device)
    torch = importlib.import_module("torch")
    parsed = torch.device(device)
    if device not in _used:
        # Asking torch releases the interpreter lock, and a device that was there does not go away.
        maker.check_device(device)
        _used.add(device)
    if parsed.type != "cuda":
        return f"{device} is filled by torch's own copies, since it is neither a CUDA nor a ROCm device"
    runtime = find_runtime("hip" if torch.version.hip else "cuda", from_environment("WEIGHTLIFT_GPU_RUNTIME"))
    if isinstance(runtime, str):
        return f"{device} is filled by torch's own copies, because {runtime}"
    ordinal = torch.cuda.current_device() if parsed.index is None else parsed.index
    free, _ = runtime.memory_info(ordinal)
    return DeviceAccess(f"cuda:{ordinal}", ordinal, runtime, TorchMemory(torch, "cuda", ordinal, free))
