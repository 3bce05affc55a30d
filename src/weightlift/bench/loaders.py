"""How each loader is asked for all tensors of a checkpoint, the way its documentation does it. Runs in the worker.

A function here imports its loader and returns what loads, which is what the clock runs over. It must not know cache
states, rounds or other loaders. Other loaders live in environments of their own, where nothing that weightlift depends
on need be installed, so this module imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

Request = Mapping[str, Any]
"""What a worker is to do; see :mod:`weightlift.bench.worker`."""


class FirstTensor:
    """When a loader handed out its first tensor.

    Attributes:
        at: the clock then; ``None`` of loaders that hand out all at once.
    """

    def __init__(self) -> None:
        self.at: float | None = None

    def collect(self, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """All tensors of an iteration, noting when the first one came."""
        rest = iter(pairs)
        tensors: dict[str, Any] = {}
        for name, tensor in rest:
            tensors[name] = tensor
            self.at = self.at or time.perf_counter()
            break
        tensors.update(rest)
        return tensors


Load = Callable[[FirstTensor], Any]


class Figures(dict[str, Any]):
    """What was measured in the place of tensors, by the names that results use.

    Attributes:
        kept: what lives as long as the figures.
    """

    kept: Any = None


def import_framework(request: Request) -> None:
    """Import what the tensors of weightlift's own loads are made by, which is no part of a load."""
    from weightlift.targets.frameworks import pick_framework
    from weightlift.types import Framework

    if request["device"] != "null":
        pick_framework(Framework(request["options"].get("framework", Framework.AUTO)))


def weightlift(request: Request) -> Load:
    """``weightlift.load`` with the request's options as its keywords."""
    from weightlift import load

    import_framework(request)
    return lambda _first: load(request["path"], device=request["device"], **request["options"])


def link(request: Request) -> Load:
    """No load at all: copies out of pinned memory, which no load onto the device can be faster than."""
    from weightlift.errors import UnsupportedError
    from weightlift.health.probes import link_speed
    from weightlift.targets.access import gpu_access
    from weightlift.targets.frameworks import pick_framework
    from weightlift.types import Framework

    access = gpu_access(request["device"], pick_framework(Framework.TORCH))
    if isinstance(access, str):
        raise UnsupportedError(f"the link cannot be measured: {access}", hint="weightlift doctor says more")
    return lambda _first: Figures(gigabytes_per_second=link_speed(access))


def safetensors(request: Request) -> Load:
    """``safetensors.torch.load_file`` straight to the device; ``backend`` exists from 0.9 on."""
    load_file = importlib.import_module("safetensors.torch").load_file

    def load(_first: FirstTensor) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in request["files"]:
            tensors.update(load_file(file, device=request["device"], **request["options"]))
        return tensors

    return load


def safetensors_prefetch(request: Request) -> Load:
    """``safe_open(…).prefetch(…)`` of safetensors 0.9: background threads, tensors in the order of their arrival."""
    safe_open = importlib.import_module("safetensors").safe_open

    def load(first: FirstTensor) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            loaders = []
            for file in request["files"]:
                handle = stack.enter_context(safe_open(file, framework="pt", device=request["device"]))
                loaders.append(stack.enter_context(handle.prefetch(**request["options"])))
            for loader in loaders:
                tensors.update(first.collect(loader))
        return tensors

    return load


def fastsafetensors(request: Request) -> Load:
    """fastsafetensors without GPUDirect; tensors share the ownership of its one big buffer."""
    loader_class = importlib.import_module("fastsafetensors").SafeTensorsFileLoader

    def load(_first: FirstTensor) -> dict[str, Any]:
        loader = loader_class(pg=None, device=request["device"], nogds=True, **request["options"])
        loader.add_filenames({0: list(request["files"])})
        buffer = loader.copy_files_to_device()
        tensors = {name: buffer.get_tensor(name) for name in loader.get_keys()}
        buffer.close()
        loader.close()
        return tensors

    return load


def instanttensor(request: Request) -> Load:
    """InstantTensor's ``safe_open(…).tensors()``, whose tensors are copies of their own."""
    package = importlib.import_module("instanttensor")

    def load(first: FirstTensor) -> dict[str, Any]:
        files = list(request["files"])
        with package.safe_open(files, framework="pt", device=request["device"], **request["options"]) as handle:
            return first.collect(handle.tensors())

    return load


def runai(request: Request) -> Load:
    """Run:ai Model Streamer, every tensor moved by ``.to()``; on the CPU that moves nothing.

    With the option ``pass_device`` the streamer is told the device as well.
    """
    streamer_class = importlib.import_module("runai_model_streamer").SafetensorsStreamer
    device = request["device"]
    passed = {"device": device} if request["options"].get("pass_device") else {}

    def load(first: FirstTensor) -> dict[str, Any]:
        with streamer_class() as streamer:
            streamer.stream_files(list(request["files"]), **passed)
            return first.collect((name, tensor.to(device)) for name, tensor in streamer.get_tensors())

    return load


LOADERS: Final[dict[str, Callable[[Request], Load]]] = {
    loader.__name__: loader
    for loader in (
        weightlift,
        link,
        safetensors,
        safetensors_prefetch,
        fastsafetensors,
        instanttensor,
        runai,
    )
}
