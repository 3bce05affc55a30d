from __future__ import annotations

import mmap
import os
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.host import memory
from weightlift.host.cgroup import cgroup_levels
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Plant = Callable[[Mapping[str, str]], Path]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

MEMINFO = (
    "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:   16777216 kB\n"
    "SwapFree:        2097152 kB\nHugePages_Total:       3\n"
)
ROOT_MOUNT = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
V1_MOUNTS = (
    ROOT_MOUNT
    + "34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    + "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)
V2_MOUNTS = ROOT_MOUNT + "41 31 0:38 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"

MACHINE_ONLY = {"proc/meminfo": MEMINFO, "proc/self/mountinfo": ROOT_MOUNT, "proc/self/cgroup": "0::/\n"}

V1 = MACHINE_ONLY | {
    "proc/self/mountinfo": V1_MOUNTS,
    "proc/self/cgroup": "4:memory:/jobs/one\n3:cpuset:/\n2:cpu,cpuacct:/jobs\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(9 * GIB),
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": str(4 * GIB),
    "sys/fs/cgroup/memory/jobs/memory.usage_in_bytes": str(3 * GIB),
    "sys/fs/cgroup/memory/jobs/memory.stat": f"inactive_file 7\ntotal_inactive_file {1 * GIB}\n",
    "sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes": str(3 * GIB),
    "sys/fs/cgroup/memory/jobs/one/memory.usage_in_bytes": str(1 * GIB),
    "sys/fs/cgroup/memory/jobs/one/memory.stat": f"cache 12\ninactive_file 9\ntotal_inactive_file {512 * MIB}\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us": "100000\n",
}

V2 = MACHINE_ONLY | {
    "proc/self/mountinfo": V2_MOUNTS,
    "proc/self/cgroup": "0::/user.slice/app.scope\n",
    "sys/fs/cgroup/user.slice/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/user.slice/memory.high": "max\n",
    "sys/fs/cgroup/user.slice/memory.current": f"{7 * GIB}\n",
    "sys/fs/cgroup/user.slice/memory.stat": f"anon 5\ninactive_file {2 * GIB}\nactive_file 1\n",
    "sys/fs/cgroup/user.slice/app.scope/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/app.scope/memory.high": "max\n",
    "sys/fs/cgroup/user.slice/app.scope/memory.current": f"{1 * GIB}\n",
    "sys/fs/cgroup/user.slice/app.scope/memory.stat": "inactive_file 0\n",
    "sys/fs/cgroup/user.slice/app.scope/memory.swap.max": f"{512 * MIB}\n",
    "sys/fs/cgroup/user.slice/app.scope/memory.swap.current": f"{500 * MIB}\n",
}


