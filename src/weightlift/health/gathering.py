"""Gathers the facts that doctor judges. Nothing in here fails: what cannot be found out becomes a gap with its reason.

Owns the order and the deadlines: the child process that asks the frameworks starts first and works while the kernel's
tables are read; speeds are measured once it is quiet.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from weightlift.ceilings import remember_link
from weightlift.engines.native import native_library
from weightlift.errors import WeightliftError
from weightlift.formats import describe
from weightlift.health.asking import Child, NoAnswerError, ask
from weightlift.health.facts import Facts, Gap, Gpu, Library, SoftwareFacts, Speeds
from weightlift.health.probes import memory_copy_speed, storage_speeds
from weightlift.host.machine import machine_facts
from weightlift.host.pci import DriverFacts, driver_facts, graphics_cards
from weightlift.host.place import place_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightlift.host.place import PlaceFacts

T = TypeVar("T")
U = TypeVar("U")
ROOT: Final = Path("/")
_CALL_SECONDS: Final = 1.5
_CHILD_SECONDS: Final = 3.5
_CHILD_SECONDS_WITH_PLACE: Final = 8.5
_PROBE_SECONDS: Final = 4.0
_LIBRARIES: Final = ("torch", "safetensors")

ENVIRONMENT: Final = (
    "GPU_PINNED_MIN_XFER_SIZE",
    "EXLLAMA_FASTTENSORS",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
    "HSA_XNACK",
)
"""Variables of other programs that decide how loads behave; weightlift itself heeds none of them."""


class _Gatherer:
    """Calls probes and keeps what failed."""

    def __init__(self) -> None:
        self.gaps: list[Gap] = []

    def ask(self, what: str, function: Callable[[], T], otherwise: U, seconds: float = _CALL_SECONDS) -> T | U:
        """What a probe says, or ``otherwise`` with a gap."""
        try:
            return ask(what, function, seconds)
        except (NoAnswerError, OSError, WeightliftError) as err:
            self.missing(what, getattr(err, "message", "") or str(err))
        except Exception as err:  # noqa: BLE001 - a defect of a probe must not take the others with it
            self.missing(what, f"{type(err).__name__}: {err}")
        return otherwise

    def missing(self, what: str, why: str) -> None:
        """Keep that something could not be found out."""
        self.gaps.append(Gap(what=what, why=why))


def gather(
    path: str | os.PathLike[str] | None = None,
    *,
    root: Path = ROOT,
    command: Sequence[str] | None = None,
    measure: bool = True,
) -> Facts:
    """Gather all facts: in under 5 s, or 15 s with a path, whatever hangs.

    Args:
        path: where models lie, or one of them; its storage is measured.
        root: where the kernel's tables are read.
        command: what to run in place of the child process, for tests.
        measure: measure speeds where a path is given.
    """
    gatherer = _Gatherer()
    libraries = [Library(name=name, version=version) for name in _LIBRARIES if (version := _version(name))]
    measured = path is not None and measure
    child = _start_child(libraries, command, gatherer, links=measured)
    machine = gatherer.ask("the machine", lambda: machine_facts(root), None)
    cards = gatherer.ask("the graphics cards", lambda: graphics_cards(root), ())
    drivers = gatherer.ask("the drivers", lambda: driver_facts(root), DriverFacts())
    place = None
    if path is not None:
        place = gatherer.ask(f"the files under {os.fspath(path)}", lambda: _place(path, root), None, 2 * _CALL_SECONDS)
    software = _software(libraries, child, gatherer, with_place=path is not None)
    speeds = _speeds(place, gatherer) if measured else None
    return Facts(
        machine=machine,
        cards=cards,
        drivers=drivers,
        software=software,
        place=place,
        speeds=speeds,
        gaps=tuple(gatherer.gaps),
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _start_child(
    libraries: Sequence[Library], command: Sequence[str] | None, gatherer: _Gatherer, *, links: bool
) -> Child | None:
    installed = {library.name for library in libraries}
    if "torch" not in installed and command is None:
        return None
    steps = ["torch", "torch mapping"]
    steps += ["safetensors mapping"] if "safetensors" in installed else []
    steps += ["gpus", *(["links"] if links else [])]
    try:
        return Child(steps, command)
    except OSError as err:
        gatherer.missing("torch and the GPUs", f"no process could be started: {err}")
        return None


def _place(path: str | os.PathLike[str], root: Path) -> PlaceFacts:
    """The facts about the largest shard where the path is a checkpoint, about the files as they are otherwise."""
    try:
        description = describe(path)
    except WeightliftError:
        return place_facts(path, root)
    largest = max(description.shards, key=lambda shard: shard.identity.size_bytes, default=None)
    if largest is None:
        return place_facts(path, root)
    total = sum(shard.identity.size_bytes for shard in description.shards)
    return replace(place_facts(largest.path, root), path=os.fspath(path), model_bytes=total)


def _software(
    libraries: Sequence[Library], child: Child | None, gatherer: _Gatherer, *, with_place: bool
) -> SoftwareFacts:
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    library = gatherer.ask("the native engine", lambda: native_library(), "")  # noqa: PLW0108 - a cached function has no type
    engine = library if isinstance(library, str) else ""
    found = SoftwareFacts(libraries=tuple(libraries), environment=environment, engine=engine)
    if child is None:
        return found
    child.wait(_CHILD_SECONDS_WITH_PLACE if with_place else _CHILD_SECONDS)
    if child.hung:
        gatherer.missing(
            "the rest of what torch could tell",
            f"it gave no answer in time while it was at the step {child.hung!r}"
            + (" (the first import after boot takes longer: run doctor again)" if child.hung == "torch" else ""),
        )
    elif child.failure:
        gatherer.missing("what torch could tell", child.failure)
    for step, answer in child.answers.items():
        if "error" in answer:
            gatherer.missing(f"torch's answer to {step!r}", answer["error"])
    return _told(found, child.answers, child.hung)


def _told(found: SoftwareFacts, answers: dict[str, dict[str, Any]], hung: str) -> SoftwareFacts:
    """What the child process said, as values."""
    told = answers.get("torch", {})
    gpus = answers.get("gpus", {}).get("gpus")
    links = answers.get("links", {}).get("links", {})
    for name, speed in links.items():
        remember_link(name, speed)
    return replace(
        found,
        libraries=tuple(
            replace(library, mapping=answers.get(f"{library.name} mapping", {}).get("mapping"))
            for library in found.libraries
        ),
        backend=told.get("backend", ""),
        backend_version=told.get("backend_version", ""),
        gpus=None if gpus is None else tuple(Gpu(**gpu, link_speed=links.get(gpu["name"])) for gpu in gpus),
        hung=hung,
    )


def _speeds(place: PlaceFacts | None, gatherer: _Gatherer) -> Speeds:
    begin = time.monotonic()
    copied = gatherer.ask("the speed of memory", memory_copy_speed, None, _PROBE_SECONDS)
    file = place.file if place is not None and not place.problem else None
    if file is None:
        return Speeds(memory_copy=copied)
    left = max(_CALL_SECONDS, _PROBE_SECONDS - (time.monotonic() - begin))
    speeds = gatherer.ask("the speed of storage", lambda: storage_speeds(file), Speeds(), left)
    return replace(speeds, memory_copy=copied)
