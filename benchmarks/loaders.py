"""What only the published benchmarks load by or measure, beside the loaders of :mod:`weightlift.bench.loaders`.

The same rules hold: a function imports its loader and returns what loads, and must not know cache states, rounds or
other loaders.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import gpu_ceilings

from weightlift.bench.contents import flat_bytes
from weightlift.bench.loaders import LOADERS as SHIPPED
from weightlift.bench.loaders import FirstTensor, import_framework

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightlift.bench.loaders import Load, Request

    Tensors = Mapping[str, Any]


LAYER: Final = re.compile(r"layers\.(\d+)\.")


class Streamed(dict[str, Any]):
    """Tensors that came one by one, with the report of the stream.

    Attributes:
        report: what the stream tells of itself.
    """

    report: Any = None


def weightlift_open(request: Request) -> Load:
    """``weightlift.open``: headers only."""
    from weightlift import open as open_checkpoint

    return lambda _first: open_checkpoint(request["path"])


def weightlift_stream(request: Request) -> Load:
    """``weightlift.stream``, every tensor kept."""
    from weightlift import stream

    import_framework(request)

    def load(first: FirstTensor) -> Tensors:
        with stream(request["path"], device=request["device"], **request["options"]) as pairs:
            tensors = Streamed(first.collect(pairs))
            tensors.report = pairs.report
        return tensors

    return load


def weightlift_cards(request: Request) -> Load:
    """``weightlift.load`` onto all devices, each with as many layers that follow each other."""
    from weightlift import load
    from weightlift import open as open_checkpoint

    import_framework(request)
    devices = request["devices"]
    layers = sorted({int(found[1]) for name in open_checkpoint(request["path"]) if (found := LAYER.search(name))})
    places = {
        f"*layers.{layer}.*": devices[number * len(devices) // len(layers)] for number, layer in enumerate(layers)
    }
    return lambda _first: load(request["path"], device={**places, "*": devices[0]}, **request["options"])


def weightlift_verify(request: Request) -> Load:
    """``weightlift.verify``: every byte is read and looked at, and none is kept."""
    from weightlift import verify

    def load(_first: FirstTensor) -> None:
        if not verify(request["path"], **request["options"]).ok:
            raise RuntimeError("the file is not the one that its manifest vouches for")

    return load


def safetensors_open(request: Request) -> Load:
    """``safetensors.safe_open``: headers only."""
    import torch  # noqa: F401  (its import is no part of it)
    from safetensors import safe_open

    return lambda _first: [safe_open(file, framework="pt") for file in request["files"]]


def gguf_open(request: Request) -> Load:
    """``gguf.GGUFReader``: the header, every value of which becomes an object; tensors are not read."""
    import gguf

    return lambda _first: gguf.GGUFReader(request["path"])


def readinto(request: Request) -> Load:
    """What a plain program would do: one ``readinto`` per tensor into fresh memory, in file order."""
    import torch

    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32, "U8": torch.uint8}

    def load(_first: FirstTensor) -> Tensors:
        tensors: dict[str, Any] = {}
        for file in request["files"]:
            with open(file, "rb", buffering=0) as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
                header.pop("__metadata__", None)
                for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                    tensor = torch.empty(entry["shape"], dtype=dtypes[entry["dtype"]])
                    view = memoryview(flat_bytes(tensor).numpy())
                    done = 0
                    while done < len(view):
                        count = stream.readinto(view[done:])
                        if not count:
                            raise RuntimeError(f"{file}: ends inside {name}")
                        done += count
                    tensors[name] = tensor
        return tensors

    return load


def llama_cpp(request: Request) -> Load:
    """llama.cpp's own load of a whole model into CPU memory, in one of its load modes; it hands out no tensors.

    Weights are not repacked for the processor, which other loaders do not do either.
    """
    library = importlib.import_module("llama_cpp")
    library.llama_backend_init()
    parameters = library.llama_model_default_params()
    parameters.load_mode = getattr(library, f"LLAMA_LOAD_MODE_{request['options']['load_mode']}")
    parameters.n_gpu_layers = 0
    parameters.use_extra_bufts = False

    def load(_first: FirstTensor) -> None:
        if not library.llama_model_load_from_file(request["path"].encode(), parameters):
            raise RuntimeError("llama.cpp did not load the model")

    return load


def exllamav3(request: Request) -> Load:
    """ExLlamaV3's own reader, all tensors in one deferred pass; types are kept."""
    import torch

    collection = importlib.import_module("exllamav3.loader").SafetensorsCollection
    device = torch.device(request["device"])

    def load(_first: FirstTensor) -> Tensors:
        files = collection(str(Path(request["path"]).parent))
        files.begin_deferred_load()
        tensors = {name: files.get_tensor(name, device, allow_bf16=True) for name in files.tensor_file_map}
        files.end_deferred_load()
        files.close()
        return tensors

    return load


def ceiling_link(request: Request) -> Load:
    """See :func:`gpu_ceilings.link`."""
    return _ceiling(gpu_ceilings.link, request, "options")


def ceiling_pageable(request: Request) -> Load:
    """See :func:`gpu_ceilings.pageable`."""
    return _ceiling(gpu_ceilings.pageable, request, "options")


def ceiling_create(request: Request) -> Load:
    """See :func:`gpu_ceilings.create`."""
    return _ceiling(gpu_ceilings.create, request, "options")


def ceiling_allocate(request: Request) -> Load:
    """See :func:`gpu_ceilings.allocate`."""
    return _ceiling(gpu_ceilings.allocate, request, "files")


def _ceiling(measure: Callable[[Any, Any, Any], Any], request: Request, what: str) -> Load:
    import torch

    return lambda _first: measure(torch, request["devices"], request[what])


LOADERS: dict[str, Callable[[Request], Load]] = {
    **SHIPPED,
    **{
        loader.__name__: loader
        for loader in (
            weightlift_open,
            weightlift_stream,
            weightlift_cards,
            weightlift_verify,
            safetensors_open,
            gguf_open,
            readinto,
            llama_cpp,
            exllamav3,
            ceiling_link,
            ceiling_pageable,
            ceiling_create,
            ceiling_allocate,
        )
    },
}
