"""What doctor finds on made-up machines, and what it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.health.checks import CHECKS, RULES
from weightlift.health.checks.devices import has_fault_bug
from weightlift.health.examination import examine
from weightlift.health.facts import Facts, Gap, Library, SoftwareFacts, Speeds
from weightlift.health.findings import Finding, Level
from weightlift.host.block import BlockDevice
from weightlift.host.machine import Ability, KernelFeatures, SwapDevice
from weightlift.host.memory import Room
from weightlift.host.mounts import Mount
from weightlift.host.pci import AMD, GraphicsCard
from weightlift.host.storage import DirectAccess
from weightlift.testing import machines
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def ids(facts: Facts) -> set[str]:
    examination = examine(facts)
    assert examination.gaps == facts.gaps
    return {finding.id for finding in examination.findings}


def one(facts: Facts, name: str) -> Finding:
    (finding,) = (finding for finding in examine(facts).findings if finding.id == name)
    return finding


@pytest.mark.parametrize(
    ("make", "expected", "degraded"),
    [
        (
            machines.two_7900_xtx,
            {
                "memory-less-than-gpu",
                "model-exceeds-memory",
                "swap-short",
                "private-writable-mappings",
                "mapped-cpu-tensors",
                "rocm-pinned-threshold",
            },
            True,
        ),
        (machines.strix_halo, {"private-writable-mappings", "mapped-cpu-tensors", "gpu-unified-memory"}, True),
        (machines.gb10, {"private-writable-mappings", "mapped-cpu-tensors", "gpu-unified-memory"}, True),
        (
            machines.wsl2,
            {"wsl2", "storage-9p", "no-direct-reads", "libraries-map-writable", "memory-less-than-gpu"},
            True,
        ),
        (
            machines.nfs,
            {"storage-network", "read-ahead-small", "cache-unknown", "libraries-map-writable"},
            False,
        ),
        (
            machines.container_8_gib,
            {
                "cgroup-limit",
                "model-exceeds-memory",
                "swap-short",
                "storage-overlay",
                "shm-small",
                "libraries-map-writable",
            },
            True,
        ),
        (machines.workstation, {"libraries-map-writable"}, False),
    ],
)
def test_known_machines(make: Callable[[], Facts], expected: set[str], degraded: bool) -> None:
    assert ids(make()) == expected
    assert examine(make()).degraded is degraded


class TestMachine:
    @staticmethod
    def changed(**changes: Any) -> Facts:
        facts = machines.workstation()
        assert facts.machine is not None
        return replace(facts, machine=replace(facts.machine, **changes))

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"room": machines.room(64 * GIB, 6 * GIB)}, "memory-low"),
            ({"overcommit": 2}, "overcommit-strict"),
            ({"memlock_bytes": 8 * MIB}, "memlock-small"),
            ({"hugepages": "never"}, "hugepages-never"),
            ({"swap": ()}, "swap-none"),
            ({"swappiness": 100}, "swappiness-high"),
            (
                {
                    "features": KernelFeatures(
                        cachestat=Ability.FORBIDDEN, dontcache=Ability.WORKS, io_uring=Ability.WORKS
                    )
                },
                "cachestat-missing",
            ),
            ({"room": machines.room(64 * GIB, 60 * GIB, group=Room("/a", 1, 32 * GIB, 30 * GIB))}, "cgroup-limit"),
        ],
    )
    def test_one_thing_at_a_time(self, changes: dict[str, Any], name: str) -> None:
        before = ids(machines.workstation())
        assert name not in before
        found = ids(self.changed(**changes))
        assert name in found
        assert found - before <= {name, "model-exceeds-memory", "swap-short"}

    def test_memory_that_just_suffices_is_not_low(self) -> None:
        assert "memory-low" not in ids(self.changed(room=machines.room(64 * GIB, 7 * GIB)))

    @pytest.mark.parametrize(
        ("area", "expected"),
        [
            ({"rotating": True}, {"swap-rotating"}),
            ({"kind": "zram", "name": "/dev/zram0"}, {"swap-zram"}),
            ({"used_bytes": 7 * GIB}, {"swap-full"}),
            ({"used_bytes": 6 * GIB}, set()),
        ],
    )
    def test_swap(self, area: dict[str, Any], expected: set[str]) -> None:
        known = SwapDevice(
            name="/dev/sda3", kind="partition", size_bytes=8 * GIB, used_bytes=0, priority=-2, rotating=False
        )
        found = ids(self.changed(swap=(replace(known, **area),)))
        assert {name for name in found if name.startswith("swap")} == expected

    def test_a_high_swappiness_suits_zram(self) -> None:
        zram = SwapDevice(name="/dev/zram0", kind="zram", size_bytes=GIB, used_bytes=0, priority=100, rotating=False)
        assert "swappiness-high" not in ids(self.changed(swap=(zram,), swappiness=180))

    def test_the_swap_that_a_model_needs_is_named(self) -> None:
        finding = one(machines.two_7900_xtx(), "swap-short")
        # 37 - 26 - 2 GiB.
        assert "9.00 GiB more swap" in finding.text
        # There is a /swapfile already.
        assert "fallocate -l 9G /swapfile2 " in finding.mend
        assert "/swapfile " not in finding.mend

    @pytest.mark.parametrize(
        ("group", "container", "words"),
        [
            (Room("/docker/abc", 2, 8 * GIB, 7 * GIB), "docker", "docker update --memory=16g abc"),
            (Room("/user.slice/a.scope", 2, 8 * GIB, 7 * GIB), "", "systemctl set-property a.scope MemoryMax=16G"),
            (Room("/jobs/one", 1, 8 * GIB, 7 * GIB), "", "/sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes"),
            (Room("/jobs/one", 2, 8 * GIB, 7 * GIB), "", "/sys/fs/cgroup/jobs/one/memory.max"),
        ],
    )
    def test_who_can_raise_the_limit_of_a_group(self, group: Room, container: str, words: str) -> None:
        facts = self.changed(room=machines.room(64 * GIB, 60 * GIB, group=group), container=container)
        assert words in one(facts, "cgroup-limit").mend

    def test_a_container_is_not_told_to_make_swap(self) -> None:
        assert "swap-none" not in ids(machines.container_8_gib())


class TestPlace:
    @staticmethod
    def changed(**changes: Any) -> Facts:
        return replace(machines.workstation(), place=machines.place(13, **changes))

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            (
                {"mount": Mount("0:5", "/m", "fuse.sshfs", "host:/m")},
                {"storage-fuse", "storage-network", "read-ahead-small"},
            ),
            ({"mount": Mount("0:5", "/m", "fuseblk", "/dev/sdb1")}, {"storage-fuse", "read-ahead-small"}),
            ({"mount": Mount("0:5", "/m", "cifs", "//host/m"), "read_ahead_bytes": 4 * MIB}, {"storage-network"}),
            ({"mount": Mount("0:5", "/m", "virtiofs", "models"), "read_ahead_bytes": 4 * MIB}, set()),
            (
                {
                    "mount": Mount("0:5", "/fast", "tmpfs", "tmpfs"),
                    "direct": DirectAccess(False, 0, 0, "tmpfs takes none"),
                },
                {"storage-memory"},
            ),
            ({"direct": DirectAccess(False, 0, 0, "it refuses")}, {"no-direct-reads"}),
            ({"may_see_cache": False}, {"cache-unknown"}),
            ({"problem": "/models: No such file or directory", "file": None}, {"place-unreadable"}),
        ],
    )
    def test_file_systems(self, changes: dict[str, Any], expected: set[str]) -> None:
        assert ids(self.changed(**changes)) - {"libraries-map-writable"} == expected

    @pytest.mark.parametrize(
        ("disk", "expected"),
        [
            (BlockDevice(name="sda", kind="scsi", rotating=True), {"storage-rotating"}),
            (BlockDevice(name="vda", kind="virtio", rotating=True), set()),
            (BlockDevice(name="sda", kind="scsi", rotating=False, usb=True), {"storage-usb"}),
            (
                BlockDevice(
                    name="dm-0",
                    kind="dm",
                    detail="crypt",
                    members=(
                        BlockDevice(
                            name="md0", kind="md", detail="raid0",
                            members=(BlockDevice(name="sda", kind="scsi", rotating=True),),
                        ),
                    ),
                ),
                {"storage-encrypted", "storage-raid", "storage-rotating"},
            ),
            (BlockDevice(name="nvme0n1", kind="nvme", link=machines.link(8.0, 2, 16.0, 4)), {"drive-link-narrow"}),
        ],
    )  # fmt: skip
    def test_disks(self, disk: BlockDevice, expected: set[str]) -> None:
        assert ids(self.changed(disk=disk)) - {"libraries-map-writable"} == expected

    def test_speeds(self) -> None:
        slow = replace(machines.workstation(), speeds=Speeds(storage={"direct": 0.3, "buffered": 0.1, "cached": 9.0}))
        assert {"storage-slow", "buffered-slow"} <= ids(slow)
        assert "13.0 GiB take 47 s" in one(slow, "storage-slow").text
        assert "storage-slow" not in ids(replace(slow, speeds=Speeds(storage={"cached": 0.1})))

    def test_paths_in_commands_are_quoted(self) -> None:
        facts = self.changed(path="/m/a b; rm -rf ~", mount=Mount("0:5", "/m", "9p", "C:"))
        assert "'/m/a b; rm -rf ~'" in one(facts, "storage-9p").mend


class TestDevices:
    @staticmethod
    def carded(**changes: Any) -> Facts:
        facts = machines.workstation()
        return replace(facts, cards=(replace(facts.cards[0], **changes),))

    @pytest.mark.parametrize(
        ("speed", "width", "expected"),
        [
            (16.0, 16, set()),
            (16.0, 8, {"gpu-link-narrow"}),
            (2.5, 16, {"gpu-link-speed"}),
            (8.0, 4, {"gpu-link-narrow"}),
        ],
    )
    def test_links(self, speed: float, width: int, expected: set[str]) -> None:
        found = ids(self.carded(link=machines.link(speed, width)))
        assert {name for name in found if name.startswith("gpu-link")} == expected

    def test_a_measured_link(self) -> None:
        facts = machines.workstation()
        assert facts.software.gpus is not None
        slow = replace(facts.software, gpus=(replace(facts.software.gpus[0], link_speed=9.0),))
        finding = one(replace(facts, software=slow), "gpu-link-measured")
        assert "9.0 GB/s of the 31.5" in finding.text

    def test_cards_without_driver_or_runtime(self) -> None:
        assert "gpu-without-driver" in ids(self.carded(driver=""))
        facts = machines.workstation()
        without = replace(facts, software=machines.software("cpu", ()))
        assert "cu128" in one(without, "gpu-not-usable").mend
        # A torch that did not answer says nothing about what it can use.
        assert "gpu-not-usable" not in ids(replace(facts, software=machines.software("cuda", None)))
        # The small unit of an ordinary processor is not worth a torch of its own.
        unit = GraphicsCard(
            address="0000:0b:00.0", vendor=AMD, device=0x164E, driver="amdgpu", shared_bytes=8 * GIB, unified=True
        )
        assert "gpu-not-usable" not in ids(replace(without, cards=(unit,)))

    def test_a_runtime_that_hangs_is_an_error(self) -> None:
        facts = replace(machines.two_7900_xtx(), software=machines.software("hip", None, hung="gpus"))
        assert one(facts, "gpu-hung").level is Level.ERROR
        # The bus still tells that this is AMD's.
        assert "private-writable-mappings" in ids(facts)

    @pytest.mark.parametrize("mapping", ["r--p", "r--s", "rw-s", "", None])
    def test_other_mappings_are_harmless(self, mapping: str | None) -> None:
        facts = machines.two_7900_xtx()
        software = replace(facts.software, libraries=(Library(name="safetensors", version="1.0", mapping=mapping),))
        assert "private-writable-mappings" not in ids(replace(facts, software=software))

    def test_a_small_amd_unit_beside_an_nvidia_card_does_not_matter(self) -> None:
        facts = machines.workstation()
        unit = GraphicsCard(
            address="0000:0b:00.0", vendor=AMD, device=0x164E, driver="amdgpu", shared_bytes=8 * GIB, unified=True
        )
        assert ids(replace(facts, cards=(*facts.cards, unit))) == {"libraries-map-writable"}

    @pytest.mark.parametrize(
        ("release", "bug"),
        [
            ("7.0.0-28-generic", True),
            ("7.0.0-29-generic", True),
            ("7.0.0-30-generic", False),
            ("7.0.0-14-generic", False),
            ("7.0.12-200.fc44.x86_64", True),
            ("7.0.13-200.fc44.x86_64", False),
            ("6.8.0-28-generic", False),
            ("", False),
        ],
    )
    def test_the_kernels_that_wait_a_second_per_fault(self, release: str, bug: bool) -> None:
        assert has_fault_bug(release) is bug
        facts = machines.two_7900_xtx()
        assert facts.machine is not None
        on_it = replace(facts, machine=replace(facts.machine, release=release))
        assert ("amdgpu-fault-bug" in ids(on_it)) is bug
        nvidia = machines.workstation()
        assert nvidia.machine is not None
        assert "amdgpu-fault-bug" not in ids(replace(nvidia, machine=replace(nvidia.machine, release=release)))

    @pytest.mark.parametrize(("value", "found"), [("4194304", False), ("1024", True), ("many", True), (None, True)])
    def test_the_threshold_of_rocm(self, value: str | None, found: bool) -> None:
        environment = {} if value is None else {"GPU_PINNED_MIN_XFER_SIZE": value}
        facts = machines.two_7900_xtx()
        set_so = replace(facts, software=replace(facts.software, environment=environment))
        assert ("rocm-pinned-threshold" in ids(set_so)) is found


class TestSoftware:
    def test_what_is_missing(self) -> None:
        facts = replace(machines.workstation(), software=SoftwareFacts(engine="it was not built"), cards=())
        assert {"torch-missing", "native-engine-missing"} <= ids(facts)


def test_nothing_known_finds_nothing_and_fails_nowhere() -> None:
    assert ids(Facts()) == {"torch-missing"}


def test_a_check_that_fails_is_a_gap_and_hides_no_other() -> None:
    def broken(_: Facts) -> Iterator[Finding]:
        raise ZeroDivisionError("by zero")
        yield

    facts = replace(machines.workstation(), gaps=(Gap(what="the cards", why="no /sys"),))
    examination = examine(facts, (broken, *CHECKS))
    assert [gap.what for gap in examination.gaps] == ["the cards", "the check broken"]
    assert "ZeroDivisionError" in examination.gaps[1].why
    assert [finding.id for finding in examination.findings] == ["libraries-map-writable"]


def test_findings_come_with_the_worst_first() -> None:
    levels = [finding.level for finding in examine(machines.two_7900_xtx()).findings]
    order = [Level.ERROR, Level.WARNING, Level.ADVICE, Level.FACT]
    assert levels == sorted(levels, key=order.index)


def test_every_rule_says_everything_once() -> None:
    names = [rule.id for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule.when
        assert rule.why
        assert rule.mend
        assert not rule.why.endswith(".")


def test_every_rule_is_tried_in_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [rule.id for rule in RULES if f'"{rule.id}"' not in source] == []


def test_no_made_up_machine_names_a_command_with_an_open_place() -> None:
    makers = (machines.two_7900_xtx, machines.wsl2, machines.nfs, machines.strix_halo, machines.gb10)
    for make in (*makers, machines.container_8_gib, machines.workstation):
        for finding in examine(make()).findings:
            assert "{" not in finding.mend, finding


def test_vendors_are_told_apart() -> None:
    assert machines.two_7900_xtx().amd
    assert not machines.gb10().amd
    assert machines.gb10().unified
    assert not machines.two_7900_xtx().unified
    assert machines.strix_halo().gpu_bytes == 0
    assert machines.workstation().gpu_bytes == 24 * GIB
    assert replace(machines.workstation(), software=SoftwareFacts()).has_gpu
