from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.host.gauges import HostFigures
from weightlift.host.memory import ProcessMemory
from weightlift.monitor import Monitor, MonitorResult, Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTHING_KNOWN = HostFigures(None, None, None, None, "", None, 0, None, None, None)


def figures(anonymous: int = 0, file: int = 0, shared: int = 0, **others: Any) -> HostFigures:
    known = NOTHING_KNOWN._replace(swapped=(0, 0), machine_stall_seconds=0.0)
    return known._replace(process=ProcessMemory(anonymous, file, shared))._replace(**others)


def made_up(seen: Sequence[HostFigures]) -> Monitor:
    """A monitor that sees these figures, one after the other."""
    values = iter(seen)
    return Monitor(lambda **_: next(values))


def in_tensors(nbytes: int) -> Progress:
    return Progress(seconds=1.0, tensor_bytes=nbytes)


def test_what_is_in_tensors_is_asked_after_the_look() -> None:
    order: list[str] = []

    def look(**_: bool) -> HostFigures:
        order.append("look")
        return figures(100)

    def ask() -> Progress:
        order.append("ask")
        return in_tensors(0)

    Monitor(look).sample(ask)
    assert order == ["look", "look", "ask"]


def test_peaks_are_growth_without_what_landed() -> None:
    monitor = made_up([figures(100, 50, 7), figures(180, 60, 7), figures(400, 90, 9), figures(390, 40), figures()])
    monitor.sample(lambda: in_tensors(0))
    monitor.sample(lambda: in_tensors(250))
    monitor.sample(lambda: in_tensors(270))
    result = monitor.finish()
    assert (result.peak_anonymous_bytes, result.peak_file_bytes, result.peak_shared_bytes) == (80, 40, 2)
    assert (result.swap_in_bytes, result.swap_out_bytes, result.pressure_stall_seconds) == (0, 0, 0.0)


def test_shrinking_is_no_negative_peak() -> None:
    monitor = made_up([figures(100, 50), figures(20, 10), figures(500, 10), figures()])
    monitor.sample(lambda: in_tensors(0))
    monitor.sample(lambda: in_tensors(1000))
    result = monitor.finish()
    assert (result.peak_anonymous_bytes, result.peak_file_bytes) == (0, 0)


def test_counters_are_differences() -> None:
    start = figures(swapped=(10, 100), machine_stall_seconds=2.0, group_stall_seconds=1.0)
    end = figures(swapped=(15, 4196), machine_stall_seconds=2.5, group_stall_seconds=1.25)
    result = made_up([start, end]).finish()
    assert (result.swap_in_bytes, result.swap_out_bytes) == (5, 4096)
    assert (result.pressure_stall_seconds, result.group_stall_seconds) == (0.5, 0.25)


def test_the_end_is_not_looked_at_twice() -> None:
    monitor = made_up([figures(machine_stall_seconds=float(number)) for number in range(4)])
    monitor.sample(lambda: in_tensors(0), fresh=True)
    assert monitor.finish().pressure_stall_seconds == 1.0
    monitor.sample(lambda: in_tensors(0))
    assert monitor.finish().pressure_stall_seconds == 3.0


def test_unknown_stays_unknown() -> None:
    monitor = made_up([NOTHING_KNOWN] * 3)
    sample = monitor.sample(lambda: in_tensors(0))
    assert {sample.anonymous_bytes, sample.page_cache_bytes, sample.available_bytes, sample.swap_in_bytes} == {None}
    assert monitor.finish() == MonitorResult(
        peak_anonymous_bytes=None,
        peak_file_bytes=None,
        peak_shared_bytes=None,
        swap_in_bytes=None,
        swap_out_bytes=None,
        pressure_stall_seconds=None,
        group_stall_seconds=None,
        samples=(sample,),
    )


def test_a_figure_that_gets_lost_on_the_way_is_unknown_or_passed_over() -> None:
    monitor = made_up([figures(), figures(7, 3), NOTHING_KNOWN, NOTHING_KNOWN])
    monitor.sample(lambda: in_tensors(0))
    monitor.sample(lambda: in_tensors(0))
    result = monitor.finish()
    assert (result.peak_anonymous_bytes, result.peak_file_bytes) == (7, 3)
    assert (result.swap_in_bytes, result.swap_out_bytes, result.pressure_stall_seconds) == (None, None, None)


def test_a_sample_has_what_was_seen_and_what_the_caller_knew() -> None:
    start = figures(10, page_cache_bytes=1000, available_bytes=50)
    monitor = made_up([start, figures(60, page_cache_bytes=1700, available_bytes=20)])
    sample = monitor.sample(lambda: Progress(2.5, 9, 8, 7, 6, 5, 4, 3))
    assert sample[:4] == (2.5, 9, 8, 7)
    assert (sample.anonymous_bytes, sample.pinned_bytes, sample.device_bytes) == (43, 6, 5)
    assert (sample.page_cache_bytes, sample.available_bytes) == (700, 20)
    assert (sample.workers, sample.chunk_bytes) == (4, 3)


ALLOCATE = """
from weightlift.monitor import Monitor, Progress
monitor = Monitor()
block = bytearray(b"x") * (48 << 20)
sample = monitor.sample(lambda: Progress(1.0, tensor_bytes=16 << 20))
print(monitor.finish().peak_anonymous_bytes, sample.available_bytes, len(block))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_real_memory_is_seen() -> None:
    # In a process of its own, where nothing that earlier tests left behind is freed in between.
    finished = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True)
    peak, available, _ = map(int, finished.stdout.split())
    assert 28 << 20 < peak < 40 << 20
    assert 0 < available < 1 << 50
