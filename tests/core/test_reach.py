"""In control groups: 8 GiB pass through 512 MiB by every path, and a load that cannot fit is not killed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.testing.cgroup import CgroupUnavailable, memory_cgroup
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BUDGET: Final = 128 * MIB
SPARE: Final = 16 * MIB

# Everything is imported and used once before the process enters the group, so that only the load is charged to it.
PRELUDE = """
import json, sys
import weightlift, weightlift.loading
small, large, *options = sys.argv[1:]
options = json.loads(options[0])
weightlift.load(small, **options)
print("ready", flush=True)
sys.stdin.readline()
"""
LOAD = """
print(json.dumps(weightlift.load(large, **options).report.to_json()))
"""
# Another program takes memory just when the load has found out that its tensors fit.
LOAD_BESIDE_ANOTHER_PROGRAM = """
check, taken = weightlift.loading.require_fit, []
def require_fit(fit):
    check(fit)
    taken.append(bytearray(b"x") * (160 << 20))
weightlift.loading.require_fit = require_fit
try:
    weightlift.load(large, **options)
except weightlift.errors.InsufficientMemoryError as err:
    print(json.dumps({"message": err.message, "hint": err.hint}))
"""


class Finished:
    """What a program in a control group said, and what the kernel saw."""

    def __init__(self, said: dict[str, Any], oom_kills: int, max_usage_bytes: int | None) -> None:
        self.said = said
        self.oom_kills = oom_kills
        self.max_usage_bytes = max_usage_bytes


def run_in_group(limit_bytes: int, program: str, arguments: Sequence[str]) -> Finished:
    """Start a program, move it into a group when it is ready, and let it go."""
    command = [sys.executable, "-c", PRELUDE + program, *arguments]
    try:
        with memory_cgroup(limit_bytes) as group:
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                group.add(process.pid)
                said, _ = process.communicate("go\n", timeout=300)
            killed, most = group.oom_kills(), group.max_usage_bytes()
    except CgroupUnavailable as err:
        pytest.skip(str(err))
    assert process.returncode == 0, f"the program ended with {process.returncode}, {killed} killed by the kernel"
    return Finished(json.loads(said), killed, most)


@pytest.fixture
def small(tmp_path: Path) -> str:
    return str(write_checkpoint(tmp_path / "small.safetensors", [TensorSpec("x", "U8", (MIB,))]))


@pytest.mark.root
@pytest.mark.parametrize("method", ["direct", "buffered", "mmap", "auto"])
def test_8_gibibytes_pass_through_a_group_of_512_mebibytes(tmp_path: Path, small: str, method: str) -> None:
    specs = [TensorSpec(f"layers.{number}", "BF16", (8192, 8192)) for number in range(64)]
    large = write_checkpoint(tmp_path / "large", specs, shards=2, sparse=True)
    options = {"device": "null", "method": method, "host_memory": BUDGET}
    finished = run_in_group(512 * MIB, LOAD, [small, str(large), json.dumps(options)])
    report = finished.said
    assert report["bytes"] == 8 * GIB
    assert finished.oom_kills == 0
    assert report["interventions"] == []
    peak = report["host_memory"]["peak_anonymous_bytes"] + report["host_memory"]["peak_pinned_bytes"]
    assert peak <= BUDGET + SPARE
    if report["method"]["used"]["direct"] == report["bytes"]:
        assert finished.max_usage_bytes is not None
        assert finished.max_usage_bytes <= BUDGET + SPARE
    else:
        assert method != "direct", "the file system takes no direct reads"


@pytest.mark.root
@pytest.mark.parametrize("engine", [pytest.param("native", marks=pytest.mark.native), "python"])
@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_a_load_that_can_no_longer_fit_ends_with_an_error_and_not_by_the_kernel(
    tmp_path: Path, small: str, method: str, engine: str
) -> None:
    large = write_checkpoint(tmp_path / "large", [TensorSpec("x", "U8", (1 << 28,))], shards=1, sparse=True)
    options = {"method": method, "framework": "numpy", "engine": engine}
    finished = run_in_group(320 * MIB, LOAD_BESIDE_ANOTHER_PROGRAM, [small, str(large), json.dumps(options)])
    assert finished.oom_kills == 0
    assert "before the system would have killed it" in finished.said["message"]
    assert "the tensors still need" in finished.said["message"]
    assert "add swap" in finished.said["hint"]
