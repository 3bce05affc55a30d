"""The tuner on simulated machines, whose throughput is a known function of the setting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlift.engines.tuner import Setting, Tuner
from weightlift.units import GIB, KIB, MIB, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(slots=True)
class Clock:
    """How far a simulated load is."""

    seconds: float = 0.0
    landed: int = 0


def run(tuner: Tuner, machine: Callable[[Setting], float], windows: int, clock: Clock | None = None) -> list[Setting]:
    """Let a machine work for some windows; returns the setting in force in each."""
    now = clock or Clock()
    history = []
    for _ in range(windows):
        setting = tuner.setting
        # Long enough for any setting to fill a window.
        moved = max(int(machine(setting) * 0.05), 8 * setting.workers * setting.chunk_bytes)
        now.seconds += moved / machine(setting)
        now.landed += moved
        change = tuner.observe(now.seconds, now.landed)
        assert change is None or change == tuner.setting
        history.append(setting)
    return history


def many_small(setting: Setting) -> float:
    """A network file system: the more requests under way the better, up to 24."""
    return 1e8 * min(setting.workers, 24) * min(1.0, setting.chunk_bytes / MIB)


def few_large(setting: Setting) -> float:
    """A disk that large requests suit, and more than 4 at a time do not."""
    return (
        5e9
        * min(1.0, setting.chunk_bytes / (8 * MIB))
        / (1 + max(0, setting.workers - 4) / 4)
        * min(1, setting.workers / 4)
    )


def one_hill(setting: Setting) -> float:
    """Best at 8 workers with chunks of 2 MiB, less on every side."""
    workers, chunk = setting.workers / 8, setting.chunk_bytes / (2 * MIB)
    return 4e9 * math.sqrt(min(workers, 1 / workers) * min(chunk, 1 / chunk))


@pytest.mark.parametrize(
    "start", [Setting(1, 256 * KIB), Setting(4, 4 * MIB), Setting(32, 16 * MIB), Setting(32, 256 * KIB)]
)
@pytest.mark.parametrize("machine", [many_small, few_large, one_hill])
def test_the_best_setting_is_approached(machine: Callable[[Setting], float], start: Setting) -> None:
    workers = [2**power for power in range(6)]
    chunks = [256 * KIB << power for power in range(7)]
    best = max(machine(Setting(count, chunk)) for count in workers for chunk in chunks)
    tuner = Tuner(start, workers_max=32, chunk_bytes_max=16 * MIB)
    good = [machine(setting) >= 0.7 * best for setting in run(tuner, machine, 400)]
    # Trials of neighbours go on now and then, in between it stays with the best.
    assert sum(good[60:120]) >= 36
    assert sum(good[200:]) >= 160


def test_a_machine_that_slows_down_is_followed() -> None:
    tuner = Tuner(Setting(4, 4 * MIB), workers_max=32, chunk_bytes_max=16 * MIB)
    clock = Clock()
    run(tuner, many_small, 100, clock)
    assert tuner.setting.workers >= 16
    good = [few_large(setting) >= 0.7 * 5e9 for setting in run(tuner, few_large, 1000, clock)]
    assert sum(good[-200:]) >= 160


def test_a_flat_machine_is_left_alone() -> None:
    """Where no change helps, nearly all windows run at the setting the plan chose."""
    start = Setting(4, 4 * MIB)
    tuner = Tuner(start, workers_max=32, chunk_bytes_max=16 * MIB)
    history = run(tuner, lambda _: 1e9, 1000)
    assert history.count(start) > 900
    assert len(set(history)) > 3, "it has looked around"


@given(
    start_workers=st.integers(1, 32),
    start_pages=st.integers(16, 4096),
    workers_more=st.integers(0, 32),
    pages_more=st.integers(0, 4096),
    seed=st.randoms(use_true_random=False),
    fixed=st.tuples(st.booleans(), st.booleans()),
)
def test_limits_are_kept_whatever_the_machine_does(
    start_workers: int, start_pages: int, workers_more: int, pages_more: int, seed: object, fixed: tuple[bool, bool]
) -> None:
    start = Setting(start_workers, start_pages * PAGE_BYTES)
    workers_max, chunk_max = start_workers + workers_more, (start_pages + pages_more) * PAGE_BYTES
    tuner = Tuner(
        start,
        workers_max=workers_max,
        chunk_bytes_max=chunk_max,
        fixed_workers=fixed[0],
        fixed_chunk=fixed[1],
    )
    history = run(tuner, lambda _: seed.uniform(1e8, 1e10), 120)  # type: ignore[attr-defined]
    for setting in history:
        assert 1 <= setting.workers <= workers_max
        assert min(start.chunk_bytes, 64 * KIB) <= setting.chunk_bytes <= chunk_max
        assert setting.chunk_bytes % PAGE_BYTES == 0, "an engine takes whole pages only"
        assert not fixed[0] or setting.workers == start.workers
        assert not fixed[1] or setting.chunk_bytes == start.chunk_bytes


def test_a_window_is_neither_short_nor_small() -> None:
    tuner = Tuner(Setting(4, MIB), workers_max=32, chunk_bytes_max=16 * MIB)
    assert tuner.observe(1.0, 15 * MIB) is None, "fewer than four chunks for each worker"
    assert tuner.observe(1.0, 16 * MIB) is None, "the first window only settles"
    assert tuner.observe(1.001, 200 * MIB) is None, "a millisecond tells nothing"
    assert tuner.observe(2.0, 200 * MIB) is None, "one window may be a bad one"
    assert tuner.observe(3.0, 400 * MIB) is not None


def test_a_short_load_is_not_experimented_with() -> None:
    start = Setting(4, MIB)
    tuner = Tuner(start, workers_max=32, chunk_bytes_max=16 * MIB, total_bytes=200 * MIB)
    assert set(run(tuner, lambda _: 1e9, 4)) == {start}
    longer = Tuner(start, workers_max=32, chunk_bytes_max=16 * MIB, total_bytes=200 * GIB)
    assert set(run(longer, lambda _: 1e9, 4)) > {start}


@pytest.mark.parametrize(
    ("gigabytes", "tried"),
    [(1.0, None), (1.8, Setting(4, 2 * MIB)), (4.0, Setting(4, 2 * MIB))],
    ids=["too little is left", "enough for more workers", "enough for anything"],
)
def test_more_workers_are_tried_sooner_than_anything_else(gigabytes: float, tried: Setting | None) -> None:
    """At 1 GB/s: a trial of more workers takes 1.5 s to be earned back, any other more than two."""
    tuner = Tuner(Setting(2, 2 * MIB), workers_max=8, chunk_bytes_max=4 * MIB, total_bytes=int(gigabytes * 1e9))
    assert tuner.observe(0.05, 50_000_000) is None, "the first window is still settling"
    assert tuner.observe(0.1, 100_000_000) is None
    assert tuner.observe(0.15, 150_000_000) == tried
    if tried is not None:
        assert tuner.observe(0.2, 200_000_000) is None
        # It did not help: back, and larger chunks are next only if they can be earned back.
        assert tuner.observe(0.25, 250_000_000) == Setting(2, 2 * MIB)
        assert tuner.observe(0.3, 300_000_000) is None
        assert tuner.observe(0.35, 350_000_000) == (Setting(2, 4 * MIB) if gigabytes > 3 else None)


@pytest.mark.parametrize("slow", range(5))
def test_a_moment_in_which_the_machine_stood_still_changes_nothing(slow: int) -> None:
    """2 GB at 5 GB/s leave no time for trials; by the slow window alone there would be plenty."""
    start = Setting(2, 2 * MIB)
    tuner = Tuner(start, workers_max=8, chunk_bytes_max=4 * MIB, total_bytes=2_000_000_000)
    clock = Clock()
    rates = [2.5e8 if window == slow else 5e9 for window in range(6)]
    # One call of the machine says how much it moves, the next how long that takes.
    calls = iter([rate for rate in rates for _ in range(2)])
    assert set(run(tuner, lambda _: next(calls), len(rates), clock)) == {start}
    assert tuner.setting == start
