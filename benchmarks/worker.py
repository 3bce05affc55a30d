"""One measured load in a process of its own: imports first, then the load on command, then the checks.

Owns the adapters, one per loader, and the clock. It must not know cache states, rounds or other loaders: the parent
(``harness.py``) prepares the state between ``ready`` and ``go`` and looks at memory and page cache before ``check``.

The request is one JSON object as the only argument. The talk is one line at a time: the worker says ``ready``, the
parent ``go``, the worker ``loaded`` with its times, the parent ``check``, the worker ``checked``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Tensors = Mapping[str, Any]
    Load = Callable[[], Any]


def weightlift(request: Mapping[str, Any]) -> Load:
    """``weightlift.load`` with the request's options as its keywords."""
    from weightlift import load

    options = dict(request["options"])
    if options.get("device") != "null" and options.get("framework") == "torch":
        import torch  # noqa: F401  (its import is no part of a load)
    return lambda: load(request["path"], **options)


def weightlift_open(request: Mapping[str, Any]) -> Load:
    """``weightlift.open``: headers only."""
    from weightlift import open as open_checkpoint

    return lambda: open_checkpoint(request["path"])


def safetensors(request: Mapping[str, Any]) -> Load:
    """``safetensors.torch.load_file``; ``backend`` exists from 0.9 on."""
    from safetensors.torch import load_file

    def load() -> Tensors:
        tensors: dict[str, Any] = {}
        for file in request["files"]:
            tensors.update(load_file(file, **request["options"]))
        return tensors

    return load


def safetensors_open(request: Mapping[str, Any]) -> Load:
    """``safetensors.safe_open``: headers only."""
    import torch  # noqa: F401
    from safetensors import safe_open

    return lambda: [safe_open(file, framework="pt") for file in request["files"]]


def gguf_open(request: Mapping[str, Any]) -> Load:
    """``gguf.GGUFReader``: the header, every value of which becomes an object; tensors are not read."""
    import gguf

    return lambda: gguf.GGUFReader(request["path"])


def runai(request: Mapping[str, Any]) -> Load:
    """Run:ai Model Streamer into CPU tensors that the caller owns; its settings are environment variables."""
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Tensors:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(list(request["files"]))
            return dict(streamer.get_tensors())

    return load


def fastsafetensors(request: Mapping[str, Any]) -> Load:
    """fastsafetensors without GPUDirect; tensors share the ownership of its one big buffer."""
    import torch  # noqa: F401
    from fastsafetensors import SafeTensorsFileLoader

    def load() -> Tensors:
        loader = SafeTensorsFileLoader(pg=None, device="cpu", nogds=True, **request["options"])
        loader.add_filenames({0: list(request["files"])})
        buffer = loader.copy_files_to_device()
        tensors = {name: buffer.get_tensor(name) for name in loader.get_keys()}
        buffer.close()
        loader.close()
        return tensors

    return load


def readinto(request: Mapping[str, Any]) -> Load:
    """What a plain program would do: one ``readinto`` per tensor into fresh memory, in file order."""
    import torch

    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32, "U8": torch.uint8}

    def load() -> Tensors:
        tensors: dict[str, Any] = {}
        for file in request["files"]:
            with open(file, "rb", buffering=0) as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
                header.pop("__metadata__", None)
                for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                    tensor = torch.empty(entry["shape"], dtype=dtypes[entry["dtype"]])
                    view = memoryview(byte_view(tensor))
                    done = 0
                    while done < len(view):
                        done += stream.readinto(view[done:]) or fail(f"{file}: ends inside {name}")
                    tensors[name] = tensor
        return tensors

    return load


def llama_cpp(request: Mapping[str, Any]) -> Load:
    """llama.cpp's own load of a whole model into CPU memory, in one of its load modes.

    Weights are not repacked for the processor, which other loaders do not do either. What it maps is returned, so that
    every page of it can be touched.
    """
    import importlib

    library = importlib.import_module("llama_cpp")
    library.llama_backend_init()
    options = request["options"]
    parameters = library.llama_model_default_params()
    parameters.load_mode = getattr(library, f"LLAMA_LOAD_MODE_{options['load_mode']}")
    parameters.n_gpu_layers = 0
    parameters.use_extra_bufts = False

    def load() -> Tensors:
        model = library.llama_model_load_from_file(request["path"].encode(), parameters)
        if not model:
            fail("llama.cpp did not load the model")
        return mapped_parts(request["path"])

    return load


