"""Files that change under a load, users who may only read, and Ctrl-C: typed errors, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

import weightlift as wl
from weightlift import pipeline, supervision
from weightlift.engines.choice import make_engine
from weightlift.engines.native import NativeEngine
from weightlift.engines.python import PythonEngine
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import KIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weightlift.operations import Engine

SPECS = [TensorSpec(f"layer.{n}", "F32", (256, 1024)) for n in range(12)]
METHODS = ["auto", "direct", "buffered"]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    with nothing_left_behind(tmp_path):
        yield path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    write_checkpoint(path.with_name("other.safetensors"), SPECS, seed=9).rename(other)
    other.rename(path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Every engine that a load has started."""
    made: list[Engine] = []

    def make(*arguments: Any, **keywords: Any) -> Engine:
        made.append(make_engine(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(pipeline, "make_engine", make)
    return made


def is_closed(engine: Engine) -> bool:
    """Whether an engine has given up its tables, and with them its hold of extents and slots."""
    if isinstance(engine, NativeEngine):
        return engine._engine is None
    assert isinstance(engine, PythonEngine)
    return not engine._ledger._extents


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, wl.errors.ReadError])
def test_an_abort_closes_the_engine(
    checkpoint: Path, engines: list[Engine], error: type[BaseException], name: str
) -> None:
    def fail(done: int, total: int) -> None:
        assert not is_closed(engines[-1])
        raise error("stop")

    with pytest.raises(error, match="stop"):
        wl.load(checkpoint, framework="numpy", engine=name, progress=fail)
    assert [is_closed(engine) for engine in engines] == [True]
    stream = wl.stream(checkpoint, framework="numpy", engine=name)
    next(stream)
    assert not is_closed(engines[-1])
    stream.close()
    assert [is_closed(engine) for engine in engines] == [True, True]


@pytest.mark.parametrize("method", [*METHODS, "mmap"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (truncate, wl.errors.TruncatedFileError, "shrank"),
        (append, wl.errors.FileChangedError, "written to"),
        (replace, wl.errors.FileChangedError, "replaced"),
        (remove, wl.errors.CheckpointNotFoundError, "gone"),
    ],
)
def test_a_file_that_changes_between_open_and_load(
    checkpoint: Path, change: Callable[[Path], None], error: type[wl.WeightliftError], words: str, method: str
) -> None:
    opened = wl.open(checkpoint)
    change(checkpoint)
    with pytest.raises(error, match=words) as caught:
        wl.load(opened, method=method, framework="numpy")
    assert caught.value.path == checkpoint
    assert caught.value.hint


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", ["cpu", "null"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "error"),
    [(truncate, wl.errors.TruncatedFileError), (append, wl.errors.FileChangedError)],
)
def test_a_file_that_changes_while_it_is_loaded(
    checkpoint: Path,
    change: Callable[[Path], None],
    error: type[wl.WeightliftError],
    method: str,
    device: str,
    engine: str,
) -> None:
    changed: list[int] = []

    def progress(done: int, total: int) -> None:
        if not changed:
            changed.append(done)
            change(checkpoint)

    with pytest.raises(error) as caught:
        wl.load(
            checkpoint,
            method=method,
            device=device,
            engine=engine,
            framework="numpy" if device == "cpu" else "auto",
            workers=1,
            chunk_bytes=64 * KIB,
            progress=progress,
        )
    assert caught.value.path == checkpoint
    assert changed


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", ["cpu", "null"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("after", [0.0, 0.5, 1.0])
def test_what_a_progress_callback_raises_ends_the_load(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[BaseException],
    device: str,
    engine: str,
    after: float,
) -> None:
    monkeypatch.setattr(supervision, "_PROGRESS_SECONDS", 0.0)
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if done >= after * total:
            raise kind("enough")

    options: dict[str, Any] = {"device": device, "engine": engine, "workers": 2, "chunk_bytes": 64 * KIB}
    with pytest.raises(kind, match="enough"):
        wl.load(checkpoint, progress=progress, digest=device == "null", **options)
    count = len(calls)
    state = wl.load(checkpoint, framework="numpy", engine=engine)
    assert state["layer.3"].tobytes() == tensor_bytes(SPECS[3])
    assert len(calls) == count, "nobody calls back after the end"


def test_a_file_that_may_not_be_read(checkpoint: Path) -> None:
    opened = wl.open(checkpoint)
    checkpoint.chmod(0)
    if os.access(checkpoint, os.R_OK):
        run_as_nobody(
            checkpoint.parent,
            f"""
            try:
                wl.load({str(checkpoint)!r}, framework="numpy")
            except wl.errors.AccessError as error:
                assert error.path == pathlib.Path({str(checkpoint)!r}) and error.hint, error
            else:
                raise SystemExit("it was read")
            """,
        )
    else:
        with pytest.raises(wl.errors.AccessError):
            wl.load(opened)
    checkpoint.chmod(0o644)


def run_as_nobody(folder: Path, program: str) -> None:
    """Run a program as a user who owns nothing and may write nothing."""
    lines = [
        "import os, pathlib, sys",
        "import numpy, weightlift as wl",
        "import weightlift.api, weightlift.loading, weightlift.engines.python",
    ]
    lines += ["from weightlift.engines.native import native_library", "native_library()", "wl.LoadOptions()"]
    # Packages may lie where nobody may look, so a first load as root brings them in.
    lines += ["warm = next(pathlib.Path(sys.argv[1]).glob('*.warm.safetensors'))", "wl.load(warm, framework='numpy')"]
    lines += ["os.setgroups([])", "os.setgid(65534)", "os.setuid(65534)"]
    write_checkpoint(folder / "x.warm.safetensors", SPECS[:1])
    for parent in [folder, *folder.parents]:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines) + "\n" + textwrap.dedent(program), str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.root
@pytest.mark.parametrize("engine", ENGINES)
def test_a_user_who_may_only_read_loads_by_every_path(checkpoint: Path, engine: str) -> None:
    checkpoint.chmod(0o444)
    expected = tensor_bytes(SPECS[5])[:64].hex()
    run_as_nobody(
        checkpoint.parent,
        f"""
        for method in ("auto", "direct", "buffered", "mmap"):
            for cache in ("auto", "keep", "drop"):
                state = wl.load({str(checkpoint)!r}, method=method, cache=cache, engine={engine!r}, framework="numpy")
                assert state["layer.5"].tobytes()[:64].hex() == {expected!r}, (method, cache)
                report = state.report
                # What another user's file has cached is none of this user's business on current kernels.
                assert report.page_cache_before_bytes is None, report.page_cache_before_bytes
                assert report.page_cache_after_bytes is None
                if method == "auto":
                    assert "unknown" in report.reason or "keep" == report.cache_decided, report.reason
        """,
    )
