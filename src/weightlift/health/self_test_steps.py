"""The checks of the self-test: whole loads onto a real device, compared byte for byte with what was written.

Each step is run in a process of its own, as ``python -m weightlift.health.self_test_steps STEP DEVICE FOLDER``, so that
one that hangs or takes its process down is a result like any other. A step prints one JSON object.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weightlift.api import load, load_into, stream
from weightlift.api import open as open_checkpoint
from weightlift.device_staging import release_pinned_memory
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CHECKPOINT: Final = "self-test.safetensors"
DIGESTS: Final = "digests.json"
_LARGE: Final = (("large.0", "BF16", (4096, 4096)), ("large.1", "F16", (3000, 4001)), ("large.2", "F32", (2048, 2500)))
_SMALL: Final = tuple(
    (f"small.{number:04}", kind, (number + 1, 7))
    for number, kind in zip(range(400), ("BF16", "F16", "F32", "I64", "U8", "BOOL", "I16", "F64") * 50, strict=True)
)
_BYTES: Final = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "U8": 1, "BOOL": 1, "I16": 2, "F64": 8}
_WAYS: Final = tuple(
    (method, staging, engine)
    for method in ("auto", "direct", "buffered", "mmap")
    for staging in ("pinned", "pageable")
    for engine in ("native", "python")
)
_REPEATS: Final = 20


class StepError(Exception):
    """A check found something wrong; the message says what."""


def write_checkpoint(folder: Path) -> None:
    """Write the checkpoint that all steps load, with known pseudo-random contents, and the SHA-256 of every tensor."""
    header: dict[str, Any] = {}
    parts, offset = [], 0
    for name, kind, shape in (*_LARGE, *_SMALL):
        nbytes = shape[0] * shape[1] * _BYTES[kind]
        seed = hashlib.sha256(name.encode()).digest() * 32
        data = (seed * (nbytes // len(seed) + 1))[:nbytes]
        if kind == "BOOL":
            data = bytes(byte & 1 for byte in data)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": (offset, offset + nbytes)}
        parts.append(data)
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / CHECKPOINT).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in zip(header, parts, strict=True)}
    (folder / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")


def _digest(tensor: Any) -> str:
    torch = importlib.import_module("torch")
    flat = tensor.detach().reshape(-1).view(torch.uint8).cpu()
    return hashlib.sha256(flat.numpy().tobytes() if flat.numel() else b"").hexdigest()


def _compare(state: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    missing = digests.keys() - state.keys()
    if missing:
        raise StepError(f"{len(missing)} tensors were not delivered, {min(missing)} among them")
    wrong = [name for name in digests if _digest(state[name]) != digests[name]]
    if wrong:
        raise StepError(f"{len(wrong)} of {len(digests)} tensors hold wrong bytes, {wrong[0]} among them")


def _facts(device: str, *_: object) -> dict[str, Any]:
    """What the device and its software are."""
    torch = importlib.import_module("torch")
    from weightlift.targets.access import gpu_access
    from weightlift.targets.frameworks import pick_framework
    from weightlift.types import Framework

    access = gpu_access(device, pick_framework(Framework.TORCH))
    facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    if isinstance(access, str):
        raise StepError(access)
    runtime = access.runtime
    free, total = runtime.memory_info(access.ordinal)
    return facts | {
        "name": torch.cuda.get_device_name(access.ordinal),
        "runtime": runtime.kind,
        "runtime_version": runtime.runtime_version(),
        "pci_bus_id": runtime.pci_bus_id(access.ordinal),
        "free_bytes": free,
        "total_bytes": total,
        "devices": runtime.device_count(),
    }


def _load_step(method: str, staging: str, engine: str) -> Callable[[str, Path, Mapping[str, str]], dict[str, Any]]:
    def step(device: str, path: Path, digests: Mapping[str, str]) -> dict[str, Any]:
        options: dict[str, Any] = {"method": method, "staging": staging, "engine": engine}
        begin = time.monotonic()
        state = load(path, device=device, **options)
        seconds = time.monotonic() - begin
        _compare(state, digests)
        if state.report.staging != staging:
            raise StepError(f"staging was {state.report.staging}: {state.report.staging_reason}")
        small = load(path, device=device, host_memory="8MiB", **options)
        _compare(small, digests)
        pinned = small.report.host_memory.peak_pinned_bytes
        if pinned > 8 * MIB:
            raise StepError(f"{pinned:,} bytes were pinned with a budget of 8 MiB")
        return {"seconds": seconds, "gigabytes_per_second": state.report.gigabytes_per_second}

    return step


def _stream(device: str, path: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """A stream delivers every tensor once, in file order."""
    with stream(path, device=device) as tensors:
        delivered = {name: _digest(tensor) for name, tensor in tensors}
    if list(delivered) != list(open_checkpoint(path)):
        raise StepError("the order is not that of the file")
    wrong = [name for name in digests if delivered[name] != digests[name]]
    if wrong:
        raise StepError(f"{len(wrong)} tensors hold wrong bytes, {wrong[0]} among them")
    return {"tensors": len(delivered)}


def _fill(device: str, path: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """Existing tensors are filled in place, without a second copy on the device."""
    torch = importlib.import_module("torch")
    state = load(path, device=device)
    places = {name: tensor.data_ptr() for name, tensor in state.items()}
    for tensor in state.values():
        tensor.reshape(-1).view(torch.uint8).fill_(0xEE)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    load_into(state, path)
    growth = torch.cuda.max_memory_allocated(device) - before
    _compare(state, digests)
    if places != {name: tensor.data_ptr() for name, tensor in state.items()}:
        raise StepError("tensors have moved")
    if growth > MIB:
        raise StepError(f"{growth:,} bytes of device memory were taken beside the tensors")
    return {"growth_bytes": growth}


def _convert(device: str, path: Path, _: Mapping[str, str]) -> dict[str, Any]:
    """Conversion gives what the framework's own conversion gives."""
    stored, converted = load(path, device=device), load(path, device=device, dtype="float32")
    for name, tensor in stored.items():
        wanted = tensor.float() if tensor.is_floating_point() else tensor
        same = (converted[name] == wanted) | (converted[name].isnan() & wanted.isnan())
        if converted[name].dtype != wanted.dtype or not bool(same.all()):
            raise StepError(f"{name} was converted differently")
    return {}


