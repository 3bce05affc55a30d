"""Real system calls that fail: strace makes the kernel's answer an error for the checkpoint's file and no other."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.host import storage
from weightlift.testing import TensorSpec, tensor_digest, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

SPECS = [TensorSpec(f"layer.{n}", "F32", (64, 1024)) for n in range(8)]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
READS = "pread64,preadv,preadv2"

# The second load goes by another name of the same file, which strace lets alone: it counts calls per thread, so that
# a new worker would meet the fault again.
CHILD = """
import json, pathlib, sys
import numpy
import weightlift as wl
from weightlift.testing.leaks import nothing_left_behind

faulty, twin, engine, method = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4]
options = {"engine": engine, "framework": "numpy", "workers": 1, "chunk_bytes": 65536, "digest": True}
wl.load(twin, method="buffered", **(options | {"engine": "python"}))
found = {"error": None}
with nothing_left_behind(faulty.parent):
    try:
        state = wl.load(faulty, method=method, **options)
        found["digests"] = dict(state.report.digests)
        found["used"] = dict(state.report.method_used)
        del state
    except wl.WeightliftError as error:
        found |= {"error": type(error).__name__, "errno": getattr(error, "errno", None), "path": str(error.path)}
        found |= {"tensor": error.tensor, "offset": error.offset, "hint": error.hint, "message": error.message}
    state = wl.load(twin, method="buffered", **(options | {"engine": "python"}))
    found["next"] = dict(state.report.digests)
    del state
print(json.dumps(found))
"""


@functools.cache
def missing_injection() -> str | None:
    """Why this machine cannot make calls fail, or ``None``."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    command = ["strace", "-f", "-qq", "-e", "trace=none", "-e", "inject=getppid:error=EIO", sys.executable, "-c", ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"strace may not trace here: {done.stderr.strip()[-200:]}"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    reason = missing_injection()
    if reason is not None:
        pytest.skip(reason)
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    (tmp_path / "twin.safetensors").hardlink_to(path)
    return path


def load_with(checkpoint: Path, calls: str, fault: str, engine: str, method: str, *, anywhere: bool = False) -> Any:
    """Load in a child whose calls fail, check what holds after every fault, and return what the child found."""
    if method == "direct" and not (access := storage.probe_direct(checkpoint)).supported:
        pytest.skip(access.reason)
    command = ["strace", "-f", "-qq", "-o", str(checkpoint.with_name("trace")), "-e", f"trace={calls}"]
    command += [] if anywhere else ["-P", str(checkpoint)]
    command += ["-e", f"inject={calls}:{fault}", sys.executable, "-c", CHILD, str(checkpoint)]
    command += [str(checkpoint.with_name("twin.safetensors")), engine, method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "INJECTED" in checkpoint.with_name("trace").read_text(errors="replace"), "no call was made to fail"
    expected = {spec.name: tensor_digest(spec) for spec in SPECS}
    assert found["next"] == expected
    if found["error"] is None:
        assert found["digests"] == expected
    else:
        assert found["path"] == str(checkpoint)
        assert found["hint"]
        assert str(checkpoint) in found["message"]
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["direct", "buffered"])
@pytest.mark.parametrize("nth", [2, 7, 20])
def test_the_nth_read_fails(checkpoint: Path, nth: int, method: str, engine: str) -> None:
    found = load_with(checkpoint, READS, f"error=EIO:when={nth}", engine, method)
    assert (found["error"], found["errno"]) == ("ReadError", 5)
    assert found["tensor"] in {spec.name for spec in SPECS}
    assert f"{found['offset']:,}" in found["message"]
    assert found["tensor"] in found["message"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_a_read_that_finds_no_memory(checkpoint: Path, method: str, engine: str) -> None:
    found = load_with(checkpoint, READS, "error=ENOMEM:when=3", engine, method)
    assert (found["error"], found["errno"]) == ("ReadError", 12)
    assert found["tensor"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_interrupted_reads_are_asked_again(checkpoint: Path, method: str, engine: str) -> None:
    found = load_with(checkpoint, READS, "error=EINTR:when=2+2", engine, method)
    assert found["error"] is None
    assert method in found["used"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_a_file_that_seems_to_end_early(checkpoint: Path, method: str, engine: str) -> None:
    # Only an answer of 0 bytes is honest: strace fills no buffer, so that any other count would be of stale bytes.
    found = load_with(checkpoint, READS, "retval=0:when=4", engine, method)
    assert found["error"] in {"TruncatedFileError", "ReadError"}
    assert found["tensor"] in {spec.name for spec in SPECS}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("refusal", ["EINVAL", "EOPNOTSUPP"])
def test_direct_reads_that_are_refused_midway_go_through_the_cache(checkpoint: Path, refusal: str, engine: str) -> None:
    found = load_with(checkpoint, READS, f"error={refusal}:when=3", engine, "direct")
    assert found["error"] is None
    assert found["used"]["buffered"] > 0


@pytest.mark.native
@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_no_memory_for_the_tensors(checkpoint: Path, method: str) -> None:
    found = load_with(checkpoint, "madvise", "error=ENOMEM", "native", method, anywhere=True)
    assert found["error"] == "InsufficientMemoryError"
    assert found["tensor"] in {spec.name for spec in SPECS}


@pytest.mark.parametrize("error", ["EIO", "EMFILE", "EACCES"])
def test_a_file_that_cannot_be_opened(checkpoint: Path, error: str) -> None:
    found = load_with(checkpoint, "openat", f"error={error}", "python", "buffered")
    assert found["error"] == ("AccessError" if error == "EACCES" else "ReadError")


@pytest.mark.parametrize(("error", "expected"), [("ENOMEM", "InsufficientMemoryError"), ("ENODEV", "ReadError")])
def test_a_file_that_cannot_be_mapped(checkpoint: Path, error: str, expected: str) -> None:
    found = load_with(checkpoint, "mmap", f"error={error}", "python", "mmap")
    assert found["error"] == expected
    assert "mapped" in found["message"]
