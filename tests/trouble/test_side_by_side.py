"""Loads beside each other, threads that share one checkpoint, and processes that fork after import."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest

import weightlift as wl
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import KIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPECS = [
    TensorSpec("large", "F32", (513, 1025)),
    TensorSpec("odd", "U8", (77_777,)),
    *(TensorSpec(f"layer.{n}", "BF16", (50, 77)) for n in range(20)),
]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
METHODS = ["auto", "direct", "buffered", "mmap"]
THREADS = 8


def require_contents(state: dict[str, Any]) -> None:
    assert sorted(state) == sorted(spec.name for spec in SPECS)
    for spec in SPECS:
        assert state[spec.name].tobytes() == tensor_bytes(spec), spec


def together(tasks: list[Callable[[], None]]) -> None:
    """Run tasks at the same time, each on a thread of its own, and raise what the first of them raised."""
    start, failures = threading.Barrier(len(tasks)), list[BaseException]()

    def run(task: Callable[[], None]) -> None:
        try:
            start.wait(20)
            task()
        except BaseException as err:  # noqa: BLE001 - told to the test's own thread
            failures.append(err)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_eight_threads_share_one_opened_checkpoint(tmp_path: Path, engine: str) -> None:
    path = write_checkpoint(tmp_path / "model", SPECS, shards=3)
    opened = wl.open(path)

    def work(number: int) -> None:
        method = METHODS[number % len(METHODS)]
        require_contents(wl.load(opened, framework="numpy", engine=engine, method=method))
        assert sorted(opened) == sorted(spec.name for spec in SPECS)
        some = wl.load(opened, framework="numpy", engine=engine, names=[f"layer.{number}", "odd"])
        assert some["odd"].tobytes() == tensor_bytes(SPECS[1])
        assert len(some) == 2
        with wl.stream(opened, framework="numpy", engine=engine) as stream:
            if number % 2:
                next(stream)
            else:
                require_contents(dict(stream))

    with nothing_left_behind(tmp_path):
        together([lambda number=number: work(number) for number in range(THREADS)])  # type: ignore[misc]


@pytest.mark.parametrize(
    "engines", [("python", "python"), pytest.param(("native", "python"), marks=pytest.mark.native)]
)
def test_one_of_two_loads_at_once_is_broken_off_and_the_other_is_not(tmp_path: Path, engines: tuple[str, str]) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    inside, broken_off = threading.Event(), threading.Event()

    def interrupt(done: int, total: int) -> None:
        inside.set()
        raise KeyboardInterrupt

    def wait(done: int, total: int) -> None:
        # The other load comes to its end while this one is under way.
        assert broken_off.wait(20)

    def load_and_stop() -> None:
        with pytest.raises(KeyboardInterrupt):
            wl.load(path, framework="numpy", engine=engines[0], progress=interrupt, chunk_bytes=64 * KIB)
        broken_off.set()

    def load() -> None:
        assert inside.wait(20)
        require_contents(wl.load(path, framework="numpy", engine=engines[1], progress=wait, chunk_bytes=64 * KIB))

    with nothing_left_behind(tmp_path):
        together([load_and_stop, load])


@pytest.mark.parametrize("engine", ENGINES)
def test_streams_and_loads_take_turns_on_one_thread(tmp_path: Path, engine: str) -> None:
    path = write_checkpoint(tmp_path / "model", SPECS, shards=2)
    with nothing_left_behind(tmp_path):
        streams = [wl.stream(path, framework="numpy", engine=engine, method=method) for method in METHODS[:3]]
        states: list[dict[str, Any]] = [{} for _ in streams]
        for items in zip(*streams, strict=True):
            for state, item in zip(states, items, strict=True):
                state.update([item])
            require_contents(wl.load(path, framework="numpy", engine=engine))
        for state in states:
            require_contents(state)
        del streams, states


FORKING = """
    import os, sys
    import numpy
    import weightlift as wl

    path, engine, method = sys.argv[1:]

    def contents(source):
        state = wl.load(source, framework="numpy", engine=engine, method=method)
        return {name: tensor.tobytes() for name, tensor in state.items()}

    def in_a_child(work):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert status == 0, status

    def same(source, expected):
        assert contents(source) == expected

    # Nothing but the import came before this child.
    in_a_child(lambda: contents(path))
    opened = wl.open(path)
    expected = contents(opened)
    # Engines and their threads have come and gone.
    in_a_child(lambda: same(path, expected))
    in_a_child(lambda: same(opened, expected))
    # A load is under way; its threads stay with the parent, which goes on as if nothing had happened.
    stream = wl.stream(path, framework="numpy", engine=engine, method="buffered")
    name, tensor = next(stream)
    got = {name: tensor.tobytes()}
    kept = wl.load(path, framework="numpy", engine=engine)

    def change():
        for mine in kept.values():
            mine.reshape(-1).view(numpy.uint8)[:] = 0
        same(opened, expected)

    in_a_child(change)
    got |= {name: tensor.tobytes() for name, tensor in stream}
    assert got == expected
    assert {name: mine.tobytes() for name, mine in kept.items()} == expected, "a child's changes are its own"
    print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["auto", "mmap"])
def test_a_child_forked_after_import_loads_and_its_parent_goes_on(tmp_path: Path, method: str, engine: str) -> None:
    path = write_checkpoint(tmp_path / "model", SPECS, shards=2)
    words = [sys.executable, "-c", textwrap.dedent(FORKING), str(path), engine, method]
    finished = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "done\n"
