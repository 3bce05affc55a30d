"""Samples from recorded trees of other machines."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.health.guard.launch import Scope
from weightlift.health.guard.sampling import Sampler
from weightlift.host.cgroup import CgroupLevel
from weightlift.host.groups import MemoryGroup
from weightlift.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard needs Linux")

OWN = os.getpid()
SMAPS = (
    "7f0000000000-7f0040000000 rw-p 00000000 fe:00 7      /models/a.safetensors\nRss: {rss} kB\nAnonymous: {rss} kB\n"
)
MACHINE = {
    "proc/meminfo": "MemTotal: 33554432 kB\nMemFree: 1048576 kB\nMemAvailable: 16777216 kB\nSwapFree: 2097152 kB\n",
    "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=5000000\nfull avg10=0.00 total=0\n",
    "proc/self/mountinfo": "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "proc/self/cgroup": "0::/\n",
    f"proc/{OWN}/stat": f"{OWN} (python) S 1 1 1 0\n",
    "proc/71/stat": f"71 (sh) S {OWN} 1 1 0\n",
    "proc/72/stat": "72 (loader) R 71 1 1 0\n",
    "proc/73/stat": "73 (browser) R 1 1 1 0\n",
    "proc/71/status": "RssAnon: 1024 kB\nRssFile: 0 kB\nRssShmem: 4 kB\nVmSwap: 8 kB\n",
    "proc/72/status": "RssAnon: 2048 kB\nRssFile: 512 kB\nRssShmem: 0 kB\nVmSwap: 0 kB\n",
    "proc/73/status": "RssAnon: 9999 kB\nRssFile: 0 kB\nRssShmem: 0 kB\nVmSwap: 0 kB\n",
    "proc/72/smaps": SMAPS.format(rss=4096),
}
GROUP = {
    "sys/fs/cgroup/guard/cgroup.procs": "72\n",
    "sys/fs/cgroup/guard/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/guard/memory.stat": f"anon {2 * GIB}\nfile {1 * GIB}\nshmem {256 * MIB}\ninactive_file 0\n",
    "sys/fs/cgroup/guard/memory.events": "oom_kill 1\n",
    "sys/fs/cgroup/guard/memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=4500000\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in (MACHINE | GROUP).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def group_scope(root: Path) -> Scope:
    group = MemoryGroup(CgroupLevel(root / "sys/fs/cgroup/guard", "/guard", 2))
    return Scope("control group, version 2", "", group, limit_bytes=4 * GIB, ceiling_bytes=3 * GIB)


def test_a_group_of_version_2(root: Path) -> None:
    sampler = Sampler(72, group_scope(root), root)
    sample = sampler.sample()
    assert sample is not None
    assert (sample.anonymous_bytes, sample.shared_bytes, sample.file_bytes) == (2 * GIB, 256 * MIB, 768 * MIB)
    assert (sample.ceiling_bytes, sample.charged_bytes, sample.kills) == (3 * GIB, 3 * GIB, 1)
    assert (sample.available_bytes, sample.free_bytes, sample.swap_free_bytes) == (16 * GIB, 1 * GIB, 2 * GIB)
    # The machine waited for 5 s, of which the command itself did 4.5 s.
    assert sample.others_stalled_seconds == 0.5
    assert sampler.peak_lasting_bytes == 2 * GIB + 256 * MIB


def test_a_process_tree(root: Path) -> None:
    sample = Sampler(71, Scope("process tree", ""), root).sample()
    assert sample is not None
    assert (sample.anonymous_bytes, sample.file_bytes) == (3072 * KIB, 512 * KIB)
    assert (sample.shared_bytes, sample.swapped_bytes) == (4 * KIB, 8 * KIB)
    assert (sample.ceiling_bytes, sample.charged_bytes, sample.others_stalled_seconds) == (None, None, None)


def test_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    assert Sampler(71, Scope("process tree", ""), tmp_path).sample() is None


def test_a_group_that_is_gone(root: Path) -> None:
    (root / "sys/fs/cgroup/guard/memory.current").unlink()
    assert Sampler(72, group_scope(root), root).sample() is None


def test_what_grew_since_the_start_and_since_the_last_look(root: Path) -> None:
    sampler = Sampler(72, group_scope(root), root)
    sampler.look(at_once=True)
    (root / "proc/72/smaps").write_text(SMAPS.format(rss=7168))
    sampler.look()
    assert [growth.grown_bytes for growth in sampler.grown()] == [4 * MIB], "it looked again at once"
    sampler.look(at_once=True)
    assert [growth.grown_bytes for growth in sampler.grown()] == [7 * MIB]
    assert [growth.grown_bytes for growth in sampler.growing()] == [3 * MIB]
    assert sampler.grown()[0].key.name == "/models/a.safetensors"
    # A command that has ended leaves what was last seen of it.
    (root / "proc/72/smaps").unlink()
    sampler.look(at_once=True)
    assert [growth.grown_bytes for growth in sampler.grown()] == [7 * MIB]