def mapped_parts(path: str) -> Tensors:
    """The parts of a file that this process has mapped, as arrays over the mappings."""
    import ctypes

    import numpy

    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(path):
            begin, end = (int(number, 16) for number in line.split()[0].split("-"))
            memory = memoryview((ctypes.c_ubyte * (end - begin)).from_address(begin)).cast("B")
            found[line] = numpy.frombuffer(memory, numpy.uint8)
    return found


def mapped_files(files: Iterable[str]) -> Tensors:
    """Everything that this process has mapped of some files.

    Raises:
        RuntimeError: nothing of a file is mapped.
    """
    found: dict[str, Any] = {}
    for file in files:
        found.update(mapped_parts(file) or fail(f"nothing of {file} is mapped"))
    return found


CHANNEL = os.dup(1)
ADAPTERS: dict[str, Callable[[Mapping[str, Any]], Load]] = {
    adapter.__name__: adapter
    for adapter in (
        weightlift,
        weightlift_open,
        safetensors,
        safetensors_open,
        runai,
        fastsafetensors,
        readinto,
        llama_cpp,
        gguf_open,
    )
}


def fail(message: str) -> Any:
    """Raise where an expression is wanted."""
    raise RuntimeError(message)


def byte_view(tensor: Any) -> Any:
    """The tensor's bytes as a flat numpy array of ``uint8``, without a copy."""
    if hasattr(tensor, "data_ptr"):
        import torch

        return tensor.reshape(-1).view(torch.uint8).numpy()
    import numpy

    return tensor.reshape(-1).view(numpy.uint8)


def touch(tensors: Tensors) -> int:
    """Read one byte of every page, which is what a mapping has put off."""
    return sum(int(byte_view(tensor)[::4096].sum()) for tensor in tensors.values())


def check(tensors: Tensors, expected: Mapping[str, str], every: int) -> dict[str, Any]:
    """Compare the checksum of every ``every``-th tensor, and the names of all.

    Raises:
        RuntimeError: a tensor is missing, unknown or differs.
    """
    import xxhash

    if set(tensors) != set(expected):
        fail(f"{len(tensors)} tensors where {len(expected)} were expected, or other names")
    names = sorted(expected)[::every]
    for name in names:
        if xxhash.xxh3_64_hexdigest(byte_view(tensors[name])) != expected[name]:
            fail(f"tensor {name!r} has other bytes than the file")
    return {"tensors_checked": len(names), "tensors": len(expected)}


def say(event: str, **values: Any) -> None:
    """One line to the parent."""
    os.write(CHANNEL, (json.dumps({"event": event, **values}) + "\n").encode())


def hear(word: str) -> None:
    """Wait for the parent's word."""
    if sys.stdin.readline().strip() != word:
        sys.exit(1)


def spin() -> None:
    """A thread that runs Python for as long as the process lives, as a program preparing its model would."""
    value = 1
    while True:
        value = (value * 3 + 1) % 1_000_003


def distil(result: Any) -> dict[str, Any]:
    """What the loader itself tells about the load."""
    report = getattr(result, "report", None)
    if report is not None:
        return {"report": report.to_json()}
    description = getattr(result, "description", None)
    return {"description_bytes": description.nbytes, "tensors": len(description)} if description is not None else {}


def main() -> None:
    """Run the one load described by the first argument."""
    # What libraries print must not come between the lines of the talk.
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    sys.path[:0] = request.get("import_from", [])
    load = ADAPTERS[request["adapter"]](request)
    import numpy  # noqa: F401
    import xxhash  # noqa: F401

    if request.get("busy_thread"):
        threading.Thread(target=spin, daemon=True).start()
    say("ready", pid=os.getpid())
    hear("go")
    seconds = []
    result: Any = None
    start = 0.0
    for _ in range(request["loads"]):
        result = None
        start = time.perf_counter()
        result = load()
        seconds.append(time.perf_counter() - start)
    touched = None
    if request.get("touch"):
        touch(mapped_files(request["files"]) if request["touch"] == "mappings" else result)
        touched = time.perf_counter() - start
    say("loaded", seconds=seconds[-1], first_seconds=seconds[0], touched_seconds=touched, **distil(result))
    hear("check")
    checked: dict[str, Any] = {}
    if request.get("digests"):
        checked = check(result, json.loads(Path(request["digests"]).read_text()), request["check_every"])
    say("checked", **checked)
    # Loaders' threads and destructors are not what is measured: leave at once.
    os._exit(0)


if __name__ == "__main__":
    main()
