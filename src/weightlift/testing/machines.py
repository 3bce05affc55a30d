"""Made-up machines for tests and documentation of doctor: the ones that people have trouble with, and healthy ones.

Each is a :class:`~weightlift.health.facts.Facts` value as gathering it there would give; nothing is asked of the
machine that runs the tests.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from weightlift.health.facts import Facts, Gpu, Library, SoftwareFacts, Speeds
from weightlift.host.block import BlockDevice
from weightlift.host.machine import UNLIMITED, Ability, KernelFeatures, MachineFacts, SwapDevice
from weightlift.host.memory import Headroom, Room
from weightlift.host.mounts import Mount
from weightlift.host.pci import AMD, NVIDIA, DriverFacts, GraphicsCard, PciLink
from weightlift.host.place import PlaceFacts
from weightlift.host.storage import DirectAccess
from weightlift.units import GIB, KIB, MIB, format_bytes

_WORKS: Final = KernelFeatures(cachestat=Ability.WORKS, dontcache=Ability.WORKS, io_uring=Ability.WORKS)
_DIRECT: Final = DirectAccess(True, 4, 512, "a direct trial read worked (alignment: buffer 4, offset 512)")
_REFUSED: Final = DirectAccess(False, 0, 0, "the file system 9p refuses to open the file for direct reads (EINVAL)")


def room(total_bytes: int, available_bytes: int, *, swap_bytes: int = 0, group: Room | None = None) -> Headroom:
    """The headroom of a machine, or of a control group on it."""
    rooms = (Room("", 0, total_bytes, available_bytes), *([group] if group else []))
    tightest = group or rooms[0]
    where = f"the control group {group.group} allows" if group else "the machine has"
    left, limit = format_bytes(tightest.available_bytes), format_bytes(tightest.limit_bytes)
    sentence = f"{left} are available of the {limit} that {where}"
    return Headroom(
        tightest.available_bytes,
        "cgroup" if group else "machine",
        tightest.limit_bytes,
        swap_bytes,
        sentence,
        rooms,
    )


def machine(total_gib: int, available_gib: int, *, swap_gib: int = 8, **changes: Any) -> MachineFacts:
    """A machine with memory and swap on an SSD; other facts by name."""
    swap = (
        SwapDevice(name="/swapfile", kind="file", size_bytes=swap_gib * GIB, used_bytes=0, priority=-2, rotating=False),
    )
    facts = MachineFacts(
        system="Linux",
        release="6.12.10-generic",
        processors=16,
        room=room(total_gib * GIB, available_gib * GIB, swap_bytes=swap_gib * GIB),
        swap=swap if swap_gib else (),
        swappiness=60,
        overcommit=0,
        commit_left_bytes=total_gib * GIB,
        memlock_bytes=UNLIMITED,
        shared_bytes=total_gib * GIB // 2,
        hugepages="madvise",
        features=_WORKS,
    )
    return replace(facts, **changes)


def place(model_gib: int, **changes: Any) -> PlaceFacts:
    """A model in one file on an ext4 file system on an NVMe drive; other facts by name."""
    link = PciLink(address="0000:01:00.0", speed=16.0, width=4, speed_max=16.0, width_max=4)
    facts = PlaceFacts(
        path="/models/model",
        file="/models/model/model.safetensors",
        file_bytes=model_gib * GIB,
        model_bytes=model_gib * GIB,
        device=1,
        mount=Mount("259:2", "/", "ext4", "/dev/nvme0n1p2", ("rw",)),
        disk=BlockDevice(name="nvme0n1", kind="nvme", model="Fast SSD", rotating=False, link=link),
        read_ahead_bytes=128 * KIB,
        direct=_DIRECT,
        dontcache=True,
        may_see_cache=True,
        cached_bytes=0,
    )
    return replace(facts, **changes)


def software(backend: str, gpus: tuple[Gpu, ...] | None, *, mapping: str = "rw-p", **changes: Any) -> SoftwareFacts:
    """Torch and safetensors that map checkpoints in one way; other facts by name."""
    libraries = (
        Library(name="torch", version="2.9.0", mapping=mapping),
        Library(name="safetensors", version="0.7.0", mapping=mapping),
    )
    return replace(SoftwareFacts(libraries=libraries, backend=backend, gpus=gpus), **changes)


def link(speed: float, width: int, speed_max: float = 16.0, width_max: int = 16) -> PciLink:
    """A link above a card at 0000:03:00.0."""
    return PciLink(address="0000:03:00.0", speed=speed, width=width, speed_max=speed_max, width_max=width_max)


def two_7900_xtx() -> Facts:
    """Two 7900 XTX under ROCm 6.0 with 32 GB, and a 70B model of 37 GiB: the machine of the first reports."""
    cards = tuple(
        GraphicsCard(
            address=f"0000:{bus}:00.0", vendor=AMD, device=0x744C, driver="amdgpu", memory_bytes=24 * GIB, link=found
        )
        for bus, found in (("03", link(16.0, 16)), ("0c", link(16.0, 4, 16.0, 4)))
    )
    gpus = tuple(
        Gpu(
            name=f"cuda:{number}",
            model="Radeon RX 7900 XTX",
            total_bytes=24 * GIB,
            free_bytes=23 * GIB,
            pci_address=card.address,
            architecture="gfx1100",
        )
        for number, card in enumerate(cards)
    )
    return Facts(
        machine=machine(32, 26, swap_gib=2),
        cards=cards,
        drivers=DriverFacts(amdgpu="6.3.6", rocm="6.0.0"),
        software=software("hip", gpus, backend_version="6.0.32830"),
        place=place(37),
    )


def strix_halo() -> Facts:
    """A Ryzen AI Max with 128 GB that CPU and GPU share, and a model of 60 GiB."""
    card = GraphicsCard(
        address="0000:c4:00.0",
        vendor=AMD,
        device=0x1586,
        driver="amdgpu",
        memory_bytes=512 * MIB,
        shared_bytes=120 * GIB,
        unified=True,
    )
    gpu = Gpu(
        name="cuda:0",
        model="Radeon 8060S Graphics",
        total_bytes=120 * GIB,
        free_bytes=118 * GIB,
        pci_address=card.address,
        architecture="gfx1151",
        integrated=True,
    )
    return Facts(
        machine=machine(128, 118),
        cards=(card,),
        drivers=DriverFacts(rocm="7.1.0"),
        software=software("hip", (gpu,), backend_version="7.1", environment={"GPU_PINNED_MIN_XFER_SIZE": str(4 << 20)}),
        place=place(60),
    )


def gb10() -> Facts:
    """A DGX Spark: NVIDIA's GB10 with 128 GB that CPU and GPU share."""
    card = GraphicsCard(address="000f:01:00.0", vendor=NVIDIA, device=0x2E12, driver="nvidia", unified=True)
    gpu = Gpu(
        name="cuda:0",
        model="NVIDIA GB10",
        total_bytes=120 * GIB,
        free_bytes=110 * GIB,
        pci_address=card.address,
        integrated=True,
    )
    return Facts(
        machine=machine(120, 112, swap_gib=16),
        cards=(card,),
        drivers=DriverFacts(nvidia="580.95.05"),
        software=software("cuda", (gpu,), backend_version="13.0"),
        place=place(30),
    )


