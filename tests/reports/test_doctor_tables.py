"""Doctor's report as text, from made-up facts."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from weightlift.health.examination import examine
from weightlift.health.facts import Facts, Gap, Speeds
from weightlift.health.recommend import recommend
from weightlift.host.block import BlockDevice
from weightlift.reports.console import show
from weightlift.reports.doctor import doctor_tables
from weightlift.testing import machines

if TYPE_CHECKING:
    from collections.abc import Callable


def plain(facts: Facts) -> str:
    stream = io.StringIO()
    show(stream, *doctor_tables(facts, examine(facts), recommend(facts), 2.5))
    return stream.getvalue()


def fact(facts: Facts, label: str) -> str:
    lines = [line for line in plain(facts).splitlines() if line.startswith(f"{label}  ")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix(label).strip()


@pytest.mark.parametrize(
    "make",
    [
        machines.two_7900_xtx,
        machines.strix_halo,
        machines.gb10,
        machines.wsl2,
        machines.nfs,
        machines.container_8_gib,
        machines.workstation,
        Facts,
    ],
)
def test_everything_found_is_printed_once_and_in_order(make: Callable[[], Facts]) -> None:
    facts = make()
    printed = plain(facts)
    examination = examine(facts)
    places = []
    for finding in examination.findings:
        headline = f"{finding.text}  [{finding.id}]"
        assert printed.count(headline) == 1
        assert f"mend: {finding.mend}" in printed
        places.append(printed.index(headline))
    assert places == sorted(places)
    assert recommend(facts).command in printed
    for tool in recommend(facts).tools:
        assert tool.option in printed
    assert printed.splitlines()[-1] == (
        f"this machine is {'degraded: see the warnings above' if examination.degraded else 'in order'} (2.5 s)"
    )


def test_facts_in_words() -> None:
    facts = machines.workstation()
    assert (
        fact(facts, "memory       ") == "64.0 GiB in all, 56.0 GiB are available of the 64.0 GiB that the machine has"
    )
    assert fact(facts, "swap         ") == "/swapfile (file) 8.00 GiB, 0 B used, swappiness 60"
    assert fact(facts, "limits       ").startswith("overcommit 0, may lock any amount of memory")
    assert "PCI Express 16 of 16 lanes" in fact(facts, "card         ")
    assert fact(facts, "cuda:0       ").endswith("24.0 GiB, 23.0 GiB free, filled at 25.0 GB/s")
    assert "(maps rw-p)" in fact(facts, "software     ")
    assert fact(facts, "file system  ") == "ext4 on /dev/nvme0n1p2, mounted at /, reads 128 KiB ahead"
    assert fact(facts, "storage speed").startswith("direct 6.50 GB/s, buffered 5.00 GB/s")
    assert fact(facts, "memory speed ") == "copies 20.0 GB/s"


def test_layers_of_a_disk_and_paths_not_tried() -> None:
    disk = BlockDevice(
        name="dm-0", kind="dm", detail="crypt", members=(BlockDevice(name="sda", kind="scsi", rotating=True),)
    )
    facts = replace(
        machines.workstation(),
        place=machines.place(13, disk=disk),
        speeds=Speeds(notes={"direct": "it refuses"}),
    )
    assert fact(facts, "disk        ") == "dm-0, dm crypt, turning over (sda, scsi, turning)"
    assert fact(facts, "  not direct") == "it refuses"


def test_what_could_not_be_checked_is_said() -> None:
    facts = replace(machines.workstation(), gaps=(Gap(what="the drivers", why="no answer within 2 s"),))
    assert fact(facts, "not checked") == "the drivers: no answer within 2 s"


def test_unknown_stays_out() -> None:
    printed = plain(Facts())
    assert "None" not in printed
    assert "memory" not in printed.split("recommended")[0].replace("torch-missing", "")


def test_hostile_text_is_escaped() -> None:
    hostile = "a\x1b[31m\x07b"
    facts = replace(machines.workstation(), place=machines.place(13, path=hostile, problem=hostile))
    printed = plain(facts)
    assert "\x1b" not in printed
    assert "\x07" not in printed
