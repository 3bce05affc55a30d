from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.host.memory import ProcessMemory
from weightlift.monitor import Monitor, MonitorResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def made_up(
    memory: Sequence[tuple[int, int] | None],
    swap: Sequence[tuple[int, int] | None] = ((0, 0), (0, 0)),
    pressure: Sequence[float | None] = (0.0, 0.0),
) -> Monitor:
    """A monitor that sees these (anonymous, file) figures and counters, one after the other."""

    def memories() -> Callable[[], ProcessMemory | None]:
        values = iter(memory)

        def read() -> ProcessMemory | None:
            value = next(values)
            return None if value is None else ProcessMemory(value[0], value[1], 0)

        return read

    return Monitor(memory=memories(), swap=iter(swap).__next__, pressure=iter(pressure).__next__)


def test_peaks_are_growth_without_what_landed() -> None:
    monitor = made_up([(100, 50), (180, 60), (400, 90), (390, 40)])
    monitor.sample(0)
    monitor.sample(250)
    monitor.sample(270)
    assert monitor.finish() == MonitorResult(
        peak_anonymous_bytes=80,
        peak_file_bytes=40,
        swap_in_bytes=0,
        swap_out_bytes=0,
        pressure_stall_seconds=0.0,
    )


def test_shrinking_is_no_negative_peak() -> None:
    monitor = made_up([(100, 50), (20, 10), (500, 10)])
    monitor.sample(0)
    monitor.sample(1000)
    result = monitor.finish()
    assert (result.peak_anonymous_bytes, result.peak_file_bytes) == (0, 0)


def test_counters_are_differences() -> None:
    result = made_up([(0, 0)], swap=[(10, 100), (15, 4196)], pressure=[2.0, 2.5]).finish()
    assert (result.swap_in_bytes, result.swap_out_bytes, result.pressure_stall_seconds) == (5, 4096, 0.5)


def test_unknown_stays_unknown() -> None:
    monitor = made_up([None], swap=[None, None], pressure=[None, None])
    monitor.sample(0)
    assert monitor.finish() == MonitorResult(
        peak_anonymous_bytes=None,
        peak_file_bytes=None,
        swap_in_bytes=None,
        swap_out_bytes=None,
        pressure_stall_seconds=None,
    )


def test_a_figure_that_gets_lost_on_the_way_is_unknown_or_passed_over() -> None:
    monitor = made_up([(0, 0), (7, 3), None], swap=[(0, 0), None], pressure=[0.0, None])
    monitor.sample(0)
    monitor.sample(0)
    result = monitor.finish()
    assert (result.peak_anonymous_bytes, result.peak_file_bytes) == (7, 3)
    assert (result.swap_in_bytes, result.swap_out_bytes, result.pressure_stall_seconds) == (None, None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_real_memory_is_seen() -> None:
    gc.collect()  # what earlier tests left behind must not be freed in between
    monitor = Monitor()
    block = bytearray(b"x") * (48 << 20)
    monitor.sample(16 << 20)
    result = monitor.finish()
    assert len(block) == 48 << 20
    assert result.peak_anonymous_bytes is not None
    assert 28 << 20 < result.peak_anonymous_bytes < 40 << 20
