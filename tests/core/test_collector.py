"""The garbage collector rests while very many tensors are made, and only then."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

import weightlift as wl
from weightlift.collector import MANY, collector_resting
from weightlift.testing import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    gc.enable()


def test_it_rests_inside_and_goes_on_behind() -> None:
    with collector_resting(MANY):
        assert not gc.isenabled()
        with collector_resting(MANY):
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_was_made_inside_counts_as_old() -> None:
    with collector_resting(MANY):
        made: list[list[int]] = [[]]
    assert any(one is made for one in gc.get_objects(generation=2))


def test_what_a_program_has_frozen_stays_so() -> None:
    gc.freeze()
    try:
        with collector_resting(MANY):
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_few_objects_are_not_worth_it() -> None:
    with collector_resting(MANY - 1):
        assert gc.isenabled()


def test_it_goes_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), collector_resting(MANY):
        1 / 0  # noqa: B018 - any error
    assert gc.isenabled()


def test_a_program_that_switched_it_off_finds_it_off() -> None:
    gc.disable()
    with collector_resting(MANY):
        pass
    assert not gc.isenabled()


def test_the_last_of_several_threads_has_it_go_on() -> None:
    inside, leave = threading.Event(), threading.Event()

    def rest() -> None:
        with collector_resting(MANY):
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=rest)
    with collector_resting(MANY):
        other.start()
        assert inside.wait(10)
    assert not gc.isenabled()
    leave.set()
    other.join()
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("enabled", [True, False])
def test_a_forked_child_collects_as_its_parent_did(*, enabled: bool) -> None:
    if not enabled:
        gc.disable()
    with collector_resting(MANY):
        child = os.fork()
        at_once = gc.isenabled()
    if child == 0:
        with collector_resting(MANY):
            inside = gc.isenabled()
        os._exit(int((at_once, inside, gc.isenabled()) == (enabled, False, enabled)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize("method", ["auto", "mmap"])
def test_a_load_of_many_tensors_is_hardly_interrupted(tmp_path: Path, method: str) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", [TensorSpec(f"t{n}", "F32", (2, 2)) for n in range(20_000)])
    opened = wl.open(path)
    collections: list[str] = []

    def note(phase: str, _: object) -> None:
        collections.append(phase)

    gc.callbacks.append(note)
    try:
        state = wl.load(opened, framework="numpy", method=method)
    finally:
        gc.callbacks.remove(note)
    assert len(state) == 20_000
    assert collections.count("start") < 10


FIRST_USE = """
import gc, importlib.abc, sys

class Watching(importlib.abc.MetaPathFinder):
    seen = {}
    def find_spec(self, name, path, target=None):
        self.seen[name] = gc.isenabled()

sys.meta_path.insert(0, Watching())
import weightlift
weightlift.load
assert gc.isenabled()
print(Watching.seen["weightlift.api"], Watching.seen["weightlift.pipeline"])
"""


def test_modules_that_a_first_use_imports_are_made_without_it() -> None:
    finished = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, check=True)
    assert finished.stdout == "False False\n"
