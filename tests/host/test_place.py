"""Mounts, disks and places from recorded trees, and this machine's own."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.host.block import block_device, block_device_named, read_ahead_of_mount
from weightlift.host.mounts import FileSystemClass, Mount, find_mount, read_mounts
from weightlift.host.place import place_facts
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Plant = Callable[[Mapping[str, str]], Path]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

DISKS = {
    "sys/dev/block/259:2": "-> ../../devices/pci0000:00/0000:00:01.1/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p2",
    "sys/devices/pci0000:00/0000:00:01.1/max_link_speed": "32.0 GT/s PCIe\n",
    "sys/devices/pci0000:00/0000:00:01.1/max_link_width": "4\n",
    "sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/current_link_speed": "8.0 GT/s PCIe\n",
    "sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/current_link_width": "2\n",
    "sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/max_link_speed": "16.0 GT/s PCIe\n",
    "sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/max_link_width": "4\n",
    "sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/nvme/nvme0/nvme0n1/size": "2048\n",
    "sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/nvme/nvme0/nvme0n1/queue/rotational": "0\n",
    "sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/nvme/nvme0/nvme0n1/queue/read_ahead_kb": "128\n",
    "sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/nvme/nvme0/nvme0n1/device/model": "Fast SSD \n",
    "sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p2/partition": "2\n",
    "sys/dev/block/253:0": "-> ../../devices/virtual/block/dm-0",
    "sys/devices/virtual/block/dm-0/dm/uuid": "CRYPT-LUKS2-abc-luks\n",
    "sys/devices/virtual/block/dm-0/slaves/md0": "-> ../../md0",
    "sys/devices/virtual/block/md0/md/level": "raid0\n",
    "sys/devices/virtual/block/md0/slaves/sda": "-> ../../../../usb1/1-1/sda",
    "sys/devices/virtual/block/md0/slaves/sdb": "-> ../../../../ata/sdb",
    "sys/devices/usb1/1-1/sda/queue/rotational": "1\n",
    "sys/devices/ata/sdb/queue/rotational": "0\n",
    "sys/dev/block/7:0": "-> ../../devices/virtual/block/loop0",
    "sys/devices/virtual/block/loop0/loop/backing_file": "/images/models.img\n",
    "sys/class/block/dm-0": "-> ../../devices/virtual/block/dm-0",
    "sys/class/bdi/0:51/read_ahead_kb": "128\n",
}


class TestMounts:
    @pytest.mark.parametrize(
        ("kind", "expected", "network"),
        [
            ("ext4", FileSystemClass.LOCAL, False),
            ("btrfs", FileSystemClass.LOCAL, False),
            ("nfs4", FileSystemClass.NETWORK, True),
            ("cifs", FileSystemClass.NETWORK, True),
            ("virtiofs", FileSystemClass.NETWORK, False),
            ("fuse.sshfs", FileSystemClass.FUSE, True),
            ("fuse.mergerfs", FileSystemClass.FUSE, False),
            ("fuseblk", FileSystemClass.FUSE, False),
            ("overlay", FileSystemClass.OVERLAY, False),
            ("9p", FileSystemClass.PLAN9, False),
            ("tmpfs", FileSystemClass.MEMORY, False),
        ],
    )
    def test_kinds(self, kind: str, expected: FileSystemClass, *, network: bool) -> None:
        mount = Mount("0:1", "/", kind, "x")
        assert (mount.file_system_class, mount.over_network) == (expected, network)

    def test_lines_with_optional_fields_escapes_and_nonsense(self) -> None:
        text = (
            "36 35 98:0 /mnt1 /mnt/a\\040b rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=continue\n"
            "nonsense\n"
            "37 35 0:51 / /m rw - nfs4 server:/a\\134b rw\n"
        )
        assert list(read_mounts(text)) == [
            Mount("98:0", "/mnt/a b", "ext3", "/dev/root", ("rw", "noatime", "rw", "errors=continue")),
            Mount("0:51", "/m", "nfs4", "server:/a\\b", ("rw", "rw")),
        ]

    @linux_only
    def test_among_bind_mounts_the_place_decides_and_later_ones_cover(self, tmp_path: Path) -> None:
        device = os.stat(tmp_path).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        table = tmp_path / "mountinfo"
        table.write_text(
            f"1 1 {number} / / rw - ext4 /dev/a rw\n"
            f"2 1 {number} /b {tmp_path} rw - ext4 /dev/b rw\n"
            f"3 1 {number} /c {tmp_path} rw - ext4 /dev/c rw\n"
            f"4 1 {number} / {tmp_path}/elsewhere rw - ext4 /dev/d rw\n"
        )
        found = find_mount(tmp_path, table)
        assert found is not None
        assert found.source == "/dev/c"

    def test_what_is_not_there_is_on_no_mount(self, tmp_path: Path) -> None:
        assert find_mount(tmp_path / "nothing") is None


class TestDisks:
    def test_a_partition_is_its_whole_disk(self, plant: Plant) -> None:
        disk = block_device("259:2", plant(DISKS))
        assert disk is not None
        assert (disk.name, disk.kind, disk.model, disk.size_bytes) == ("nvme0n1", "nvme", "Fast SSD", 1 * MIB)
        assert (disk.rotating, disk.turns, disk.read_ahead_bytes) == (False, False, 128 * KIB)
        assert disk.link is not None
        # The slot could do more than the drive; what counts is what both can.
        assert (disk.link.width, disk.link.width_max, disk.link.speed, disk.link.speed_max) == (2, 4, 8.0, 16.0)

    def test_layers_down_to_the_disks(self, plant: Plant) -> None:
        root = plant(DISKS)
        disk = block_device("253:0", root)
        assert disk is not None
        assert (disk.kind, disk.detail) == ("dm", "crypt")
        (raid,) = disk.members
        assert (raid.kind, raid.detail) == ("md", "raid0")
        assert [(part.name, part.usb, part.rotating) for part in disk.disks] == [
            ("sda", True, True),
            ("sdb", False, False),
        ]
        assert disk.turns
        assert block_device_named("/dev/mapper/../dm-0", root) == disk

    def test_a_loop_device_names_its_file(self, plant: Plant) -> None:
        disk = block_device("7:0", plant(DISKS))
        assert disk is not None
        assert (disk.kind, disk.detail, disk.link) == ("loop", "/images/models.img", None)

    def test_a_network_file_system_has_none_but_reads_ahead(self, plant: Plant) -> None:
        root = plant(DISKS)
        assert block_device("0:51", root) is None
        assert read_ahead_of_mount("0:51", root) == 128 * KIB
        assert read_ahead_of_mount("0:52", root) is None


class TestPlaces:
    @linux_only
    def test_the_largest_model_file_stands_for_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(bytes(8192))
        (tmp_path / "b.safetensors").write_bytes(bytes(4096))
        (tmp_path / "huge.log").write_bytes(bytes(65536))
        facts = place_facts(tmp_path)
        assert facts.file == str(tmp_path / "a.safetensors")
        assert (facts.file_bytes, facts.model_bytes, facts.problem) == (8192, 12288, "")
        assert facts.mount is not None
        assert facts.direct is not None
        assert facts.may_see_cache
        assert facts.device == os.stat(tmp_path).st_dev

    def test_what_cannot_be_looked_at_says_why(self, tmp_path: Path) -> None:
        assert "No such file" in place_facts(tmp_path / "nothing").problem
        assert "no file" in place_facts(tmp_path).problem

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
    def test_neither_file_nor_folder(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert "neither" in place_facts(tmp_path / "pipe").problem

    @linux_only
    def test_a_file_that_may_not_be_read(self, tmp_path: Path) -> None:
        file = tmp_path / "m.safetensors"
        file.write_bytes(b"x")
        file.chmod(0)
        if os.access(file, os.R_OK):
            pytest.skip("this user may read everything")
        assert "Permission denied" in place_facts(file).problem
