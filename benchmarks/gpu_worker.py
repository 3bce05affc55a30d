"""One measured process: torch, its devices and the loader's package first, then loads on command, then checks.

Owns the clock. It must not know cache states, rounds or other loaders: the parent (``gpu_harness.py``) prepares the
state before each ``go`` and looks at memory and page cache from outside.

The request is one JSON object as the only argument. The talk is one line at a time: the worker says ``ready``; the
parent says ``go``, the worker ``loaded`` with its figures; or ``check N``, the worker ``checked`` once every N-th
tensor was compared; the end of the input ends the worker.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_adapters import ADAPTERS, FirstTensor
from gpu_ceilings import Figures, synchronize
from gpu_check import check

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_adapters import Load

CHANNEL = os.dup(1)
SETTLE_SECONDS = 0.05


def say(event: str, **values: Any) -> None:
    """One line to the parent."""
    os.write(CHANNEL, (json.dumps({"event": event, **values}) + "\n").encode())


class BusyThread:
    """A thread that does nothing but run Python, for the length of a ``with`` block.

    Args:
        wanted: without it the block runs alone.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._running = False

    def __enter__(self) -> None:
        if self._wanted:
            self._running = True
            threading.Thread(target=self._spin, daemon=True).start()
            time.sleep(SETTLE_SECONDS)

    def __exit__(self, *_: object) -> None:
        self._running = False

    def _spin(self) -> None:
        while self._running:
            pass


def processor_seconds() -> float:
    """Time on processors of all threads so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Devices:
    """The devices of a load, in use already, and their memory as torch and the runtime count it.

    Args:
        torch: the module.
        names: ``cuda:0`` and the like; ``cpu`` has no figures.
    """

    def __init__(self, torch: Any, names: Sequence[str]) -> None:
        self._torch = torch
        self._names = names
        self._gpus = [name for name in names if name.startswith("cuda")]
        for name in names:
            torch.empty(1, device=name).fill_(1)
        synchronize(torch, names)
        self._start: list[tuple[int, int, int]] = []

    def begin(self) -> None:
        """Count from here on."""
        for name in self._gpus:
            self._torch.cuda.reset_peak_memory_stats(name)
        self._start = [self._now(name) for name in self._gpus]

    def _now(self, name: str) -> tuple[int, int, int]:
        cuda = self._torch.cuda
        return cuda.max_memory_allocated(name), cuda.max_memory_reserved(name), -cuda.mem_get_info(name)[0]

    def finish(self) -> dict[str, int | None]:
        """Growth since :meth:`begin`: torch's peaks, and what is in use now."""
        names = ("device_allocated_bytes", "device_reserved_bytes", "device_used_bytes")
        if not self._gpus:
            return dict.fromkeys(names)
        now = [self._now(name) for name in self._gpus]
        grown = [[end - start for start, end in zip(*pair, strict=True)] for pair in zip(self._start, now, strict=True)]
        return dict(zip(names, map(sum, zip(*grown, strict=True)), strict=True))

    def wait(self) -> None:
        """Until nothing is under way on any of them."""
        synchronize(self._torch, self._names)


def measure(load: Load, devices: Devices) -> tuple[Any, dict[str, Any]]:
    """One load: what it returned, and its figures."""
    first = FirstTensor()
    devices.begin()
    worked = processor_seconds()
    start = time.perf_counter()
    result = load(first)
    devices.wait()
    seconds = time.perf_counter() - start
    figures = {
        "seconds": seconds,
        "first_tensor_seconds": first.at - start if first.at else None,
        "processor_seconds": processor_seconds() - worked,
        **devices.finish(),
    }
    report = getattr(result, "report", None)
    if report is not None:
        figures["report"] = report.to_json()
    return result, figures | (result if isinstance(result, Figures) else {})


def serve(load: Load, devices: Devices, verify: Callable[[Any, int], dict[str, int]], *, busy: bool) -> None:
    """Do what the parent says until it says no more; ``busy`` puts a thread that runs Python beside every load."""
    result: Any = None
    for line in sys.stdin:
        word, _, every = line.strip().partition(" ")
        if word == "go":
            # What an earlier load returned goes first, as in a program that loads its next model.
            result = None
            devices.wait()
            with BusyThread(wanted=busy):
                result, figures = measure(load, devices)
            say("loaded", **figures)
        elif word == "check":
            say("checked", **verify(result, int(every)))
        else:
            raise RuntimeError(f"nobody knows what {word!r} means")


def main() -> None:
    """Serve the loads of the request."""
    # What libraries print must not come between the lines of the talk.
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    sys.path[:0] = request["import_from"]
    import torch

    devices = Devices(torch, request["devices"])
    load = ADAPTERS[request["adapter"]](request)
    say("ready", pid=os.getpid())
    expected: dict[str, str] = {}

    def verify(result: Any, every: int) -> dict[str, int]:
        if not expected:
            expected.update(json.loads(Path(request["digests"]).read_text()))
        return check(torch, result, expected, every)

    serve(load, devices, verify, busy=request["busy_thread"])
    # Loaders' threads and destructors are not what is measured: leave at once.
    os._exit(0)


if __name__ == "__main__":
    main()
