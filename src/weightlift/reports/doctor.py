"""What doctor found as text; takes finished records and asks nothing else.

Facts come first, then findings with the worst at the top, then what could not be checked, then the recommendation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightlift.health.findings import Level
from weightlift.host.machine import UNLIMITED
from weightlift.reports.console import column_table, fact_grid, joined, text
from weightlift.reports.load import size_text, speed_text
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from weightlift.health.examination import Examination
    from weightlift.health.facts import Facts, Gap, Gpu
    from weightlift.health.findings import Finding
    from weightlift.health.recommend import Recommendation
    from weightlift.host.block import BlockDevice
    from weightlift.host.machine import MachineFacts
    from weightlift.host.pci import GraphicsCard
    from weightlift.host.place import PlaceFacts

_STYLES: Final = {Level.ERROR: "bold red", Level.WARNING: "yellow", Level.ADVICE: "cyan", Level.FACT: "dim"}


def doctor_tables(
    facts: Facts, examination: Examination, recommendation: Recommendation, seconds: float
) -> Iterator[RenderableType]:
    """The whole report.

    Args:
        facts: the machine.
        examination: what the checks found.
        recommendation: what to do.
        seconds: how long doctor took.
    """
    yield _facts(facts)
    for level in (Level.ERROR, Level.WARNING, Level.ADVICE, Level.FACT):
        found = [finding for finding in examination.findings if finding.level is level]
        if found:
            yield text("")
            yield _findings(found, level)
    if examination.gaps:
        yield text("")
        yield _gaps(examination.gaps)
    yield text("")
    yield _recommendation(recommendation)
    if any(tool.option for tool in recommendation.tools):
        yield text("")
        yield _tools(recommendation)
    yield text("")
    state = "degraded: see the warnings above" if examination.degraded else "in order"
    yield text(f"this machine is {state} ({seconds:.1f} s)", "yellow" if examination.degraded else "green")


def _facts(facts: Facts) -> Table:
    grid = fact_grid()
    if facts.machine is not None:
        for label, told in _machine_lines(facts.machine):
            grid.add_row(label, text(told))
    for card in facts.cards:
        grid.add_row("card", text(_card(card)))
    for gpu in facts.software.gpus or ():
        grid.add_row(gpu.name, text(_gpu(gpu)))
    grid.add_row("software", text(_software(facts)))
    if facts.place is not None:
        for label, told in _place_lines(facts.place):
            grid.add_row(label, text(told))
    if facts.speeds is not None:
        for label, told in _speed_lines(facts):
            grid.add_row(label, text(told))
    return grid


def _machine_lines(machine: MachineFacts) -> Iterator[tuple[str, str]]:
    where = joined(
        f"{machine.system} {machine.release}",
        f"{machine.processors} processors",
        "WSL2" if machine.wsl2 else "",
        f"in a container ({machine.container})" if machine.container else "",
    )
    yield "machine", where
    if machine.room is not None:
        groups = (
            f"control group {room.group} (version {room.version}) allows {format_bytes(room.limit_bytes)}"
            for room in machine.room.rooms[1:]
        )
        yield "memory", joined(f"{size_text(machine.memory_bytes)} in all", machine.room.sentence, *groups)
    if machine.swap is not None:
        areas = (
            f"{area.name} ({area.kind}) {format_bytes(area.size_bytes)}, {format_bytes(area.used_bytes)} used"
            for area in machine.swap
        )
        yield "swap", joined(*areas, f"swappiness {machine.swappiness}") if machine.swap else "none"
    limits = joined(
        "" if machine.overcommit is None else f"overcommit {machine.overcommit}",
        f"may lock {_limit(machine.memlock_bytes)}" if machine.memlock_bytes is not None else "",
        f"shared memory {format_bytes(machine.shared_bytes)}" if machine.shared_bytes is not None else "",
        f"huge pages {machine.hugepages}" if machine.hugepages else "",
    )
    if limits:
        yield "limits", limits
    if machine.features is not None:
        features = machine.features
        yield (
            "kernel",
            joined(
                f"cachestat {features.cachestat.value}",
                f"uncached reads (RWF_DONTCACHE) {features.dontcache.value}",
                f"io_uring {features.io_uring.value}",
            ),
        )


def _limit(nbytes: int) -> str:
    return "any amount of memory" if nbytes == UNLIMITED else format_bytes(nbytes)


def _card(card: GraphicsCard) -> str:
    link = card.link
    lanes = (
        f"PCI Express {link.width} of {link.width_max} lanes at {link.speed:g} of {link.speed_max:g} GT/s "
        f"({link.gigabytes_per_second:.1f} of {link.gigabytes_per_second_max:.1f} GB/s)"
        if link
        else ""
    )
    return joined(
        f"{card.maker} {card.device:04x} at {card.address}",
        f"driver {card.driver}" if card.driver else "no driver",
        f"{format_bytes(card.memory_bytes)}" if card.memory_bytes else "",
        f"and {format_bytes(card.shared_bytes)} of the machine's" if card.shared_bytes and card.unified else "",
        "shares the machine's memory" if card.unified else "",
        lanes,
    )


def _gpu(gpu: Gpu) -> str:
    return joined(
        f"{gpu.model} {gpu.architecture}".strip(),
        f"{format_bytes(gpu.total_bytes)}, {format_bytes(gpu.free_bytes)} free",
        f"filled at {speed_text(gpu.link_speed)}" if gpu.link_speed else "",
    )


def _software(facts: Facts) -> str:
    software, drivers = facts.software, facts.drivers
    built = f" for {software.backend} {software.backend_version}".rstrip() if software.backend else ""
    libraries = (
        f"{library.name} {library.version}"
        + (built if library.name == "torch" else "")
        + (f" (maps {library.mapping})" if library.mapping else "")
        for library in software.libraries
    )
    return joined(
        *libraries,
        f"ROCm {drivers.rocm}" if drivers.rocm else "",
        f"NVIDIA driver {drivers.nvidia}" if drivers.nvidia else "",
        f"amdgpu {drivers.amdgpu}" if drivers.amdgpu else "",
        "Python engine only" if software.engine else "native engine",
        *(f"{name}={value}" for name, value in software.environment.items()),
    )


def _place_lines(place: PlaceFacts) -> Iterator[tuple[str, str]]:
    size = f": {format_bytes(place.model_bytes)}" if place.model_bytes else ""
    yield "path", f"{place.path}{size}"
    if place.mount is not None:
        mount = place.mount
        read_ahead = f", reads {format_bytes(place.read_ahead_bytes)} ahead" if place.read_ahead_bytes else ""
        yield "file system", f"{mount.kind} on {mount.source}, mounted at {mount.point}{read_ahead}"
    if place.disk is not None:
        yield "disk", _disk(place.disk)
    if place.direct is not None:
        yield "direct reads", place.direct.reason
    if place.file is not None and not place.problem:
        held = f"holds {size_text(place.cached_bytes)} of {format_bytes(place.file_bytes)} of {place.file}"
        yield "page cache", held if place.cached_bytes is not None else "unknown for this user or system"


def _disk(disk: BlockDevice) -> str:
    inside = ", ".join(_disk(member) for member in disk.members)
    link = disk.link
    return joined(
        f"{disk.name} {disk.model}".strip(),
        f"{disk.kind} {disk.detail}".strip(),
        format_bytes(disk.size_bytes) if disk.size_bytes else "",
        "turning" if disk.turns else "",
        f"PCI Express {link.width} of {link.width_max} lanes at {link.speed:g} of {link.speed_max:g} GT/s"
        if link
        else "",
    ) + (f" over ({inside})" if inside else "")


def _speed_lines(facts: Facts) -> Iterator[tuple[str, str]]:
    speeds = facts.speeds
    assert speeds is not None
    if speeds.storage:
        yield "storage speed", joined(*(f"{name} {speed_text(speed)}" for name, speed in speeds.storage.items()))
    for name, why in speeds.notes.items():
        yield f"  not {name}", why
    if speeds.memory_copy:
        yield "memory speed", f"copies {speed_text(speeds.memory_copy)}"


def _findings(findings: Sequence[Finding], level: Level) -> Table:
    grid = fact_grid()
    for finding in findings:
        grid.add_row(text(level.value, _STYLES[level]), text(f"{finding.text}  [{finding.id}]", "bold"))
        grid.add_row("", text(f"why: {finding.why}"))
        grid.add_row("", text(f"mend: {finding.mend}"))
    return grid


def _gaps(gaps: Sequence[Gap]) -> Table:
    grid = fact_grid()
    for gap in gaps:
        grid.add_row(text("not checked"), text(f"{gap.what}: {gap.why}"))
    return grid


def _recommendation(recommendation: Recommendation) -> Table:
    grid = fact_grid()
    grid.add_row("recommended", text(recommendation.command, "bold"))
    for reason in recommendation.reasons:
        grid.add_row("", text(reason))
    return grid


def _tools(recommendation: Recommendation) -> Table:
    table = column_table("tell", "this", "because")
    for tool in recommendation.tools:
        table.add_row(text(tool.tool), text(tool.option), text(tool.why))
    return table
