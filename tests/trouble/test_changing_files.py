"""Files cut, replaced and appended to from inside a load: the right error, nothing left behind, and a next load."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

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
@pytest.mark.parametrize(
    ("change", "error"),
    [(truncate, wl.errors.TruncatedFileError), (append, wl.errors.FileChangedError), (replace, None)],
)
def test_a_change_midway_and_the_load_after_it(
    tmp_path: Path, change: Callable[[Path], None], error: type[wl.WeightliftError] | None, method: str, engine: str
) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    changed: list[int] = []

    def progress(done: int, total: int) -> None:
        if not changed:
            changed.append(done)
            change(path)

    with nothing_left_behind(tmp_path):
        options: Any = {"method": method, "engine": engine, "framework": "numpy", "workers": 1}
        if error is None:
            # The file opened is still whole under no name, so that its own bytes are the right ones.
            state = wl.load(path, progress=progress, chunk_bytes=64 * KIB, **options)
            assert all(state[spec.name].tobytes() == tensor_bytes(spec) for spec in SPECS)
            del state
        else:
            with pytest.raises(error) as caught:
                wl.load(path, progress=progress, chunk_bytes=64 * KIB, **options)
            assert (caught.value.path, bool(caught.value.hint)) == (path, True)
            assert change is not truncate or caught.value.offset is not None
            del caught
        assert changed
        write_checkpoint(tmp_path / "new.safetensors", SPECS, seed=4).rename(path)
        state = wl.load(path, method=method, engine=engine, framework="numpy")
        assert all(state[spec.name].tobytes() == tensor_bytes(spec, seed=4) for spec in SPECS)
        del state
