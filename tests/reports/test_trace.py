"""Traces of real loads, read back as a viewer reads them."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

import weightlift as wl
from weightlift.recording import Recording
from weightlift.reports.trace import write_trace
from weightlift.steps import Step, StepKind
from weightlift.testing import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
SPECS = [TensorSpec(f"layers.{number}", "F32", (300, 1000)) for number in range(6)]


def read_back(recording: Recording, samples: Any = ()) -> dict[str, Any]:
    stream = io.StringIO()
    write_trace(stream, recording, samples)
    return dict(json.loads(stream.getvalue()))


def spans(trace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["name"] == name]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["direct", "buffered", "mmap"])
def test_every_byte_is_in_one_read(tmp_path: Path, method: str, engine: str) -> None:
    path = write_checkpoint(tmp_path / "model", SPECS, shards=2)
    recording = Recording()
    loaded = wl.load(path, device="null", method=method, engine=engine, recording=recording, chunk_bytes="256KiB")
    trace = read_back(recording, loaded.report.samples)
    assert trace["otherData"] == {"steps lost": 0}
    read = defaultdict(list)
    for event in spans(trace, "read"):
        if event["pid"] == 2:
            read[event["args"]["file"]].append((event["args"]["offset"], event["args"]["bytes"]))
    assert sorted(read) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for ranges in read.values():
        ranges.sort()
        assert all(start + length == after for (start, length), (after, _) in pairwise(ranges))
    assert sum(length for ranges in read.values() for _, length in ranges) == loaded.report.nbytes
    used = {event["args"]["path"] for event in spans(trace, "read") if event["pid"] == 2}
    assert used <= {method, "dontcache", "mapped"} | ({"buffered"} if method == "direct" else set())


@pytest.mark.parametrize("engine", ENGINES)
def test_spans_lie_in_their_phase_and_have_names(tmp_path: Path, engine: str) -> None:
    path = write_checkpoint(tmp_path / "model", SPECS)
    recording = Recording()
    report = wl.load(path, framework="numpy", engine=engine, recording=recording).report
    trace = read_back(recording, report.samples)
    phases = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == 1}
    assert list(phases) == ["open", "plan", "read", "finish"]
    first, last = phases["plan"]["ts"], phases["finish"]["ts"]
    workers = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == 2]
    assert workers
    assert all(first <= event["ts"] <= event["ts"] + event["dur"] <= last + 1000 for event in workers)
    named = {(event["pid"], event["tid"]) for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in workers} <= named
    counters = {event["name"] for event in trace["traceEvents"] if event["ph"] == "C"}
    assert "tensors" in counters
    assert "GB/s" in counters


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_load_leaves_its_trace(tmp_path: Path, engine: str) -> None:
    path = write_checkpoint(tmp_path / "model", SPECS)
    recording = Recording()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wl.load(path, device="null", engine=engine, recording=recording, progress=stop)
    assert recording.steps is not None
    assert "open" in {event["name"] for event in read_back(recording)["traceEvents"]}


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", SPECS)
    recording = Recording(steps_max=0)
    report = wl.load(path, device="null", recording=recording).report
    assert recording.steps is None
    assert report.samples
    with pytest.raises(wl.errors.OptionError, match="Recording"):
        wl.load(path, device="null", recording="trace.json")  # type: ignore[arg-type]


class SomeSteps:
    """Steps made by hand."""

    lost = 3

    def __init__(self, *steps: Step) -> None:
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)


def test_waits_copies_and_hostile_names() -> None:
    recording = Recording(
        steps=SomeSteps(
            Step(StepKind.SLOT_WAIT, 1, -1, -1, 0, 0, 0, 0.5, 0.75),
            Step(StepKind.UNDER_WAY, 1, 0, 7, 0, 4096, 99, 1.0, 1.5),
            Step(StepKind.DEVICE_COPY, 1, 0, 7, 0, 4096, 99, 1.0, 1.001),
        ),
        steps_begin=2.0,
        shards=['/models/evil\x1b"\udcff.safetensors'],
    )
    trace = read_back(recording)
    (wait,) = spans(trace, "wait for slot")
    assert (wait["pid"], wait["tid"], wait["ts"], wait["dur"]) == (2, 1, 2.5e6, 0.25e6)
    assert "args" not in wait
    (copy,) = spans(trace, "copy to device")
    assert (copy["pid"], copy["tid"], copy["args"]["bytes"], copy["args"]["slot"]) == (3, 7, 99, 7)
    # Nothing in it could steer a terminal or break an encoding.
    assert copy["args"]["file"] == 'evil\\x1b"\\udcff.safetensors'
    assert trace["otherData"] == {"steps lost": 3}