def wsl2() -> Facts:
    """WSL2 on a desktop with an NVIDIA card, the model on the Windows drive."""
    gpu = Gpu(name="cuda:0", model="NVIDIA GeForce RTX 4090", total_bytes=24 * GIB, free_bytes=22 * GIB)
    return Facts(
        machine=machine(16, 14, swap_gib=4, release="6.6.87.2-microsoft-standard-WSL2", wsl2=True),
        software=software("cuda", (gpu,), backend_version="12.8"),
        place=place(
            8,
            path="/mnt/c/models/model",
            mount=Mount("0:70", "/mnt/c", "9p", "C:\\", ("rw", "aname=drvfs")),
            disk=None,
            direct=_REFUSED,
            dontcache=False,
        ),
    )


def nfs() -> Facts:
    """A server that reads models of another user over NFS with a small read-ahead."""
    gpu = Gpu(
        name="cuda:0",
        model="NVIDIA H100 80GB HBM3",
        total_bytes=80 * GIB,
        free_bytes=79 * GIB,
        pci_address="0000:03:00.0",
        link_speed=52.0,
    )
    card = GraphicsCard(
        address="0000:03:00.0", vendor=NVIDIA, device=0x2330, driver="nvidia", link=link(32.0, 16, 32.0, 16)
    )
    return Facts(
        machine=machine(1024, 990),
        cards=(card,),
        software=software("cuda", (gpu,), backend_version="12.8"),
        place=place(
            130,
            mount=Mount("0:51", "/models", "nfs4", "server:/export/models", ("rw", "vers=4.2")),
            disk=None,
            may_see_cache=False,
            cached_bytes=None,
        ),
        speeds=Speeds(storage={"direct": 1.1, "buffered": 0.9}, memory_copy=40.0),
    )


def container_8_gib() -> Facts:
    """A container that may use 8 GB of a large machine, with its model in the image and little shared memory."""
    group = Room("/docker/abc", 2, 8 * GIB, 7 * GIB)
    return Facts(
        machine=machine(
            256,
            200,
            swap_gib=0,
            container="docker",
            room=room(256 * GIB, 200 * GIB, group=group),
            shared_bytes=64 * MIB,
        ),
        software=software("cpu", (), backend_version=""),
        place=place(
            13, mount=Mount("0:60", "/", "overlay", "overlay", ("rw", "lowerdir=/a:/b")), disk=None, direct=_DIRECT
        ),
    )


def workstation() -> Facts:
    """A healthy workstation: 64 GB, a fast drive, an NVIDIA card with its whole link."""
    card = GraphicsCard(
        address="0000:03:00.0",
        vendor=NVIDIA,
        device=0x2684,
        driver="nvidia",
        link=link(16.0, 16),
    )
    gpu = Gpu(
        name="cuda:0",
        model="NVIDIA GeForce RTX 4090",
        total_bytes=24 * GIB,
        free_bytes=23 * GIB,
        pci_address=card.address,
        link_speed=25.0,
    )
    return Facts(
        machine=machine(64, 56),
        cards=(card,),
        drivers=DriverFacts(nvidia="570.86"),
        software=software("cuda", (gpu,), backend_version="12.8"),
        place=place(13),
        speeds=Speeds(storage={"direct": 6.5, "buffered": 5.0, "mmap": 3.0, "cached": 12.0}, memory_copy=20.0),
    )
