"""A checkpoint far larger than memory, read inside a control group: the budget holds and nothing is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.testing import llama_70b_specs, write_checkpoint
from weightlift.testing.cgroup import CgroupUnavailable, memory_cgroup
from weightlift.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

LOAD = """
import json, sys
import weightlift
report = weightlift.load(sys.argv[1], device="null", method="direct", workers=4).report
print(json.dumps(report.to_json()))
"""


@pytest.mark.root
def test_141_gigabytes_pass_through_a_group_of_512_mebibytes(tmp_path: Path) -> None:
    specs = llama_70b_specs()
    write_checkpoint(tmp_path / "model", specs, shards=30, sparse=True)
    try:
        with memory_cgroup(512 * MIB) as group:
            command = group.command([sys.executable, "-c", LOAD, str(tmp_path / "model")])
            finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            killed = group.oom_kills()
    except CgroupUnavailable as err:
        pytest.skip(str(err))
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert killed == 0
    assert report["bytes"] == sum(spec.nbytes for spec in specs) > 141e9
    assert report["method"]["used"]["direct"] == report["bytes"]
    assert report["host_memory"]["peak_anonymous_bytes"] <= 48 * MIB
