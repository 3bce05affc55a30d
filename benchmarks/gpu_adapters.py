"""How each loader is asked for all tensors of a checkpoint on a device, the way its documentation does it.

An adapter imports its loader and returns the function that loads, which is what the clock runs over. It must not know
cache states, rounds or other loaders. What is measured and not loaded (:mod:`gpu_ceilings`) is called the same way.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_ceilings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Request = Mapping[str, Any]
    Tensors = Mapping[str, Any]


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


if TYPE_CHECKING:
    Load = Callable[[FirstTensor], Any]


class Streamed(dict[str, Any]):
    """Tensors that came one by one, with the report of the stream.

    Attributes:
        report: what the stream tells of itself.
    """

    report: Any = None


def _options(request: Request) -> dict[str, Any]:
    options = {"device": request["devices"][0], "framework": "torch", **request["options"]}
    if options["device"] == "cpu":
        options.pop("staging", None)
    return options


def weightlift(request: Request) -> Load:
    """``weightlift.load`` with the request's options as its keywords."""
    from weightlift import load

    options = _options(request)
    return lambda _first: load(request["path"], **options)


def weightlift_stream(request: Request) -> Load:
    """``weightlift.stream``, every tensor kept."""
    from weightlift import stream

    options = _options(request)

    def run(first: FirstTensor) -> Tensors:
        with stream(request["path"], **options) as pairs:
            tensors = Streamed(first.collect(pairs))
            tensors.report = pairs.report
        return tensors

    return run


def safetensors(request: Request) -> Load:
    """``safetensors.torch.load_file`` straight to the device."""
    from safetensors.torch import load_file

    def run(_first: FirstTensor) -> Tensors:
        tensors: dict[str, Any] = {}
        for file in request["files"]:
            tensors.update(load_file(file, device=request["devices"][0], **request["options"]))
        return tensors

    return run


def safetensors_prefetch(request: Request) -> Load:
    """``safe_open(…).prefetch(…)`` of safetensors 0.9: background threads, tensors in the order of their arrival."""
    from safetensors import safe_open

    def run(first: FirstTensor) -> Tensors:
        tensors: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            loaders = []
            for file in request["files"]:
                handle: Any = safe_open(file, framework="pt", device=request["devices"][0])
                stack.enter_context(handle)
                loaders.append(stack.enter_context(handle.prefetch(**request["options"])))
            for loader in loaders:
                tensors.update(first.collect(loader))
        return tensors

    return run


def fastsafetensors(request: Request) -> Load:
    """fastsafetensors without GPUDirect; tensors share the ownership of its one big buffer."""
    from fastsafetensors import SafeTensorsFileLoader

    def run(_first: FirstTensor) -> Tensors:
        loader = SafeTensorsFileLoader(pg=None, device=request["devices"][0], nogds=True, **request["options"])
        loader.add_filenames({0: list(request["files"])})
        buffer = loader.copy_files_to_device()
        tensors = {name: buffer.get_tensor(name) for name in loader.get_keys()}
        buffer.close()
        loader.close()
        return tensors

    return run


def instanttensor(request: Request) -> Load:
    """InstantTensor's ``safe_open(…).tensors()``, whose tensors are copies of their own."""
    package = importlib.import_module("instanttensor")

    def run(first: FirstTensor) -> Tensors:
        files = list(request["files"])
        with package.safe_open(files, framework="pt", device=request["devices"][0], **request["options"]) as handle:
            return first.collect(handle.tensors())

    return run


def runai(request: Request) -> Load:
    """Run:ai Model Streamer, every tensor moved by ``.to()``, or by the streamer where ``pass_device`` is set."""
    from runai_model_streamer import SafetensorsStreamer

    device = request["devices"][0]
    passed = {"device": device} if request["options"].get("pass_device") else {}

    def run(first: FirstTensor) -> Tensors:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(list(request["files"]), **passed)
            return first.collect((name, tensor.to(device)) for name, tensor in streamer.get_tensors())

    return run


def exllamav3(request: Request) -> Load:
    """ExLlamaV3's own reader, all tensors in one deferred pass; types are kept."""
    import torch

    collection = importlib.import_module("exllamav3.loader").SafetensorsCollection
    device = torch.device(request["devices"][0])

    def run(_first: FirstTensor) -> Tensors:
        files = collection(str(Path(request["path"]).parent))
        files.begin_deferred_load()
        tensors = {name: files.get_tensor(name, device, allow_bf16=True) for name in files.tensor_file_map}
        files.end_deferred_load()
        files.close()
        return tensors

    return run


def ceiling_link(request: Request) -> Load:
    """See :func:`gpu_ceilings.link`."""
    return lambda _first: gpu_ceilings.link(_torch(), request["devices"], request["options"])


def ceiling_pageable(request: Request) -> Load:
    """See :func:`gpu_ceilings.pageable`."""
    return lambda _first: gpu_ceilings.pageable(_torch(), request["devices"], request["options"])


def ceiling_create(request: Request) -> Load:
    """See :func:`gpu_ceilings.create`."""
    return lambda _first: gpu_ceilings.create(_torch(), request["devices"], request["options"])


def ceiling_allocate(request: Request) -> Load:
    """See :func:`gpu_ceilings.allocate`."""
    return lambda _first: gpu_ceilings.allocate(_torch(), request["devices"], request["files"])


def _torch() -> Any:
    import torch

    return torch


ADAPTERS: dict[str, Callable[[Request], Load]] = {
    adapter.__name__: adapter
    for adapter in (
        weightlift,
        weightlift_stream,
        safetensors,
        safetensors_prefetch,
        fastsafetensors,
        instanttensor,
        runai,
        exllamav3,
        ceiling_link,
        ceiling_pageable,
        ceiling_create,
        ceiling_allocate,
    )
}
