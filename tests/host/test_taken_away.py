"""Loads in processes from which one thing that Linux offers is taken away, and all of them together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from taken_away import PARTS

from weightlift.testing import TensorSpec, tensor_digest, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

SPECS = [TensorSpec(f"layer.{n}", "F32", (64, 1000)) for n in range(6)]

CHILD = """
import json, sys
from taken_away import take_away
take_away([part for part in sys.argv[2].split(",") if part != "nothing"])
import numpy, xxhash
import weightlift as wl

found = {}
for method in ("auto", "direct", "buffered", "mmap"):
    try:
        state = wl.load(sys.argv[1], method=method, framework="numpy", digest=method != "mmap")
    except wl.WeightliftError as error:
        found[method] = {"error": type(error).__name__, "hint": error.hint, "message": error.message}
        continue
    found[method] = {
        "digests": {name: xxhash.xxh3_128_hexdigest(tensor.tobytes()) for name, tensor in state.items()},
        "engine": state.report.engine, "used": dict(state.report.method_used), "reason": state.report.reason,
        "cached": state.report.page_cache_before_bytes, "peak": state.report.host_memory.peak_anonymous_bytes,
    }
print(json.dumps(found))
"""


@pytest.mark.parametrize("taken", ["nothing", *PARTS, ",".join(PARTS)])
def test_every_method_loads_the_same_bytes_without(tmp_path: Path, taken: str) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    command = [sys.executable, "-c", CHILD, str(path), taken]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = {spec.name: tensor_digest(spec) for spec in SPECS}
    for method, load in found.items():
        if method == "direct" and "error" in load:
            assert load["error"] == "UnsupportedError"
            assert load["hint"]
            continue
        assert load.get("digests") == expected, (method, load)
        assert method == "mmap" or load["reason"], method
    if "O_DIRECT" in taken and "error" not in found["direct"]:
        assert not found["direct"]["used"].get("direct"), found["direct"]
    if sys.platform == "linux":
        assert (found["buffered"]["peak"] is None) == ("proc" in taken)
    if "engine" in taken:
        assert {found[method]["engine"] for method in ("auto", "buffered")} == {"python"}
