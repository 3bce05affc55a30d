"""The figures looked at while a load runs, in recorded trees of other machines and on this one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.host.gauges import HostFigures, HostGauges
from weightlift.host.memory import ProcessMemory, headroom
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

KIB = 1024
STATUS = "Name:\tpython\nRssAnon:\t    2048 kB\nRssFile:\t    1024 kB\nRssShmem:\t       4 kB\n"
MACHINE = {
    "proc/meminfo": (
        "MemTotal:       16777216 kB\nMemFree:         1000000 kB\nMemAvailable:    8388608 kB\n"
        "Cached:          6291456 kB\nShmem:           1048576 kB\nSwapTotal:       2097152 kB\n"
        "SwapFree:        1048576 kB\n"
    ),
    "proc/self/status": STATUS,
    "proc/vmstat": "nr_free_pages 1\npswpin 3\npswpout 5\n",
    "proc/pressure/memory": (
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"
    ),
    "proc/self/cgroup": "0::/\n",
    "proc/self/mountinfo": "",
}
GROUP_V2 = {
    **MACHINE,
    "proc/self/cgroup": "0::/user.slice/app.scope\n",
    "proc/self/mountinfo": "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "sys/fs/cgroup/user.slice/app.scope/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/app.scope/memory.current": "104857600\n",
    "sys/fs/cgroup/user.slice/app.scope/memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=750000\n",
    "sys/fs/cgroup/user.slice/memory.max": str(512 * MIB),
    "sys/fs/cgroup/user.slice/memory.current": str(500 * MIB),
    "sys/fs/cgroup/user.slice/memory.stat": (
        f"anon {100 * MIB}\nfile {390 * MIB}\nshmem {10 * MIB}\ninactive_file {200 * MIB}\nactive_file {150 * MIB}\n"
    ),
    "sys/fs/cgroup/user.slice/memory.swap.max": str(300 * MIB),
    "sys/fs/cgroup/user.slice/memory.swap.current": str(100 * MIB),
}
GROUP_V1 = {
    **MACHINE,
    "proc/self/cgroup": "4:memory:/docker/abc\n",
    "proc/self/mountinfo": "40 20 0:30 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(900 * MIB),
    "sys/fs/cgroup/memory/memory.stat": (
        f"cache 1\ntotal_cache {600 * MIB}\ntotal_shmem 0\n"
        f"total_inactive_file {500 * MIB}\ntotal_active_file {50 * MIB}\n"
    ),
}


def read(plant: Callable[[Mapping[str, str]], Path], tree: Mapping[str, str]) -> HostFigures:
    return HostGauges(plant(tree)).read(fresh=True)


def test_a_machine_without_groups(plant: Callable[[Mapping[str, str]], Path]) -> None:
    seen = read(plant, MACHINE)
    assert seen.process == ProcessMemory(2048 * KIB, 1024 * KIB, 4 * KIB)
    assert (seen.available_bytes, seen.last_resort_bytes, seen.total_bytes) == (8 * GIB, 8 * GIB, 16 * GIB)
    assert (seen.group, seen.page_cache_bytes, seen.swap_free_bytes) == ("", 5 * GIB, GIB)
    assert seen.swapped is not None
    assert seen.swapped[1] > seen.swapped[0] > 0
    assert (seen.machine_stall_seconds, seen.group_stall_seconds) == (2.5, None)


def test_the_group_that_leaves_least_counts(plant: Callable[[Mapping[str, str]], Path]) -> None:
    seen = read(plant, GROUP_V2)
    assert (seen.group, seen.total_bytes) == ("/user.slice", 512 * MIB)
    assert (seen.available_bytes, seen.last_resort_bytes) == (212 * MIB, 362 * MIB)
    assert (seen.page_cache_bytes, seen.swap_free_bytes) == (380 * MIB, 200 * MIB)
    assert (seen.machine_stall_seconds, seen.group_stall_seconds) == (2.5, 0.75)


def test_a_group_of_version_1(plant: Callable[[Mapping[str, str]], Path]) -> None:
    seen = read(plant, GROUP_V1)
    assert (seen.group, seen.total_bytes) == ("/", GIB)
    assert (seen.available_bytes, seen.last_resort_bytes) == (624 * MIB, 674 * MIB)
    assert (seen.page_cache_bytes, seen.group_stall_seconds) == (600 * MIB, None)


def test_a_system_that_tells_nothing(plant: Callable[[Mapping[str, str]], Path]) -> None:
    assert read(plant, {}) == HostFigures(None, None, None, None, "", None, 0, None, None, None)


def test_pressure_is_looked_at_now_and_then(plant: Callable[[Mapping[str, str]], Path]) -> None:
    root = plant(MACHINE)
    gauges = HostGauges(root)
    assert gauges.read().machine_stall_seconds == 2.5
    (root / "proc/pressure/memory").write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=9000000\n")
    assert [gauges.read().machine_stall_seconds for _ in range(4)] == [2.5, 2.5, 2.5, 9.0]


def test_swap_is_counted_only_where_there_is_some(plant: Callable[[Mapping[str, str]], Path]) -> None:
    root = plant(MACHINE)
    gauges = HostGauges(root)
    before = gauges.read().swapped
    (root / "proc/vmstat").write_text("pswpin 30\npswpout 50\n")
    after = gauges.read().swapped
    assert before is not None
    assert after == (10 * before[0], 10 * before[1])
    (root / "proc/meminfo").write_text(MACHINE["proc/meminfo"].replace("2097152", "0"))
    (root / "proc/vmstat").write_text("pswpin 7\npswpout 8\n")
    assert gauges.read().swapped == HostGauges(root).read().swapped == after


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_this_machine_agrees_with_the_thorough_look() -> None:
    seen, thorough = HostGauges().read(), headroom()
    assert thorough is not None
    assert seen.available_bytes is not None
    assert abs(seen.available_bytes - thorough.available_bytes) < thorough.total_bytes // 4
    assert seen.total_bytes == thorough.total_bytes
