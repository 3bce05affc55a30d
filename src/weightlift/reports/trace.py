"""A load as a trace in the format of Chrome's tracing, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

The format is described in "Trace Event Format" (Google, 2016): complete events (``X``) with a time and a duration in
microseconds, counters (``C``), and names of processes and threads (``M``). Written step by step, so that a long trace
takes no memory.
"""

from __future__ import annotations

import json
from typing import IO, TYPE_CHECKING, Any, Final

from weightlift.errors import printable
from weightlift.operations import ReadPath
from weightlift.steps import StepKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.recording import Recording
    from weightlift.samples import Sample
    from weightlift.steps import Step

_LOAD, _WORKERS, _COPIES, _MEMORY = 1, 2, 3, 4
_PROCESSES: Final = {
    _LOAD: "load",
    _WORKERS: "workers",
    _COPIES: "copies to devices under way, by slot",
    _MEMORY: "memory (growth, MiB) and speed",
}
_NAMES: Final = {
    StepKind.POPULATE: "prepare memory",
    StepKind.REGISTER: "pin slot",
    StepKind.READ: "read",
    StepKind.COPY: "copy",
    StepKind.DEVICE_COPY: "start copy to device",
    StepKind.DEVICE_WAIT: "wait for device",
    StepKind.SLOT_WAIT: "wait for slot",
    StepKind.UNDER_WAY: "copy to device",
}
_COUNTERS: Final = {
    "anonymous": "anonymous_bytes",
    "file-backed": "file_bytes",
    "shared": "shared_bytes",
    "pinned": "pinned_bytes",
    "tensors": "tensor_bytes",
    "page cache": "page_cache_bytes",
    "devices": "device_bytes",
}
_MICROSECONDS: Final = 1e6
_MIB: Final = 1 << 20

Entry = dict[str, Any]


def write_trace(stream: IO[str], recording: Recording, samples: tuple[Sample, ...] = ()) -> None:
    """Write what was recorded.

    Args:
        stream: where to, as text.
        recording: of a load that has ended.
        samples: memory along the way, from its report.
    """
    lost = recording.steps.lost if recording.steps is not None else 0
    stream.write(f'{{"displayTimeUnit": "ms", "otherData": {{"steps lost": {lost}}}, "traceEvents": [\n')
    separator = ""
    for entry in trace_events(recording, samples):
        stream.write(separator + json.dumps(entry))
        separator = ",\n"
    stream.write("\n]}\n")


def trace_events(recording: Recording, samples: tuple[Sample, ...] = ()) -> Iterator[Entry]:
    """The events of the trace: names, phases, steps, counters."""
    for process, name in _PROCESSES.items():
        yield _named("process_name", process, 0, name)
        yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
    for name, begin, end in recording.phases:
        yield _span(_LOAD, 0, name, begin, end)
    yield _named("thread_name", _LOAD, 0, "phases")
    threads: dict[tuple[int, int], str] = {}
    shards = [printable(path.rpartition("/")[2]) for path in recording.shards]
    for step in recording.steps or ():
        process, thread = (_COPIES, step.slot) if step.kind is StepKind.UNDER_WAY else (_WORKERS, step.worker)
        threads.setdefault((process, thread), f"{'slot' if process == _COPIES else 'worker'} {thread}")
        begin = recording.steps_begin
        yield _span(process, thread, _NAMES[step.kind], begin + step.start, begin + step.end) | _details(step, shards)
    for (process, thread), name in sorted(threads.items()):
        yield _named("thread_name", process, thread, name)
    yield from _counters(samples)


def _details(step: Step, shards: list[str]) -> Entry:
    if step.shard < 0:
        return {}
    path = ReadPath(step.path).name.lower()
    details: Entry = {"file": shards[step.shard], "offset": step.offset, "bytes": step.length}
    if step.slot >= 0:
        details["slot"] = step.slot
    if step.kind is StepKind.READ:
        details["path"] = path
    return {"cat": path, "args": details}


def _named(kind: str, process: int, thread: int, name: str) -> Entry:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _span(process: int, thread: int, name: str, begin: float, end: float) -> Entry:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": round(begin * _MICROSECONDS, 3),
        "dur": round((end - begin) * _MICROSECONDS, 3),
    }


def _counters(samples: tuple[Sample, ...]) -> Iterator[Entry]:
    landed = seconds = 0.0
    for sample in samples:
        when = round(sample.seconds * _MICROSECONDS, 3)
        for name, field in _COUNTERS.items():
            value = getattr(sample, field)
            if value is not None:
                yield _counter(when, name, round(value / _MIB, 3))
        if sample.seconds > seconds:
            yield _counter(when, "GB/s", round((sample.landed_bytes - landed) / (sample.seconds - seconds) / 1e9, 3))
        landed, seconds = sample.landed_bytes, sample.seconds


def _counter(when: float, name: str, value: float) -> Entry:
    return {"ph": "C", "name": name, "pid": _MEMORY, "tid": 0, "ts": when, "args": {name: value}}
