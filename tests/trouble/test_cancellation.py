"""A load broken off at every step its own thread takes: nothing is left, nobody calls back, the next load works."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

import hypothesis
import pytest
import torch

import weightlift as wl
from weightlift import pipeline, supervision
from weightlift.engines.choice import make_engine
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import KIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    from weightlift.operations import Engine

SPECS = [TensorSpec("large", "F32", (300, 333)), *(TensorSpec(f"small{n}", "BF16", (50, 77)) for n in range(6))]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
STEPS_MAX = 2000
PACKAGE = os.path.dirname(wl.__file__)
CALLS = frozenset({"submit", "set_limits", "poll", "return_slot", "allow", "counters", "watch"})
"""What a load asks of its engine before it stops it."""


class Countdown:
    """Raises at the step of a number, counted from 1; what comes after that step is not to happen."""

    def __init__(self, number: int, error: type[BaseException]) -> None:
        self.number = number
        self.error = error
        self.steps = 0

    def step(self, *_: object) -> None:
        self.steps += 1
        assert self.steps <= self.number, "the load goes on after it was broken off"
        if self.steps == self.number:
            raise self.error("enough")


class SteppingEngine:
    """An engine that counts down before and after every call, where Ctrl-C may come."""

    def __init__(self, engine: Engine, countdown: Countdown) -> None:
        self._engine = engine
        self._countdown = countdown

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._engine, name)
        if name not in CALLS:
            return method

        def call(*arguments: Any, **keywords: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                # Those that hash return slots, too; Ctrl-C comes to the main thread alone.
                return method(*arguments, **keywords)
            self._countdown.step()
            result = method(*arguments, **keywords)
            self._countdown.step()
            return result

        return call


def load(path: Path, **options: Any) -> None:
    state = wl.load(path, framework="numpy", **options)
    assert all(state[spec.name].tobytes() == tensor_bytes(spec) for spec in SPECS)


def load_hashed(path: Path, **options: Any) -> None:
    assert len(wl.load(path, device="null", digest=True, **options).report.digests) == len(SPECS)


def load_converted(path: Path, **options: Any) -> None:
    state = wl.load(path, framework="torch", dtype="float64", **options)
    assert {tensor.dtype for tensor in state.values()} == {torch.float64}


def load_mapped(path: Path, **options: Any) -> None:
    load(path, **options | {"method": "mmap"})


def stream(path: Path, **options: Any) -> None:
    got = {name: tensor.tobytes() for name, tensor in wl.stream(path, framework="numpy", **options)}
    assert got == {spec.name: tensor_bytes(spec) for spec in SPECS}


def load_into(path: Path, **options: Any) -> None:
    module = torch.nn.Module()
    for spec in SPECS:
        dtype = torch.float32 if spec.dtype == "F32" else torch.bfloat16
        module.register_buffer(spec.name, torch.zeros(spec.shape, dtype=dtype))
    wl.load_into(module, path, **options)
    for spec in SPECS:
        assert module.get_buffer(spec.name).view(torch.uint8).numpy().tobytes() == tensor_bytes(spec)


WAYS = [load, load_hashed, load_converted, load_into, load_mapped, stream]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_broken_off_before_and_after_every_call_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[..., None], engine: str
) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    countdown = Countdown(0, KeyboardInterrupt)
    monkeypatch.setattr(
        pipeline, "make_engine", lambda *given, **named: SteppingEngine(make_engine(*given, **named), countdown)
    )
    options: dict[str, Any] = {"engine": engine, "workers": 2, "chunk_bytes": 64 * KIB}
    with nothing_left_behind(tmp_path):
        for number in itertools.count(1):
            assert number < STEPS_MAX
            countdown = Countdown(number, KeyboardInterrupt)
            with nothing_left_behind(tmp_path):
                try:
                    way(path, **options)
                except KeyboardInterrupt:
                    assert countdown.steps == number
                    continue
            # So few steps did it take that the countdown did not end: the load went through, and did deliver.
            break
    assert number > (5 if way is load_mapped else 10), "the load was broken off at several steps"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, wl.errors.ReadError])
def test_broken_off_by_every_call_of_a_progress_callback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    way: Callable[..., None],
    engine: str,
) -> None:
    monkeypatch.setattr(supervision, "_PROGRESS_SECONDS", 0.0)
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    options: dict[str, Any] = {"engine": engine, "workers": 1, "chunk_bytes": 64 * KIB}
    with nothing_left_behind(tmp_path):
        for number in itertools.count(1):
            assert number < STEPS_MAX
            countdown = Countdown(number, error)
            try:
                way(path, progress=countdown.step, **options)
            except error:
                assert countdown.steps == number
                continue
            break
    assert number > 1, "the callback was called"


# What a second Ctrl-C may hit: clearing up after the first is not tried to be interrupted. Finalizers swallow what they
# are interrupted by, whoever wrote them.
CLEARING_UP = frozenset({"abort", "abandon", "close", "close_quickly", "__exit__", "__del__", "_give_back"})


class CallCountdown(Countdown):
    """Counts the calls of weightlift's own functions on this thread; raises as one of them is entered."""

    def __enter__(self) -> Self:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE) and not self._clears_up(frame):
            self.step()

    def _clears_up(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name in CLEARING_UP:
                return True
            frame = frame.f_back
        return False

    def step(self, *_: object) -> None:
        self.steps += 1
        if self.steps == self.number:
            sys.setprofile(None)
            raise self.error("enough")


# A generator that is just being closed is entered, too; what is raised there reaches nobody, and Python says so.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored (in.|while closing generator) <generator:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cache", ["keep", "drop"])
@pytest.mark.parametrize("way", WAYS)
def test_broken_off_on_entering_any_function(tmp_path: Path, way: Callable[..., None], cache: str, engine: str) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    options: dict[str, Any] = {"engine": engine, "workers": 2, "chunk_bytes": 64 * KIB, "cache": cache}
    way(path, **options)
    with CallCountdown(0, KeyboardInterrupt) as counted:
        way(path, **options)
    # A sample of all steps; each of them with --hypothesis-profile=deep.
    stride = max(1, 4 * counted.steps // hypothesis.settings().max_examples)
    broken_off = 0
    with nothing_left_behind(tmp_path):
        for number in range(1, counted.steps + 1, stride):
            with nothing_left_behind(tmp_path):
                try:
                    with CallCountdown(number, KeyboardInterrupt):
                        way(path, **options)
                except KeyboardInterrupt:
                    broken_off += 1
        way(path, **options)
    assert broken_off > 10
