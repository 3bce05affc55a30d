"""How each loader is asked for all tensors of a checkpoint, the way its documentation does it. Runs in the worker.

A function here imports its loader and returns what loads, which is what the clock runs over. It must not know cache
states, rounds or other loaders.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

Request = Mapping[str, Any]
Load = Callable[[], Any]


class LinkSpeed(NamedTuple):
    """A ceiling in the place of tensors.

    Attributes:
        gigabytes_per_second: how fast the device is filled from pinned memory.
    """

    gigabytes_per_second: float


def weightlift(request: Request) -> Load:
    """``weightlift.load`` with the request's options as its keywords."""
    from weightlift import load
    from weightlift.targets.frameworks import pick_framework
    from weightlift.types import Framework

    if request["device"] != "null":
        pick_framework(Framework.AUTO)  # its import is no part of a load
    return lambda: load(request["path"], device=request["device"], **request["options"])


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
    return lambda: LinkSpeed(link_speed(access))


def safetensors(request: Request) -> Load:
    """``safetensors.torch.load_file`` straight to the device; ``backend`` exists from 0.9 on."""
    load_file = importlib.import_module("safetensors.torch").load_file

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in request["files"]:
            tensors.update(load_file(file, device=request["device"], **request["options"]))
        return tensors

    return load


def safetensors_prefetch(request: Request) -> Load:
    """``safe_open(…).prefetch(…)`` of safetensors 0.9: background threads, tensors in the order of their arrival."""
    safe_open = importlib.import_module("safetensors").safe_open

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            loaders = []
            for file in request["files"]:
                handle = stack.enter_context(safe_open(file, framework="pt", device=request["device"]))
                loaders.append(stack.enter_context(handle.prefetch(**request["options"])))
            for loader in loaders:
                tensors.update(loader)
        return tensors

    return load


def fastsafetensors(request: Request) -> Load:
    """fastsafetensors without GPUDirect; tensors share the ownership of its one big buffer."""
    loader_class = importlib.import_module("fastsafetensors").SafeTensorsFileLoader

    def load() -> dict[str, Any]:
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

    def load() -> dict[str, Any]:
        files = list(request["files"])
        with package.safe_open(files, framework="pt", device=request["device"], **request["options"]) as handle:
            return dict(handle.tensors())

    return load


def runai(request: Request) -> Load:
    """Run:ai Model Streamer, every tensor moved by ``.to()``; on the CPU that moves nothing."""
    streamer_class = importlib.import_module("runai_model_streamer").SafetensorsStreamer

    def load() -> dict[str, Any]:
        with streamer_class() as streamer:
            streamer.stream_files(list(request["files"]))
            return {name: tensor.to(request["device"]) for name, tensor in streamer.get_tensors()}

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