def _queued_work(device: str, path: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """Memory that the caller's stream is still writing to is not written to before that is done.

    The allocator hands out memory again whose last user is only queued; the load must come after it.
    """
    torch = importlib.import_module("torch")
    for _ in range(_REPEATS):
        hogs = [torch.empty(32 * MIB, dtype=torch.uint8, device=device) for _ in range(8)]
        large = torch.ones(8192, 8192, device=device)
        for _ in range(4):
            large = large @ large * 1e-4
        for hog in hogs:
            hog.fill_(0xEE)
        del hogs, hog
        _compare(load(path, device=device), digests)
    return {"repeats": _REPEATS}


def _other_stream(device: str, path: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """A caller whose current stream is not the default one gets whole tensors there."""
    torch = importlib.import_module("torch")
    for _ in range(_REPEATS):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            state = load(path, device=device, host_memory="16MiB")
            sums = {name: tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64) for name, tensor in state.items()}
            torch.cuda.current_stream(device).synchronize()
        _compare(state, digests)
        for name, tensor in state.items():
            if int(sums[name]) != int(tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64)):
                raise StepError(f"{name} was not complete on the caller's stream")
    return {"repeats": _REPEATS}


def _out_of_memory(device: str, path: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """Too little device memory is the framework's own error, and the next load works."""
    torch = importlib.import_module("torch")
    load(path, device=device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    hog = torch.empty(free - 40 * MIB, dtype=torch.uint8, device=device)
    try:
        load(path, device=device)
    except torch.OutOfMemoryError as err:
        told = str(err).splitlines()[0]
    else:
        raise StepError("tensors were loaded into memory that is not there")
    del hog
    torch.cuda.empty_cache()
    _compare(load(path, device=device), digests)
    return {"error": told}


def _interrupted(device: str, path: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """A load that is broken off leaves nothing behind, and the next one works."""
    torch = importlib.import_module("torch")
    load(path, device=device)

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(_REPEATS):
        try:
            load(path, device=device, host_memory="8MiB", progress=stop)
        except KeyboardInterrupt:
            continue
    left = torch.cuda.memory_allocated(device) - before
    if left:
        raise StepError(f"{left:,} bytes of device memory were left behind")
    _compare(load(path, device=device), digests)
    return {"pinned_bytes": release_pinned_memory()}


def _every_device(_: str, path: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """Tensors are spread over all devices of the machine in one pass."""
    torch = importlib.import_module("torch")
    count = torch.cuda.device_count()
    order = {name: number for number, name in enumerate(digests)}
    state = load(path, device=lambda tensor: f"cuda:{order[tensor.name] % count}")
    _compare(state, digests)
    wrong = [name for name, tensor in state.items() if tensor.device.index != order[name] % count]
    if wrong:
        raise StepError(f"{wrong[0]} is on {state[wrong[0]].device}")
    return {"devices": count}


STEPS: Final[dict[str, Callable[[str, Path, Mapping[str, str]], dict[str, Any]]]] = {
    "facts": _facts,
    **{f"load {method} {staging} {engine}": _load_step(method, staging, engine) for method, staging, engine in _WAYS},
    "stream": _stream,
    "load_into": _fill,
    "dtype": _convert,
    "queued work": _queued_work,
    "other stream": _other_stream,
    "out of memory": _out_of_memory,
    "interrupted": _interrupted,
    "every device": _every_device,
}
"""Every step by name: it takes the device, the checkpoint and its digests, and returns what it saw or raises."""


def _run(step: str, device: str, folder: str) -> dict[str, Any]:
    digests = json.loads((Path(folder) / DIGESTS).read_text(encoding="utf-8"))
    return STEPS[step](device, Path(folder) / CHECKPOINT, digests)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(*sys.argv[1:])) + "\n")
    sys.stdout.flush()
    # A runtime that hangs while the interpreter shuts down is no result of the step.
    os._exit(0)
