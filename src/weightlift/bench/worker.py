"""One measured load in a process of its own: imports first, then the load on command, then the check.

Run as ``python -m weightlift.bench.worker``. Owns the clock. It must not know cache states, rounds or other loaders:
who started it prepares the state between ``ready`` and ``go``, and looks at memory and page cache before ``check``.

The talk is one JSON value a line. The worker reads the request and says ``ready``; it reads ``"go"`` and says
``loaded`` with its times; it reads a list of samples and says ``checked``. Whatever goes wrong it says as ``failed``;
the end of its input ends it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from weightlift.bench.loaders import LOADERS, LinkSpeed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_TOUCH_BYTES: Final = 4096


def _say(channel: int, event: str, **values: Any) -> None:
    words = (json.dumps({"event": event, **values}) + "\n").encode()
    while words:
        words = words[os.write(channel, words) :]


def _hear() -> Any:
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return json.loads(line)


def _ready_device(device: str) -> Callable[[], None]:
    """Have a device in use before the clock runs; returns what waits until nothing is under way on it."""
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    torch.empty(1, device=device).fill_(1)
    torch.cuda.synchronize(device)
    return lambda: torch.cuda.synchronize(device)


def flat_bytes(tensor: Any) -> Any:
    """A tensor's bytes as a flat array of its own framework, without a copy where it is contiguous."""
    if hasattr(tensor, "data_ptr"):
        import torch

        return tensor.detach().reshape(-1).view(torch.uint8)
    import numpy

    return tensor.reshape(-1).view(numpy.uint8)


def part_of(tensor: Any, start: int, length: int) -> bytes:
    """Some of a tensor's bytes, from whatever device it is on.

    Args:
        tensor: of torch or numpy.
        start: the first byte.
        length: how many.
    """
    part = flat_bytes(tensor)[start : start + length]
    if not hasattr(part, "data_ptr"):
        return bytes(part.tobytes())
    part = part.cpu().contiguous()
    # Not by numpy, which need not be installed where torch is.
    return ctypes.string_at(part.data_ptr(), part.numel())


def size_of(tensor: Any) -> int:
    """Bytes of a tensor's elements."""
    return int(tensor.numel() * tensor.element_size() if hasattr(tensor, "data_ptr") else tensor.nbytes)


def touch(tensors: Mapping[str, Any]) -> int:
    """Read one byte of every page, which is what a mapping has put off."""
    return sum(int(flat_bytes(tensor)[::_TOUCH_BYTES].sum()) for tensor in tensors.values() if size_of(tensor))


def check(tensors: Mapping[str, Any], samples: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Compare parts of tensors with what a plain read of the files gives.

    Args:
        tensors: what was loaded.
        samples: of each part the tensor's name, its file, its offset there, and the part's start and length in bytes.

    Returns:
        How many parts were compared, how many tensors there are, and their bytes; ``wrong`` names the first that
        differs.
    """
    found: dict[str, Any] = {"tensors": len(tensors), "bytes": sum(map(size_of, tensors.values())), "wrong": None}
    for name, file, offset, start, length in samples:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(offset + start)
            wanted = b""
            while len(wanted) < length and (more := stream.read(length - len(wanted))):
                wanted += more
        if name not in tensors or part_of(tensors[name], start, length) != wanted:
            return found | {"wrong": name}
    return found | {"compared": len(samples)}


def _told(result: Any) -> dict[str, Any]:
    """What the loader itself tells about the load."""
    if isinstance(result, LinkSpeed):
        return {"gigabytes_per_second": result.gigabytes_per_second}
    report = getattr(result, "report", None)
    if report is None:
        return {}
    told = report.to_json()
    kept = ("method", "cache", "engine", "workers", "chunk_bytes", "bottleneck", "phases", "staging")
    return {"report": {key: told[key] for key in kept} | {"host_memory": _without_terms(told["host_memory"])}}


def _without_terms(memory: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in memory.items() if key != "terms"}


def _serve(channel: int) -> None:
    request = _hear()
    load = LOADERS[request["loader"]](request)
    wait = _ready_device(request["device"])
    _say(channel, "ready")
    _hear()
    begin = time.perf_counter()
    result = load()
    wait()
    seconds = time.perf_counter() - begin
    touched = None
    if request["touch"]:
        touch(result)
        touched = time.perf_counter() - begin
    _say(channel, "loaded", seconds=seconds, touched_seconds=touched, **_told(result))
    _say(channel, "checked", **check(result, _hear()))


def main() -> None:
    """Serve one request."""
    # An interrupt is for who started this, and ends it by closing its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print must not come between the lines of the talk.
    channel = os.dup(1)
    os.dup2(2, 1)
    code = 0
    try:
        _serve(channel)
    except BaseException as err:  # noqa: BLE001 - whatever a loader raises is an answer
        code = 1
        _say(
            channel,
            "failed",
            type=type(err).__name__,
            message=getattr(err, "message", None) or f"{type(err).__name__}: {err}",
            hint=getattr(err, "hint", None),
            ours=type(err).__module__ == "weightlift.errors",
        )
    # Loaders' threads and destructors are not what is measured: leave at once.
    os._exit(code)


if __name__ == "__main__":
    main()
