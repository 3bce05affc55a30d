"""Files cut, replaced and appended to from inside a load: the right error, nothing left behind, and a next load."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import weightlift as wl
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import KIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPECS = [TensorSpec(f"layer.{n}", "F32", (256, 1024)) for n in range(12)]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replace(path: Path) -> None:
    write_checkpoint(path.with_name("other.safetensors"), SPECS, seed=9).rename(path)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["direct", "buffered"])
@pytest.mark.parametrize("change", [truncate, append, replace])
def test_a_change_midway_and_the_load_after_it(
    tmp_path: Path, change: Callable[[Path], None], method: str, engine: str
) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    changed: list[int] = []

    def progress(done: int, total: int) -> None:
        if not changed:
            changed.append(done)
            change(path)

    with nothing_left_behind(tmp_path):
        try:
            state = wl.load(
                path,
                method=method,
                engine=engine,
                framework="numpy",
                workers=1,
                chunk_bytes=64 * KIB,
                progress=progress,
            )
        except wl.errors.TruncatedFileError as error:
            assert change is truncate
            assert (error.path, bool(error.hint), error.offset is not None) == (path, True, True)
        except wl.errors.FileChangedError as error:
            assert change is append
            assert (error.path, bool(error.hint)) == (path, True)
        else:
            # The file opened is still whole under no name, so that its own bytes are the right ones.
            assert change is replace
            assert all(state[spec.name].tobytes() == tensor_bytes(spec) for spec in SPECS)
            del state
        assert changed
        write_checkpoint(tmp_path / "new.safetensors", SPECS, seed=4).rename(path)
        state = wl.load(path, method=method, engine=engine, framework="numpy")
        assert all(state[spec.name].tobytes() == tensor_bytes(spec, seed=4) for spec in SPECS)
        del state
