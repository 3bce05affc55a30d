"""Hostile and good files loaded at once in one process: each load gets its own bytes or its own error, nothing else."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

import weightlift as wl
from weightlift.errors import WeightliftError
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.testing.gguf_bytes import entry, gguf_file, tensor
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import KIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
SPECS = [TensorSpec(f"layer.{n}", "F32", (64, 512)) for n in range(16)]
ROUNDS = 12
HEADERS = (
    b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,5]}}',
    b'{"a":["U8",[4],[0,4]],"b":' + b"[" * 500,
    b'{"a":{"dtype":"U8","shape":[18446744073709551615,2],"data_offsets":[0,4]}}',
    b'{"__metadata__":{"a":"","a":1}}',
)


def hostile_files(folder: Path) -> list[Path]:
    folder.mkdir()
    contents = {f"{n}.safetensors": len(text).to_bytes(8, "little") + text + bytes(4) for n, text in enumerate(HEADERS)}
    contents["key.gguf"] = gguf_file([tensor("a")], [entry("k", 4, 1), entry("k", 4, 1)])
    contents["count.gguf"] = gguf_file([tensor("a")], [], tensor_count=1 << 60)
    contents["model.bin"] = b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + b"\xff" * 18
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def together(*tasks: Callable[[], None]) -> None:
    """Run functions at once, each on a thread; the first failure of one is raised."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(tasks))

    def run(task: Callable[[], None]) -> None:
        start.wait()
        try:
            task()
        except BaseException as err:  # noqa: BLE001 - raised below, on the test's own thread
            failures.append(err)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["direct", "buffered", "mmap"])
def test_good_and_hostile_files_at_once(tmp_path: Path, method: Any, engine: Any) -> None:
    paths = [write_checkpoint(tmp_path / f"good-{seed}.safetensors", SPECS, seed=seed) for seed in range(2)]
    broken, refusals = hostile_files(tmp_path / "hostile"), [0]

    def load_good(seed: int) -> None:
        for _ in range(ROUNDS):
            state = wl.load(paths[seed], method=method, engine=engine, framework="numpy", chunk_bytes=64 * KIB)
            assert state.keys() == {spec.name for spec in SPECS}
            assert all(state[spec.name].tobytes() == tensor_bytes(spec, seed=seed) for spec in SPECS)

    def load_hostile() -> None:
        for path in broken * ROUNDS:
            with pytest.raises(WeightliftError) as caught:
                wl.load(path, method=method, engine=engine, framework="numpy")
            assert path.name in caught.value.message
            assert caught.value.hint
            refusals[0] += 1

    with nothing_left_behind(tmp_path):
        together(lambda: load_good(0), lambda: load_good(1), load_hostile)
    assert refusals == [len(broken) * ROUNDS]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_a_file_cut_during_one_load_leaves_the_other_alone(tmp_path: Path, method: Any, engine: Any) -> None:
    good = write_checkpoint(tmp_path / "good.safetensors", SPECS, seed=1)
    begun, cut = threading.Event(), threading.Event()
    victim = write_checkpoint(tmp_path / "victim.safetensors", SPECS, seed=2)
    options: dict[str, Any] = {"method": method, "engine": engine, "framework": "numpy", "chunk_bytes": 64 * KIB}

    def cut_midway(_done: int, _total: int) -> None:
        if not cut.is_set():
            assert begun.wait(60)
            victim.write_bytes(victim.read_bytes()[:5000])
            cut.set()

    def lose() -> None:
        with pytest.raises((wl.errors.TruncatedFileError, wl.errors.FileChangedError)) as caught:
            wl.load(victim, progress=cut_midway, workers=1, **options)
        assert caught.value.path == victim

    def keep() -> None:
        def wait_for_the_cut(_done: int, _total: int) -> None:
            begun.set()
            assert cut.wait(60)

        state = wl.load(good, progress=wait_for_the_cut, **options)
        assert all(state[spec.name].tobytes() == tensor_bytes(spec, seed=1) for spec in SPECS)

    with nothing_left_behind(tmp_path):
        together(lose, keep)
