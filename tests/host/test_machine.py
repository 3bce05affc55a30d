"""Machines from recorded trees, and this one."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.host import kernel, machine
from weightlift.host.machine import Ability, SwapDevice
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Plant = Callable[[Mapping[str, str]], Path]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

BASE = {
    "proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\nSwapFree: 1024 kB\n"
    "CommitLimit: 20971520 kB\nCommitted_AS: 10485760 kB\n",
    "proc/sys/kernel/osrelease": "6.6.87.2-microsoft-standard-WSL2\n",
    "proc/sys/vm/swappiness": "100\n",
    "proc/sys/vm/overcommit_memory": "2\n",
    "proc/self/cgroup": "0::/box\n",
    "proc/self/mountinfo": "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "sys/fs/cgroup/box/memory.max": str(8 * GIB),
    "sys/fs/cgroup/box/memory.current": str(2 * GIB),
    "sys/fs/cgroup/box/memory.stat": f"inactive_file {1 * GIB}\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
}

SWAPS = (
    "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    "/dev/zram0                              partition\t8388604\t\t1024\t\t100\n"
    "/dev/sda3                               partition\t4194300\t\t0\t\t-2\n"
    "/dev/nvme0n1p3                          partition\t2097148\t\t0\t\t-3\n"
    "/swap\\040file                          file\t\t1048572\t\t512\t\t-4\n"
)
DISKS = {
    "sys/class/block/sda3": "-> ../../devices/ata/sda/sda3",
    "sys/devices/ata/sda/sda3/partition": "3\n",
    "sys/devices/ata/sda/queue/rotational": "1\n",
    "sys/class/block/nvme0n1p3": "-> ../../devices/nvme/nvme0n1/nvme0n1p3",
    "sys/devices/nvme/nvme0n1/nvme0n1p3/partition": "3\n",
    "sys/devices/nvme/nvme0n1/queue/rotational": "0\n",
}


class TestFacts:
    def test_a_recorded_machine(self, plant: Plant) -> None:
        found = machine.machine_facts(plant(BASE | DISKS | {"proc/swaps": SWAPS, ".dockerenv": ""}))
        assert found.release.endswith("WSL2")
        assert found.wsl2
        assert found.container == "docker"
        assert (found.swappiness, found.overcommit, found.hugepages) == (100, 2, "never")
        assert found.commit_left_bytes == 10 * GIB
        assert found.memory_bytes == 32 * GIB
        assert found.room is not None
        assert found.room.available_bytes == 7 * GIB
        assert [(room.group, room.version) for room in found.room.rooms] == [("", 0), ("/box", 2)]
        assert found.swap_bytes == 15 * GIB - 4 * 4096

    def test_an_empty_tree_is_unknown(self, plant: Plant) -> None:
        found = machine.machine_facts(plant({}))
        assert (found.room, found.swap, found.swappiness, found.overcommit) == (None, None, None, None)
        assert (found.memory_bytes, found.swap_bytes, found.commit_left_bytes, found.hugepages) == (None,) * 4
        assert not found.wsl2
        assert found.container == ""

    @pytest.mark.parametrize(
        ("tree", "kind"),
        [
            ({"run/systemd/container": "lxc\n"}, "lxc"),
            ({"var/run/secrets/kubernetes.io/x": ""}, "kubernetes"),
            ({"run/.containerenv": ""}, "podman"),
        ],
    )
    def test_containers(self, plant: Plant, tree: dict[str, str], kind: str) -> None:
        assert machine.container_kind(plant(tree)) == kind

    @linux_only
    def test_this_machine(self) -> None:
        found = machine.machine_facts()
        assert found.system == "Linux"
        assert found.release == os.uname().release
        assert found.room is not None
        assert found.swap is not None
        assert found.features is not None
        assert found.memlock_bytes is not None


class TestSwap:
    def test_kinds_sizes_and_disks(self, plant: Plant) -> None:
        areas = machine.swap_devices(plant(DISKS | {"proc/swaps": SWAPS}))
        assert areas is not None
        assert [(area.name, area.kind, area.rotating) for area in areas] == [
            ("/dev/zram0", "zram", False),
            ("/dev/sda3", "partition", True),
            ("/dev/nvme0n1p3", "partition", False),
            ("/swap file", "file", None),
        ]
        assert areas[0] == SwapDevice(
            name="/dev/zram0",
            kind="zram",
            size_bytes=8 * GIB - 4096,
            used_bytes=1 * MIB,
            priority=100,
            rotating=False,
        )

    def test_none(self, plant: Plant) -> None:
        assert machine.swap_devices(plant({"proc/swaps": SWAPS.splitlines()[0]})) == ()

    def test_a_swap_file_is_on_the_disk_of_its_mount(self, plant: Plant) -> None:
        root = plant(DISKS | {"proc/swaps": "head\n/swapfile file 1024 0 -2\n", "swapfile": ""})
        device = os.stat(root / "swapfile").st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/mountinfo").write_text(f"1 1 {number} / / rw - ext4 /dev/sda3 rw\n")
        (root / "sys/dev/block").mkdir(parents=True)
        (root / "sys/dev/block" / number).symlink_to("../../devices/ata/sda/sda3")
        areas = machine.swap_devices(root)
        assert areas is not None
        assert [area.rotating for area in areas] == [True]


class TestFeatures:
    @linux_only
    def test_they_agree_with_the_kernel(self) -> None:
        features = machine.kernel_features()
        with open(__file__, "rb") as file:
            try:
                works = kernel.cachestat(file.fileno(), 0, 0) is not None
            except PermissionError:
                works = features.cachestat is Ability.WORKS
        assert (features.cachestat is Ability.WORKS) is works
        assert features.io_uring in {Ability.WORKS, Ability.FORBIDDEN, Ability.MISSING}

    @linux_only
    @pytest.mark.parametrize(
        ("answer", "ability"),
        [
            (PermissionError(1, "no"), Ability.FORBIDDEN),
            (OSError(12, "memory"), Ability.UNKNOWN),
            (None, Ability.MISSING),
        ],
    )
    def test_what_a_call_answers(
        self, monkeypatch: pytest.MonkeyPatch, answer: OSError | None, ability: Ability
    ) -> None:
        def call(*_: object) -> None:
            if answer is not None:
                raise answer

        monkeypatch.setattr(kernel, "cachestat", call)
        monkeypatch.setattr(kernel, "io_uring_setup", call)
        found = machine.kernel_features()
        assert (found.cachestat, found.io_uring) == (ability, ability)

    @linux_only
    def test_probing_leaves_no_descriptor_open(self) -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        machine.kernel_features()
        assert sorted(os.listdir("/proc/self/fd")) == before
