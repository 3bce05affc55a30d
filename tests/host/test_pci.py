"""Graphics cards and their links from recorded trees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from weightlift.host.pci import AMD, NVIDIA, DriverFacts, driver_facts, graphics_cards
from weightlift.units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Plant = Callable[[Mapping[str, str]], Path]

PORT = "sys/devices/pci0000:00/0000:00:01.0"
UPSTREAM = f"{PORT}/0000:01:00.0"
DOWNSTREAM = f"{UPSTREAM}/0000:02:00.0"
CARD = f"{DOWNSTREAM}/0000:03:00.0"


def linked(folder: str, speed: float, width: int, speed_max: float, width_max: int) -> dict[str, str]:
    return {
        f"{folder}/current_link_speed": f"{speed} GT/s PCIe\n",
        f"{folder}/current_link_width": f"{width}\n",
        f"{folder}/max_link_speed": f"{speed_max} GT/s PCIe\n",
        f"{folder}/max_link_width": f"{width_max}\n",
    }


# A Radeon behind the switch that it brings along, in a slot of four lanes: its own entry shows a full link.
RADEON = {
    f"{CARD}/class": "0x030000\n",
    f"{CARD}/vendor": "0x1002\n",
    f"{CARD}/device": "0x744c\n",
    f"{CARD}/driver": "-> ../../../../../../bus/pci/drivers/amdgpu",
    f"{CARD}/mem_info_vram_total": f"{24 * GIB}\n",
    f"{CARD}/mem_info_gtt_total": f"{16 * GIB}\n",
    "sys/bus/pci/drivers/amdgpu/module": "",
    **linked(PORT, 8.0, 4, 8.0, 16),
    **linked(UPSTREAM, 8.0, 4, 16.0, 16),
    **linked(DOWNSTREAM, 16.0, 16, 16.0, 16),
    **linked(CARD, 16.0, 16, 16.0, 16),
}
RADEON["sys/bus/pci/devices/0000:03:00.0"] = "-> ../../../devices/" + CARD.removeprefix("sys/devices/")


def test_the_narrowest_link_counts_not_the_cards_own(plant: Plant) -> None:
    (card,) = graphics_cards(plant(RADEON))
    assert (card.address, card.vendor, card.maker, card.driver) == ("0000:03:00.0", AMD, "AMD", "amdgpu")
    assert (card.memory_bytes, card.shared_bytes, card.unified) == (24 * GIB, 16 * GIB, False)
    assert card.link is not None
    assert (card.link.address, card.link.width, card.link.width_max) == ("0000:01:00.0", 4, 16)
    assert (card.link.speed, card.link.speed_max) == (8.0, 8.0)
    assert card.link.gigabytes_per_second == pytest.approx(3.94, abs=0.01)
    assert card.link.gigabytes_per_second_max == pytest.approx(15.75, abs=0.01)


@pytest.mark.parametrize(
    ("vendor", "device", "unified"),
    [("0x1002", "0x1586", True), ("0x1002", "0x744c", False), ("0x10de", "0x2e12", True), ("0x10de", "0x2330", False)],
)
def test_memory_shared_with_the_machine(plant: Plant, vendor: str, device: str, *, unified: bool) -> None:
    (card,) = graphics_cards(plant(RADEON | {f"{CARD}/vendor": vendor, f"{CARD}/device": device}))
    assert card.unified is unified
    assert card.vendor in {AMD, NVIDIA}


@pytest.mark.parametrize(
    "changes",
    [
        {f"{UPSTREAM}/current_link_speed": "Unknown\n", f"{CARD}/current_link_speed": "Unknown\n"},
        {f"{UPSTREAM}/current_link_width": "0\n", f"{CARD}/current_link_width": "255\n"},
    ],
)
def test_a_link_that_does_not_tell_is_left_out(plant: Plant, changes: dict[str, str]) -> None:
    (card,) = graphics_cards(plant(RADEON | changes))
    assert card.link is not None
    assert card.link.address == "0000:02:00.0"


def test_a_card_of_a_virtual_machine_has_no_link(plant: Plant) -> None:
    tree = {
        "sys/bus/pci/devices/0000:00:05.0/class": "0x030200\n",
        "sys/bus/pci/devices/0000:00:05.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:00:05.0/device": "0x2330\n",
    }
    (card,) = graphics_cards(plant(tree))
    assert (card.link, card.driver, card.memory_bytes) == (None, "", None)


@pytest.mark.parametrize(
    "changes", [{"class": "0x010802"}, {"vendor": "0x1a03"}, {"class": "nonsense"}, {"device": ""}]
)
def test_other_devices_are_left_out(plant: Plant, changes: dict[str, str]) -> None:
    assert graphics_cards(plant(RADEON | {f"{CARD}/{name}": text for name, text in changes.items()})) == ()


def test_accelerators_count(plant: Plant) -> None:
    assert len(graphics_cards(plant(RADEON | {f"{CARD}/class": "0x120000\n"}))) == 1


def test_versions(plant: Plant) -> None:
    tree = {
        "opt/rocm/.info/version": "6.0.0-91\n",
        "sys/module/amdgpu/version": "6.3.6\n",
        "sys/module/nvidia/version": "580.95.05\n",
    }
    assert driver_facts(plant(tree)) == DriverFacts(amdgpu="6.3.6", nvidia="580.95.05", rocm="6.0.0")


def test_nothing_there(plant: Plant) -> None:
    root = plant({})
    assert graphics_cards(root) == ()
    assert driver_facts(root) == DriverFacts()
