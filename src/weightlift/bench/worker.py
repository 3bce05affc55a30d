"""Measured loads in a process of their own: imports first, then loads on command, then checks.

Run as ``python -m weightlift.bench.worker``. Owns the clock. It must not know cache states, rounds or other loaders:
who started it prepares the state between ``ready`` and ``go``, and looks at memory and page cache before the check.

The talk is one JSON value a line. The worker reads the request and says ``ready``. Whenever it reads ``"go"`` it loads
and says ``loaded`` with its times; anything else is what to compare with, and it says ``checked``. Whatever goes wrong
it says as ``failed``; the end of its input ends it. A request has these keys:

- ``loader``: a name in the table of loaders; ``path``, ``files``, ``device`` and ``options`` are for it.
- ``devices``: of what fills several; all of them have to be idle before the clock stops.
- ``touch``: how every page counts as read, before a second time is taken: through the ``tensors`` or through the
  ``mappings`` of the files. Empty where loaders hand out memory of the caller's.
- ``import_from``: folders that come first on the import path.

It runs in environments where nothing that weightlift depends on is installed, so it imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from weightlift.bench.contents import compare_parts, touch_mappings, touch_tensors
from weightlift.bench.loaders import LOADERS, Figures, FirstTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightlift.bench.loaders import Load, Request

    Loaders = Mapping[str, Callable[[Request], Load]]
    Beside = Callable[[Request], contextlib.AbstractContextManager[None]]
    Compare = Callable[[Any, Any], dict[str, Any]]


def _say(channel: int, event: str, **values: Any) -> None:
    words = (json.dumps({"event": event, **values}) + "\n").encode()
    while words:
        words = words[os.write(channel, words) :]


def _hear() -> Any:
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return json.loads(line)


class _Devices:
    """The GPUs of a load, in use before the clock runs, and their memory as torch and the runtime count it."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = [name for name in names if name.startswith("cuda")]
        self._start: list[tuple[int, int, int]] = []
        if self._names:
            import torch

            self._torch = torch
        for name in self._names:
            self._torch.empty(1, device=name).fill_(1)
        self.wait()

    def begin(self) -> None:
        """Count memory from here on."""
        for name in self._names:
            self._torch.cuda.reset_peak_memory_stats(name)
        self._start = [self._now(name) for name in self._names]

    def _now(self, name: str) -> tuple[int, int, int]:
        cuda = self._torch.cuda
        return cuda.max_memory_allocated(name), cuda.max_memory_reserved(name), -cuda.mem_get_info(name)[0]

    def grown(self) -> dict[str, int]:
        """Growth since :meth:`begin`: torch's peaks, and what is in use now."""
        if not self._names:
            return {}
        now = [self._now(name) for name in self._names]
        grown = [[end - start for start, end in zip(*pair, strict=True)] for pair in zip(self._start, now, strict=True)]
        names = ("device_allocated_bytes", "device_reserved_bytes", "device_used_bytes")
        return dict(zip(names, map(sum, zip(*grown, strict=True)), strict=True))

    def wait(self) -> None:
        """Until nothing is under way on any of them."""
        for name in self._names:
            self._torch.cuda.synchronize(name)


def _measured(load: Load, devices: _Devices, request: Request) -> tuple[Any, dict[str, Any]]:
    """One load: what it returned, and its figures."""
    first, touched = FirstTensor(), None
    devices.begin()
    worked = time.process_time()
    begin = time.perf_counter()
    result = load(first)
    devices.wait()
    seconds = time.perf_counter() - begin
    figures = {
        "seconds": seconds,
        "first_tensor_seconds": first.at - begin if first.at else None,
        "processor_seconds": time.process_time() - worked,
        **devices.grown(),
    }
    if request["touch"]:
        if request["touch"] == "mappings":
            touch_mappings(request["files"])
        else:
            touch_tensors(result)
        touched = time.perf_counter() - begin
    return result, figures | {"touched_seconds": touched} | _told(result)


def _told(result: Any) -> dict[str, Any]:
    """What the loader itself tells about the load."""
    if isinstance(result, Figures):
        return dict(result)
    report = getattr(result, "report", None)
    if report is not None:
        return {"report": report.to_json()}
    description = getattr(result, "description", None)
    return {} if description is None else {"description_bytes": description.nbytes, "tensors": len(description)}


def _serve(channel: int, loaders: Loaders, compare: Compare, beside: Beside) -> None:
    request = _hear()
    sys.path[:0] = request.get("import_from", ())
    load = loaders[request["loader"]](request)
    devices = _Devices(request.get("devices") or [request["device"]])
    _say(channel, "ready")
    result: Any = None
    while True:
        told = _hear()
        if told == "go":
            # What an earlier load returned goes first, as in a program that loads its next model.
            result = None
            devices.wait()
            with beside(request):
                result, figures = _measured(load, devices, request)
            _say(channel, "loaded", **figures)
        else:
            _say(channel, "checked", **compare(result, told))


def main(
    loaders: Loaders = LOADERS, compare: Compare = compare_parts, beside: Beside = lambda _: contextlib.nullcontext()
) -> None:
    """Serve one request.

    Args:
        loaders: by name.
        compare: given what was loaded and what to compare it with, returns what ``checked`` says.
        beside: given the request, what goes on during a load.
    """
    # An interrupt is for who started this, and ends it by closing its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print must not come between the lines of the talk.
    channel = os.dup(1)
    os.dup2(2, 1)
    try:
        _serve(channel, loaders, compare, beside)
    except BaseException as err:  # noqa: BLE001 - whatever a loader raises is an answer
        _say(
            channel,
            "failed",
            type=type(err).__name__,
            message=getattr(err, "message", None) or f"{type(err).__name__}: {err}",
            hint=getattr(err, "hint", None),
            ours=type(err).__module__ == "weightlift.errors",
        )
    # Loaders' threads and destructors are not what is measured: leave at once.
    os._exit(1)


if __name__ == "__main__":
    main()
