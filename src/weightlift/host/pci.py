"""Graphics cards and PCI Express links as ``/sys`` describes them, without any driver's library.

Owns the reading of ``/sys/bus/pci`` and of the few files where drivers tell their version. Touches no card, so nothing
here can hang. The root of the file system is a parameter, so that a recorded tree can be read.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightlift.host.cgroup import read_text

ROOT: Final = Path("/")
AMD: Final = 0x1002
NVIDIA: Final = 0x10DE
INTEL: Final = 0x8086
_VENDORS: Final = {AMD: "AMD", NVIDIA: "NVIDIA", INTEL: "Intel"}

_ADDRESS: Final = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_DISPLAY_CLASS: Final = 0x03
_ACCELERATOR_CLASS: Final = 0x12
_WIDTHS_KNOWN: Final = range(1, 33)

AMD_APUS: Final = frozenset(
    (
        *(0x15DD, 0x15D8, 0x1636, 0x1638, 0x164C, 0x163F, 0x1681, 0x164D, 0x164E, 0x1506, 0x15BF, 0x15C8),
        *(0x1900, 0x1901, 0x150E, 0x1586, 0x1114, 0x13C0),
    )
)
"""Graphics inside AMD's processors, which use the machine's own memory, Raven to Strix Halo (0x1586); from the table of
``amdgpu_drv.c`` and the PCI ID repository."""

NVIDIA_UNIFIED: Final = range(0x2E00, 0x2E40)
"""GB10, whose memory is the machine's; the range that NVIDIA's own kernel patches reserve for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PciLink:
    """One PCI Express link: what is in use, and what both of its ends could do.

    Attributes:
        address: of the device at its lower end.
        speed: in use, in 10^9 transfers a second per lane.
        width: lanes in use.
        speed_max: what both ends can do.
        width_max: what both ends have.
    """

    address: str
    speed: float
    width: int
    speed_max: float
    width_max: int

    @property
    def gigabytes_per_second(self) -> float:
        """What the lanes in use carry, encoding taken off, in 10^9 bytes a second; copies reach about 85 % of it."""
        return _rate(self.speed, self.width)

    @property
    def gigabytes_per_second_max(self) -> float:
        """The same if all lanes ran at full speed."""
        return _rate(self.speed_max, self.width_max)


def _rate(speed: float, width: int) -> float:
    # Up to 5 GT/s ten bits carry a byte; after that 130 carry 16.
    return speed * width * (1 / 10 if speed <= 5.0 else 16 / 130)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphicsCard:
    """One graphics card or accelerator.

    Attributes:
        address: its place, like ``0000:03:00.0``.
        vendor: number of its maker.
        device: number of its model.
        driver: the kernel's driver that has taken it; empty if none has.
        memory_bytes: its own memory, where the driver tells.
        shared_bytes: host memory that it may use as its own, where the driver tells.
        unified: its memory is the machine's.
        link: the narrowest link on the way to it.
    """

    address: str
    vendor: int
    device: int
    driver: str = ""
    memory_bytes: int | None = None
    shared_bytes: int | None = None
    unified: bool = False
    link: PciLink | None = None

    @property
    def maker(self) -> str:
        """The maker's name, or its number."""
        return _VENDORS.get(self.vendor, f"{self.vendor:04x}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFacts:
    """Versions of drivers and of ROCm, empty where there is none.

    Attributes:
        amdgpu: of AMD's driver where it is not the kernel's own.
        nvidia: of NVIDIA's driver.
        rocm: of the ROCm installation under ``/opt/rocm``.
    """

    amdgpu: str = ""
    nvidia: str = ""
    rocm: str = ""


def graphics_cards(root: Path = ROOT) -> tuple[GraphicsCard, ...]:
    """Every graphics card and accelerator that ``/sys`` lists, by address."""
    folder = root / "sys/bus/pci/devices"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    cards = (_card(Path(os.path.realpath(folder / name))) for name in names)
    return tuple(card for card in cards if card is not None)


def _card(folder: Path) -> GraphicsCard | None:
    kind, vendor, device = (_hex(folder / name) for name in ("class", "vendor", "device"))
    if kind is None or vendor is None or device is None or kind >> 16 not in {_DISPLAY_CLASS, _ACCELERATOR_CLASS}:
        return None
    if vendor not in _VENDORS:
        # Emulated cards and the ones that servers are managed through.
        return None
    driver = folder / "driver"
    return GraphicsCard(
        address=folder.name,
        vendor=vendor,
        device=device,
        driver=os.path.basename(os.path.realpath(driver)) if driver.exists() else "",
        memory_bytes=_number(folder / "mem_info_vram_total"),
        shared_bytes=_number(folder / "mem_info_gtt_total"),
        unified=(vendor == AMD and device in AMD_APUS) or (vendor == NVIDIA and device in NVIDIA_UNIFIED),
        link=narrowest_link(folder),
    )


def narrowest_link(folder: Path) -> PciLink | None:
    """The link that carries least on the way from the processor to a device.

    Many cards hide a switch, so that their own entry always shows a full link: every bridge above is looked at.

    Args:
        folder: the device's own folder below ``/sys/devices``, links resolved; anything below it will do.
    """
    parts = [Path(*folder.parts[: depth + 1]) for depth, part in enumerate(folder.parts) if _ADDRESS.fullmatch(part)]
    links = [link for above, below in itertools.pairwise(parts) if (link := _link(above, below)) is not None]
    return min(links, key=lambda link: link.gigabytes_per_second, default=None)


def _link(above: Path, below: Path) -> PciLink | None:
    speed, width = _speed(below / "current_link_speed"), _width(below / "current_link_width")
    speeds = [found for end in (above, below) if (found := _speed(end / "max_link_speed")) is not None]
    widths = [found for end in (above, below) if (found := _width(end / "max_link_width")) is not None]
    if speed is None or width is None or not speeds or not widths:
        return None
    return PciLink(address=below.name, speed=speed, width=width, speed_max=min(speeds), width_max=min(widths))


def _speed(path: Path) -> float | None:
    found = re.match(r"([0-9.]+) GT/s", read_text(path) or "")
    return float(found[1]) if found else None


def _width(path: Path) -> int | None:
    # Devices without a link say 0 or 255.
    width = _number(path)
    return width if width in _WIDTHS_KNOWN else None


def _hex(path: Path) -> int | None:
    try:
        return int(read_text(path) or "", 16)
    except ValueError:
        return None


def _number(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if text is not None and text.isdecimal() else None


def driver_facts(root: Path = ROOT) -> DriverFacts:
    """Versions of the GPU drivers and of ROCm, from the files where they leave them."""
    rocm = (read_text(root / "opt/rocm/.info/version") or "").split("-", 1)[0]
    return DriverFacts(
        amdgpu=read_text(root / "sys/module/amdgpu/version") or "",
        nvidia=read_text(root / "sys/module/nvidia/version") or "",
        rocm=rocm,
    )
