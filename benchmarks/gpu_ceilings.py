"""What no loader can beat: the link to the devices, copies out of ordinary memory, and the making of many tensors.

Each function measures with plain torch calls, inside a worker whose devices have been used before. Nothing here knows
of files' contents, loaders or cache states. On ``cpu`` everything runs too, as copies within memory, to test the code.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

from weightlift.bench.loaders import Figures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MIB = 1 << 20
REPEATS = 3


def synchronize(torch: Any, devices: Sequence[str]) -> None:
    """Wait until nothing is under way on any of the devices."""
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


def link(torch: Any, devices: Sequence[str], options: Mapping[str, Any]) -> Figures:
    """Copies out of pinned memory to all devices at once, over chunk sizes and streams per device.

    Args:
        torch: the module.
        devices: where to.
        options: ``chunks_mib``, ``streams`` and ``bytes`` per device and point; ``events``: record one behind each
            copy, ``plain`` or ``waking`` (which threads may sleep for in the runtime).
    """
    points: list[dict[str, Any]] = []
    for chunk, streams in itertools.product(options["chunks_mib"], options["streams"]):
        copy = _pinned_copies(torch, devices, chunk * MIB, streams, options.get("events"))
        count = max(streams, int(options["bytes"]) // (chunk * MIB))
        copy(streams)
        seconds = statistics.median(copy(count) for _ in range(REPEATS))
        points.append(_point(len(devices) * count * chunk * MIB, seconds, chunk_mib=chunk, streams=streams))
    return _fastest(points)


def _pinned_copies(
    torch: Any, devices: Sequence[str], nbytes: int, streams: int, events: str | None
) -> Callable[[int], float]:
    """A function that copies so many chunks to every device and says how many seconds that took."""
    on_gpu = devices[0].startswith("cuda")
    sources = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu).fill_(1) for _ in range(streams)]
    targets = {device: [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in sources] for device in devices}
    queues = {device: [torch.cuda.Stream(device) if on_gpu else None for _ in sources] for device in devices}
    behind = {device: torch.cuda.Event(blocking=events == "waking") for device in devices if events and on_gpu}

    def copy(count: int) -> float:
        synchronize(torch, devices)
        start = time.perf_counter()
        for number in range(count):
            lane = number % streams
            for device in devices:
                # The context manager of no stream does nothing.
                with torch.cuda.stream(queues[device][lane]):
                    targets[device][lane].copy_(sources[lane], non_blocking=True)
                    if device in behind:
                        behind[device].record()
        synchronize(torch, devices)
        return time.perf_counter() - start

    return copy


def pageable(torch: Any, devices: Sequence[str], options: Mapping[str, Any]) -> Figures:
    """Copies out of ordinary memory used again and again, over threads and chunk sizes.

    Args:
        torch: the module.
        devices: the first one counts.
        options: ``chunks_mib``, ``threads`` and ``bytes`` per point.
    """
    points: list[dict[str, Any]] = []
    for chunk, threads in itertools.product(options["chunks_mib"], options["threads"]):
        count = max(1, int(options["bytes"]) // (chunk * MIB * threads))
        seconds = _pageable_copies(torch, devices[0], chunk * MIB, threads, count)
        points.append(_point(count * chunk * MIB * threads, seconds, chunk_mib=chunk, threads=threads))
    return _fastest(points)


def _pageable_copies(torch: Any, device: str, nbytes: int, threads: int, count: int) -> float:
    on_gpu = device.startswith("cuda")
    begin, end = threading.Barrier(threads + 1), threading.Barrier(threads + 1)

    def work() -> None:
        source = torch.empty(nbytes, dtype=torch.uint8).fill_(1)
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)
        with torch.cuda.stream(torch.cuda.Stream(device) if on_gpu else None):
            target.copy_(source)
            for _ in range(REPEATS):
                begin.wait()
                for _ in range(count):
                    target.copy_(source)
                end.wait()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    seconds = []
    for _ in range(REPEATS):
        begin.wait()
        start = time.perf_counter()
        end.wait()
        seconds.append(time.perf_counter() - start)
    for worker in workers:
        worker.join()
    return statistics.median(seconds)


def create(torch: Any, devices: Sequence[str], options: Mapping[str, Any]) -> Figures:
    """Making very many tensors over memory that is there, by every way known; the cheapest counts.

    Args:
        torch: the module.
        devices: the first one counts.
        options: ``count`` tensors of ``nbytes`` each.
    """
    count, nbytes = int(options["count"]), max(32, int(options["nbytes"]) // 32 * 32)
    slab = torch.empty(count * nbytes, dtype=torch.uint8, device=devices[0])
    points: list[dict[str, Any]] = []
    for way in (_slices, _strided, _split, _divided, _capsules, _interface):
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            made = way(torch, slab, nbytes)
            seconds.append(time.perf_counter() - start)
            if made is None:
                break
            assert len(made) == count, f"{way.__name__} made {len(made)} tensors instead of {count}"
            assert made[-1].data_ptr() == slab.data_ptr() + (count - 1) * nbytes, f"{way.__name__}: another place"
            del made
        else:
            points.append({"way": way.__name__.strip("_"), "seconds": statistics.median(seconds)})
    best = min(points, key=lambda point: point["seconds"])
    per_tensor = best["seconds"] / count * 1e6
    return Figures(seconds=best["seconds"], way=best["way"], microseconds_per_tensor=per_tensor, points=points)


def _slices(torch: Any, slab: Any, nbytes: int) -> list[Any] | None:
    """A slice, seen as another type, seen as a matrix."""
    shape = (2, nbytes // 4)
    offsets = range(0, len(slab), nbytes)
    return [slab[offset : offset + nbytes].view(torch.bfloat16).view(shape) for offset in offsets]


def _strided(torch: Any, slab: Any, nbytes: int) -> list[Any] | None:
    """One call over the whole slab, already of the right type."""
    typed, columns = slab.view(torch.bfloat16), nbytes // 4
    shape, strides = (2, columns), (columns, 1)
    return [torch.as_strided(typed, shape, strides, first) for first in range(0, len(typed), 2 * columns)]


def _split(torch: Any, slab: Any, nbytes: int) -> list[Any] | None:
    """One call that cuts everything, then the shapes."""
    shape = (2, nbytes // 4)
    return [part.view(shape) for part in slab.view(torch.bfloat16).split(nbytes // 2)]


def _divided(torch: Any, slab: Any, nbytes: int) -> list[Any] | None:
    """One call that cuts and shapes everything, as gradients that were sent together are divided."""
    typed = slab.view(torch.bfloat16)
    like = torch.empty(()).expand(2, nbytes // 4)
    return list(torch._utils._unflatten_dense_tensors(typed, [like] * (len(slab) // nbytes)))  # noqa: SLF001


class _Tensor(ctypes.Structure):
    """``DLManagedTensor`` of the DLPack specification, in one piece."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


