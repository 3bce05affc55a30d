"""Checks of swap: whether there is any, where it lies, and how much more a model would need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightlift.health.findings import Check, Finding, Level, Rule
from weightlift.units import GIB, align_up, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.health.facts import Facts

_FULL_SHARE: Final = 0.8
_EAGER: Final = 60
_SUGGESTED_BYTES: Final = 8 * GIB

SWAP_NONE = Rule(
    id="swap-none",
    level=Level.ADVICE,
    when="there is no swap",
    why="what other programs have written but do not use must stay in memory, and the first shortage ends in a killed "
    "program instead of a slow one",
    mend="`sudo fallocate -l {size} /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && "
    "sudo swapon /swapfile`",
)
SWAP_SHORT = Rule(
    id="swap-short",
    level=Level.ADVICE,
    when="memory and swap together cannot hold the model named in host memory",
    why="loading it to the CPU fails; the figure says what is missing",
    mend="add that much swap as under swap-none, or load it to a GPU, or map it: `--method mmap`",
)
SWAP_FULL = Rule(
    id="swap-full",
    level=Level.WARNING,
    when="more than four fifths of the swap are in use",
    why="there is nothing left to give way to a load",
    mend="close what uses memory, then `sudo swapoff -a && sudo swapon -a` to bring it back, or add swap",
)
SWAP_ROTATING = Rule(
    id="swap-rotating",
    level=Level.WARNING,
    when="swap lies on a disk that turns",
    why="a disk that swaps answers some hundred requests a second, which looks like a frozen machine",
    mend="move the swap to an SSD: `sudo swapoff {name}`, then as under swap-none",
)
SWAP_ZRAM = Rule(
    id="swap-zram",
    level=Level.ADVICE,
    when="all swap is compressed memory (zram)",
    why="it makes room by compressing, and model weights do not compress: weights that end up there take as much "
    "memory as before",
    mend="add swap on an SSD with a lower priority: `sudo swapon -p 0 /swapfile`",
)
SWAPPINESS_HIGH = Rule(
    id="swappiness-high",
    level=Level.ADVICE,
    when="vm.swappiness is above 60 and swap is not zram alone",
    why="while a model fills the page cache the kernel then prefers to swap programs out",
    mend="`sudo sysctl vm.swappiness=10`",
)

RULES: Final = (SWAP_NONE, SWAP_SHORT, SWAP_FULL, SWAP_ROTATING, SWAP_ZRAM, SWAPPINESS_HIGH)


def check_swap(facts: Facts) -> Iterator[Finding]:
    """Whether there is swap, and of which kind."""
    machine = facts.machine
    if machine is None or machine.swap is None:
        return
    if not machine.swap:
        if not machine.container:
            yield SWAP_NONE.found("there is no swap", _make_swap(facts, max(_missing(facts), _SUGGESTED_BYTES)))
        return
    total = sum(area.size_bytes for area in machine.swap)
    used = sum(area.used_bytes for area in machine.swap)
    if used > _FULL_SHARE * total:
        yield SWAP_FULL.found(f"{format_bytes(used)} of {format_bytes(total)} of swap are in use")
    for area in machine.swap:
        if area.rotating:
            yield SWAP_ROTATING.found(
                f"{area.name} ({format_bytes(area.size_bytes)}) lies on a disk that turns",
                SWAP_ROTATING.mend.replace("{name}", area.name),
            )
    zram_only = all(area.kind == "zram" for area in machine.swap)
    if zram_only:
        yield SWAP_ZRAM.found(f"{format_bytes(total)} of swap, all of it zram")
    elif machine.swappiness is not None and machine.swappiness > _EAGER:
        yield SWAPPINESS_HIGH.found(f"vm.swappiness is {machine.swappiness}")


def check_swap_for_model(facts: Facts) -> Iterator[Finding]:
    """How much more swap the model named would need."""
    missing = _missing(facts)
    machine, place = facts.machine, facts.place
    if not missing or machine is None or machine.room is None or place is None:
        return
    have = f"{format_bytes(machine.room.swap_free_bytes)} of swap are free" if machine.swap else "there is no swap"
    yield SWAP_SHORT.found(
        f"the model has {format_bytes(place.model_bytes)}, {machine.room.sentence} and {have}: "
        f"{format_bytes(missing)} more swap would be needed to hold it in host memory",
        f"{_make_swap(facts, missing)}; or load it to a GPU, or `--method mmap`",
    )


def _missing(facts: Facts) -> int:
    """How much more swap the model named wants, if it is to be held in host memory."""
    room = facts.machine.room if facts.machine else None
    if room is None or facts.place is None:
        return 0
    return max(0, facts.place.model_bytes - room.available_bytes - room.swap_free_bytes)


def _make_swap(facts: Facts, nbytes: int) -> str:
    """The commands that add a swap file of a size, under a name that no other one has."""
    taken = {area.name for area in (facts.machine.swap if facts.machine else None) or ()}
    name, number = "/swapfile", 1
    while name in taken:
        number += 1
        name = f"/swapfile{number}"
    size = f"{align_up(nbytes, GIB) // GIB}G"
    return SWAP_NONE.mend.replace("{size}", size).replace("/swapfile", name)


CHECKS: Final[tuple[Check, ...]] = (check_swap, check_swap_for_model)