class TestHeadroom:
    def test_without_limits_the_machine_decides(self, plant: Plant) -> None:
        found = memory.headroom(plant(MACHINE_ONLY))
        assert found is not None
        assert (found.available_bytes, found.total_bytes, found.swap_free_bytes) == (16 * GIB, 32 * GIB, 2 * GIB)
        assert found.limit_source == "machine"
        assert "16.0 GiB" in found.sentence

    def test_version_1_takes_the_tightest_level_and_forgives_inactive_files(self, plant: Plant) -> None:
        found = memory.headroom(plant(V1))
        assert found is not None
        # jobs: 4 - (3 - 1) = 2 GiB; jobs/one: 3 - (1 - 0.5) = 2.5 GiB.
        assert (found.available_bytes, found.total_bytes) == (2 * GIB, 4 * GIB)
        assert found.limit_source == "cgroup"
        assert "/jobs " in found.sentence

    def test_version_2_finds_the_limit_of_an_ancestor(self, plant: Plant) -> None:
        found = memory.headroom(plant(V2))
        assert found is not None
        assert (found.available_bytes, found.total_bytes) == (3 * GIB, 8 * GIB)
        assert found.limit_source == "cgroup"
        assert "/user.slice " in found.sentence
        assert found.swap_free_bytes == 12 * MIB

    def test_version_2_stays_below_the_level_where_allocations_are_slowed_down(self, plant: Plant) -> None:
        scope = "sys/fs/cgroup/user.slice/app.scope"
        found = memory.headroom(plant(V2 | {f"{scope}/memory.high": f"{2 * GIB}\n"}))
        assert found is not None
        assert (found.available_bytes, found.total_bytes) == (1 * GIB, 2 * GIB)

    def test_a_limit_of_max_is_none(self, plant: Plant) -> None:
        found = memory.headroom(plant(V2 | {"sys/fs/cgroup/user.slice/memory.max": "max\n"}))
        assert found is not None
        assert found.limit_source == "machine"

    def test_a_group_above_its_limit_leaves_nothing(self, plant: Plant) -> None:
        found = memory.headroom(plant(V2 | {"sys/fs/cgroup/user.slice/memory.current": f"{20 * GIB}\n"}))
        assert found is not None
        assert found.available_bytes == 0

    def test_a_container_sees_its_own_group_as_the_mount(self, plant: Plant) -> None:
        tree = MACHINE_ONLY | {
            "proc/self/mountinfo": ROOT_MOUNT
            + "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            "proc/self/cgroup": "4:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(1 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(256 * MIB),
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
        }
        found = memory.headroom(plant(tree))
        assert found is not None
        assert found.available_bytes == 768 * MIB

    def test_a_machine_with_both_versions_is_judged_by_the_one_with_the_controller(self, plant: Plant) -> None:
        mounts = V1_MOUNTS + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        found = memory.headroom(plant(V1 | {"proc/self/mountinfo": mounts, "sys/fs/cgroup/unified/cgroup.procs": ""}))
        assert found is not None
        assert found.available_bytes == 2 * GIB

    def test_a_system_without_proc_is_unknown(self, plant: Plant) -> None:
        root = plant({})
        assert memory.headroom(root) is None
        assert memory.process_memory(root) is None
        assert memory.swap_counters(root) is None
        assert memory.pressure_stall_seconds(root) is None
        assert memory.transparent_hugepages(root) is None

    @linux_only
    def test_this_machine(self) -> None:
        found = memory.headroom()
        assert found is not None
        assert 0 <= found.available_bytes <= found.total_bytes


class TestCgroupLevels:
    def test_the_own_group_comes_first_and_the_mount_point_last(self, plant: Plant) -> None:
        root = plant(V2)
        levels = cgroup_levels("memory", root)
        assert [level.name for level in levels] == ["/user.slice/app.scope", "/user.slice", "/"]
        assert [level.folder for level in levels] == [
            root / "sys/fs/cgroup/user.slice/app.scope",
            root / "sys/fs/cgroup/user.slice",
            root / "sys/fs/cgroup",
        ]
        assert {level.version for level in levels} == {2}

    @pytest.mark.parametrize("name", ["/../other", "/elsewhere"])
    def test_a_group_outside_the_mount_is_judged_from_the_mount_point(self, plant: Plant, name: str) -> None:
        mounts = ROOT_MOUNT + "41 31 0:38 /kubepods /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
        levels = cgroup_levels("memory", plant({"proc/self/mountinfo": mounts, "proc/self/cgroup": f"0::{name}\n"}))
        assert [level.name for level in levels] == ["/"]

    def test_a_name_with_a_colon(self, plant: Plant) -> None:
        tree = {"proc/self/mountinfo": V2_MOUNTS, "proc/self/cgroup": "0::/a:b\n"}
        assert [level.name for level in cgroup_levels("cpu", plant(tree))] == ["/a:b", "/"]


class TestProcessors:
    @pytest.fixture(autouse=True)
    def eight_processors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if sys.platform == "linux":
            monkeypatch.setattr(os, "sched_getaffinity", lambda *_: set(range(8)))
        else:
            monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def test_without_quota(self, plant: Plant) -> None:
        assert memory.available_processors(plant(MACHINE_ONLY)) == 8

    def test_version_1_quota_rounds_up(self, plant: Plant) -> None:
        assert memory.available_processors(plant(V1)) == 1

    def test_version_1_without_quota(self, plant: Plant) -> None:
        assert memory.available_processors(plant(V1 | {"sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us": "-1\n"})) == 8

    @pytest.mark.parametrize(
        ("setting", "count"),
        [("max 100000", 8), ("250000 100000", 3), ("1000 100000", 1), ("1600000 100000", 8), ("200000 100000", 2)],
    )
    def test_version_2_quota_of_an_ancestor(self, plant: Plant, setting: str, count: int) -> None:
        tree = V2 | {"sys/fs/cgroup/user.slice/cpu.max": f"{setting}\n"}
        assert memory.available_processors(plant(tree)) == count


class TestCounters:
    def test_process_memory_is_split_by_kind(self, plant: Plant) -> None:
        status = (
            "Name:\tpython3 kB\nVmRSS:\t  1784 kB\nRssAnon:\t     112 kB\nRssFile:\t    1672 kB\nRssShmem:\t  3 kB\n"
        )
        found = memory.process_memory(plant({"proc/self/status": status}))
        assert found == memory.ProcessMemory(112 * 1024, 1672 * 1024, 3 * 1024)

    @linux_only
    def test_touched_memory_is_anonymous(self) -> None:
        before = memory.process_memory()
        with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            for page in range(0, 64 * MIB, mmap.PAGESIZE):
                block[page] = 1
            after = memory.process_memory()
        assert before is not None
        assert after is not None
        assert 56 * MIB < after.anonymous_bytes - before.anonymous_bytes < 72 * MIB
        assert abs(after.file_bytes - before.file_bytes) < 4 * MIB

    def test_swap_counters_are_bytes(self, plant: Plant) -> None:
        text = "nr_free_pages 5\npswpin 3\npswpout 7\nthp_swpout 99\n"
        found = memory.swap_counters(plant({"proc/vmstat": text}))
        assert found == (3 * mmap.PAGESIZE, 7 * mmap.PAGESIZE)

    def test_a_kernel_without_swap_does_not_count(self, plant: Plant) -> None:
        assert memory.swap_counters(plant({"proc/vmstat": "nr_free_pages 5\n"})) is None

    def test_pressure_is_seconds_of_some_task(self, plant: Plant) -> None:
        averages = "avg10=0.00 avg60=0.00 avg300=0.00"
        text = f"some {averages} total=2500000\nfull {averages} total=9000000\n"
        assert memory.pressure_stall_seconds(plant({"proc/pressure/memory": text})) == 2.5

    @pytest.mark.parametrize("setting", ["always", "madvise", "never"])
    def test_hugepage_setting(self, plant: Plant, setting: str) -> None:
        text = "always madvise never\n".replace(setting, f"[{setting}]")
        root = plant({"sys/kernel/mm/transparent_hugepage/enabled": text})
        assert memory.transparent_hugepages(root) == setting