def _capsules(torch: Any, slab: Any, nbytes: int) -> list[Any] | None:
    """DLPack capsules made through Python's own C interface."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    count, address = len(slab) // nbytes, slab.data_ptr()
    shape = (ctypes.c_int64 * 2)(2, nbytes // 4)
    kind, ordinal = (2, slab.device.index) if slab.is_cuda else (1, 0)
    bfloat = (4, 16, 1)
    tensors = (_Tensor * count)()
    at, size, convert = ctypes.addressof(tensors), ctypes.sizeof(_Tensor), torch.utils.dlpack.from_dlpack
    made = []
    for number in range(count):
        place = address + number * nbytes
        tensors[number] = _Tensor(place, kind, ordinal, 2, *bfloat, ctypes.addressof(shape), None, 0, None, None)
        made.append(convert(new(at + number * size, b"dltensor", None)))
    _KEPT.append((tensors, shape))
    return made


_KEPT: list[Any] = []
"""What capsules point to; the tensors over them are gone before the process is."""


def _interface(torch: Any, slab: Any, nbytes: int) -> list[Any] | None:
    """torch's C interface for compiled models, through weightlift's own use of it; ``None`` where that is missing."""
    try:
        from weightlift.targets import device_memory

        quick = device_memory.quick_tensors(torch)
        if quick is None:
            return None
    except (ImportError, AttributeError):
        return None
    shape, typed = (2, nbytes // 4), quick.typed(slab, torch.bfloat16)
    made = [quick.part(typed, offset // 2, shape) for offset in range(0, len(slab), nbytes)]
    quick.delete(typed)
    return made


DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "I16": "int16",
    "I32": "int32",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
}


def allocate(torch: Any, devices: Sequence[str], files: Sequence[str]) -> Figures:
    """Empty tensors of the files' types and shapes, one by one: the device memory that torch itself needs for them."""
    start = time.perf_counter()
    made = [torch.empty(shape, dtype=getattr(torch, DTYPES[kind]), device=devices[0]) for kind, shape in _specs(files)]
    synchronize(torch, devices)
    figures = Figures(seconds=time.perf_counter() - start, tensors=len(made))
    figures.kept = made
    return figures


def _specs(files: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    for file in files:
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        for entry in header.values():
            yield entry["dtype"], entry["shape"]


def _point(nbytes: int, seconds: float, **words: int) -> dict[str, Any]:
    return {**words, "bytes": nbytes, "seconds": seconds, "gigabytes_per_second": nbytes / seconds / 1e9}


def _fastest(points: Sequence[Mapping[str, Any]]) -> Figures:
    best = max(points, key=lambda point: point["gigabytes_per_second"])
    return Figures(best, points=list(points))
