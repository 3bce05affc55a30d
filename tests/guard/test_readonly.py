"""``--readonly-mappings``: the hook that runs at the start of other Python programs."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.health.guard.launch import with_readonly_mappings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard needs Linux")

LOAD = """
import ctypes, sys
import torch, safetensors.torch
folder = sys.argv[1]
tensor = torch.arange(1 << 20, dtype=torch.float32)
safetensors.torch.save_file({"a": tensor}, folder + "/a.safetensors")
torch.save({"b": tensor}, folder + "/b.pt")
loaded = safetensors.torch.load_file(folder + "/a.safetensors")["a"]
mapped = torch.load(folder + "/b.pt", mmap=True)["b"]
plain = torch.from_file(folder + "/b.pt", shared=False, size=1 << 20)
shared = torch.UntypedStorage.from_file(folder + "/b.pt", True, 1 << 20)
assert torch.equal(loaded, tensor) and torch.equal(mapped, tensor)
maps = [line for line in open("/proc/self/maps") if folder in line]
print(*sorted({line.split()[1] + " " + line.split("/")[-1].strip() for line in maps}), sep="\\n", flush=True)
# What a driver does that takes the right to write for the intent to write.
address, whole = loaded.data_ptr() & -4096, loaded.nbytes
refused = ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(whole), 23)  # MADV_POPULATE_WRITE
print("refused" if refused else "copied", flush=True)
loaded.add_(1)
"""


needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "safetensors")),
    reason="torch or safetensors is not installed",
)


@needs_torch
def test_private_mappings_are_read_only_and_a_change_in_place_crashes(guard: Any, tmp_path: Path) -> None:
    ran = guard(tmp_path / "log", "--readonly-mappings", "--", sys.executable, "-c", LOAD, str(tmp_path))
    assert ran.out.splitlines() == ["r--p a.safetensors", "r--p b.pt", "rw-s b.pt", "refused"], ran.err
    assert "--readonly-mappings: checkpoints that torch maps are read-only" in ran.err
    assert ran.events[0]["readonly_mappings"]
    assert ran.code == 128 + signal.SIGSEGV
    assert "changed a mapped tensor in place" in ran.err


@needs_torch
def test_without_the_option_they_are_writable(guard: Any, tmp_path: Path) -> None:
    ran = guard(tmp_path / "log", "--", sys.executable, "-c", LOAD, str(tmp_path))
    assert ran.out.splitlines() == ["rw-p a.safetensors", "rw-p b.pt", "rw-s b.pt", "copied"]
    assert ran.code == 0


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.customised = True\n")
    environment = with_readonly_mappings(os.environ | {"PYTHONPATH": str(tmp_path)})
    code = "import builtins, sys; print(builtins.customised, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True False\n", "")


def test_without_torch_nothing_happens(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    environment = with_readonly_mappings(os.environ | {"PYTHONPATH": str(tmp_path)})
    code = "try:\n    import torch\nexcept ImportError as err:\n    print(err)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("no torch here\n", "")
