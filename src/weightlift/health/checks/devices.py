"""Checks of GPUs: links, drivers, mappings that turn into memory, memory shared with the machine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from weightlift.health.findings import Check, Finding, Level, Rule
from weightlift.host.pci import AMD, NVIDIA
from weightlift.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.health.facts import Facts
    from weightlift.host.pci import GraphicsCard

_REACHED: Final = 0.6
_LARGE_SHARE_BYTES: Final = 16 * GIB
_THRESHOLD_KILOBYTES: Final = 4 << 20
_UBUNTU_BROKEN: Final = range(28, 30)

LINK_NARROW = Rule(
    id="gpu-link-narrow",
    level=Level.WARNING,
    when="a card's PCI Express link uses fewer lanes than both of its ends have",
    why="every byte of a model crosses it; half the lanes are half the speed",
    mend="reseat the card, use the slot nearest to the processor, and check in the firmware whether an M.2 drive takes "
    "its lanes; `sudo lspci -vv -s {address} | grep Lnk` shows the link",
)
LINK_SPEED = Rule(
    id="gpu-link-speed",
    level=Level.ADVICE,
    when="a card's PCI Express link runs slower than both of its ends can",
    why="idle cards slow their link down and speed it up under load, so this is only a fault if it stays so",
    mend="look again during a load: `cat /sys/bus/pci/devices/{address}/current_link_speed`; if it stays, set the "
    "slot's generation in the firmware",
)
LINK_MEASURED = Rule(
    id="gpu-link-measured",
    level=Level.WARNING,
    when="copies to a card reach less than 60 % of what its link can carry",
    why="loads out of the page cache are as fast as this link",
    mend="on machines with several processors bind the program to the card's own: `numactl --cpunodebind="
    "$(cat /sys/bus/pci/devices/{address}/numa_node) COMMAND`; in a "
    "virtual machine check how the card is passed through",
)
NO_DRIVER = Rule(
    id="gpu-without-driver",
    level=Level.ADVICE,
    when="no kernel driver has taken an AMD or NVIDIA card",
    why="nothing can be loaded to it",
    mend="install NVIDIA's driver or load `amdgpu`; `sudo dmesg | grep -i -e nvidia -e amdgpu` says what went wrong",
)
NO_RUNTIME = Rule(
    id="gpu-not-usable",
    level=Level.ADVICE,
    when="there is a card with a driver, and the torch that is installed can use none",
    why="models are loaded to the CPU instead",
    mend="install the build of torch for the card: `pip install torch --index-url "
    "https://download.pytorch.org/whl/{build}`; in a container pass the devices through",
)
HUNG = Rule(
    id="gpu-hung",
    level=Level.ERROR,
    when="asking the GPUs' runtime took longer than doctor waits",
    why="a program that loads a model would hang in the same place",
    mend="`sudo dmesg | tail -50` shows what the driver says; a restart clears most of these",
)
PRIVATE_MAPPINGS = Rule(
    id="private-writable-mappings",
    level=Level.WARNING,
    when="models go to an AMD GPU or to one that shares the machine's memory, and an installed library maps "
    "checkpoints private and writable",
    why="a copy out of such a mapping breaks copy-on-write on every page: the file turns into memory that only swap "
    "can take back, until the machine has none left",
    mend="load with weightlift, which stages instead: `weightlift.load(path, device=…)`; watch other programs with "
    "`weightlift guard -- COMMAND`",
)
MAPPED_TENSORS = Rule(
    id="mapped-cpu-tensors",
    level=Level.ADVICE,
    when="models go to an AMD GPU or to one that shares the machine's memory",
    why='tensors of `method="mmap"` are private mappings, and copying them to such a GPU turns them into memory',
    mend='load straight to the GPU (`device=…`), or pass `readonly=True` with `method="mmap"`',
)
PINNED_THRESHOLD = Rule(
    id="rocm-pinned-threshold",
    level=Level.ADVICE,
    when="models go to an AMD GPU and GPU_PINNED_MIN_XFER_SIZE is unset or small",
    why="copies of ordinary memory above it (1 MB by default) register its pages with the driver instead of staging "
    "them, which stops the GPU's queues again and again; weightlift pins its own memory and does not mind",
    mend=f"`export GPU_PINNED_MIN_XFER_SIZE={_THRESHOLD_KILOBYTES}` (in KB) before any other loader starts",
)
FAULT_BUG = Rule(
    id="amdgpu-fault-bug",
    level=Level.WARNING,
    when="an AMD GPU runs under a kernel known to carry c08972f55594 without 342981fff328 (Ubuntu 7.0.0-28 and -29, "
    "Fedora 7.0.12)",
    why="a copy out of a writable mapping waits a second again and again, so that loads take minutes",
    mend="update the kernel (`sudo apt full-upgrade`, `sudo dnf upgrade kernel`; Ubuntu 7.0.0-30 has the repair) and "
    "restart; weightlift does not copy out of such mappings",
)
UNIFIED = Rule(
    id="gpu-unified-memory",
    level=Level.ADVICE,
    when="the GPU uses the machine's own memory",
    why="the model, the page cache of its files and all programs share it, so that a cached file takes room from the "
    "model",
    mend="`--cache drop` or `--method direct` for models above a third of the memory",
)

RULES: Final = (
    *(LINK_NARROW, LINK_SPEED, LINK_MEASURED, NO_DRIVER, NO_RUNTIME, HUNG),
    *(PRIVATE_MAPPINGS, MAPPED_TENSORS, PINNED_THRESHOLD, FAULT_BUG, UNIFIED),
)


def _named(card: GraphicsCard) -> str:
    return f"the {card.maker} card at {card.address}"


def check_links(facts: Facts) -> Iterator[Finding]:
    """PCI Express: in use against capable, from the bus and measured."""
    for card in facts.cards:
        link = card.link
        if link is None or card.unified:
            continue
        text = (
            f"{_named(card)}: its narrowest link ({link.address}) runs {link.width} lanes at {link.speed:g} GT/s "
            f"({link.gigabytes_per_second:.1f} GB/s) of {link.width_max} at {link.speed_max:g} "
            f"({link.gigabytes_per_second_max:.1f} GB/s)"
        )
        if link.width < link.width_max:
            yield LINK_NARROW.found(text, LINK_NARROW.mend.replace("{address}", link.address))
        elif link.speed < link.speed_max:
            yield LINK_SPEED.found(text, LINK_SPEED.mend.replace("{address}", link.address))
        for gpu in facts.software.gpus or ():
            if gpu.pci_address != card.address or gpu.link_speed is None:
                continue
            if gpu.link_speed < _REACHED * link.gigabytes_per_second_max:
                yield LINK_MEASURED.found(
                    f"copies to {gpu.name} reach {gpu.link_speed:.1f} GB/s of the {link.gigabytes_per_second_max:.1f} "
                    "that its link can carry",
                    LINK_MEASURED.mend.replace("{address}", card.address),
                )


def check_usable(facts: Facts) -> Iterator[Finding]:
    """Whether the cards that are there can be used."""
    if facts.software.hung in {"gpus", "links"}:
        yield HUNG.found(f"torch gave no answer in time while doctor asked for the {facts.software.hung}")
    for card in facts.cards:
        if not card.driver and card.vendor in {AMD, NVIDIA}:
            yield NO_DRIVER.found(f"{_named(card)} has no driver")
    cards = [card for card in facts.cards if card.driver in {"amdgpu", "nvidia"} and _worth_using(card)]
    if cards and facts.software.gpus == ():
        build = "rocm6.4" if cards[0].vendor == AMD else "cu128"
        yield NO_RUNTIME.found(
            f"{_named(cards[0])} is there, and torch (built for {facts.software.backend or 'nothing'}) can use no GPU",
            NO_RUNTIME.mend.replace("{build}", build),
        )


def _worth_using(card: GraphicsCard) -> bool:
    """Units inside ordinary processors are not what models are loaded to."""
    return not card.unified or card.vendor == NVIDIA or (card.shared_bytes or 0) >= _LARGE_SHARE_BYTES


def check_mappings(facts: Facts) -> Iterator[Finding]:
    """Mappings that turn into memory when a GPU copies from them."""
    if not (facts.amd or facts.unified):
        return
    kind = "an AMD GPU" if facts.amd else "a GPU that shares the machine's memory"
    named = [f"{found.name} {found.version}" for found in facts.software.libraries if found.maps_private_writable]
    if named:
        yield PRIVATE_MAPPINGS.found(
            f"{' and '.join(named)} map checkpoints private and writable (seen in /proc/self/maps), and this machine "
            f"has {kind}"
        )
    yield MAPPED_TENSORS.found(f"this machine has {kind}")


def check_rocm(facts: Facts) -> Iterator[Finding]:
    """What is particular to AMD's driver and runtime."""
    if not facts.amd:
        return
    value = facts.software.environment.get("GPU_PINNED_MIN_XFER_SIZE", "")
    if not (value.isdecimal() and int(value) >= _THRESHOLD_KILOBYTES):
        yield PINNED_THRESHOLD.found(f"GPU_PINNED_MIN_XFER_SIZE is {f'set to {value}' if value else 'not set'}")
    release = facts.machine.release if facts.machine else ""
    if has_fault_bug(release):
        yield FAULT_BUG.found(f"this is kernel {release}")


def has_fault_bug(release: str) -> bool:
    """Whether a kernel is one of those known to wait a second per fault on amdgpu.

    There is no way to try this without a card and a frozen load, so it is judged by version, and only where somebody
    has measured it (ROCm/legacy-rocm-build issue 5952).
    """
    ubuntu = re.match(r"7\.0\.0-(\d+)-", release)
    if ubuntu:
        return int(ubuntu[1]) in _UBUNTU_BROKEN
    return re.match(r"7\.0\.12-\d+\.fc\d+", release) is not None


def check_unified(facts: Facts) -> Iterator[Finding]:
    """Memory that GPU and machine share."""
    if not facts.unified:
        return
    total = facts.machine.memory_bytes if facts.machine else None
    models = [gpu.model for gpu in facts.software.gpus or ()] or [
        f"the {card.maker} GPU at {card.address}" for card in facts.cards if card.unified
    ]
    of = f" of {format_bytes(total)}" if total else ""
    yield UNIFIED.found(f"{models[0]} uses the machine's own memory{of}")


CHECKS: Final[tuple[Check, ...]] = (check_links, check_usable, check_mappings, check_rocm, check_unified)
