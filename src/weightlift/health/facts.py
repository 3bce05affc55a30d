"""Everything doctor knows of a machine, as frozen values: checks take nothing else, so any machine can be made up.

Holds values only. Who gathers them is :mod:`weightlift.health.gathering`; ``None`` means that nobody told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins

from weightlift.host.pci import AMD, DriverFacts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightlift.host.machine import MachineFacts
    from weightlift.host.pci import GraphicsCard
    from weightlift.host.place import PlaceFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A package that reads checkpoints, and how it maps them.

    Attributes:
        name: of the package.
        version: installed; empty if it is not.
        mapping: permissions of its mapping of a checkpoint as ``/proc`` shows them, like ``rw-p``; empty if it maps
            none; ``None`` where that could not be tried.
    """

    name: str
    version: str = ""
    mapping: str | None = None

    @property
    def maps_private_writable(self) -> bool:
        """Whether its mappings turn into memory of the process when they are written to, or as good as written to."""
        return self.mapping is not None and self.mapping[1:2] == "w" and self.mapping[3:4] == "p"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device that the framework can use.

    Attributes:
        name: like ``cuda:0``.
        model: as its maker calls it.
        total_bytes: its memory.
        free_bytes: what is free of it.
        pci_address: its place, like ``0000:03:00.0``; empty where unknown.
        architecture: like ``gfx1100``; empty on NVIDIA's.
        integrated: its memory is the machine's.
        link_speed: measured copies out of pinned memory, in GB/s; ``None`` if not measured.
    """

    name: str
    model: str
    total_bytes: int
    free_bytes: int
    pci_address: str = ""
    architecture: str = ""
    integrated: bool = False
    link_speed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareFacts:
    """What is installed, and what it says of the GPUs.

    Attributes:
        libraries: packages that read checkpoints.
        backend: what torch was built for: ``cuda``, ``hip`` or ``cpu``; empty without torch.
        backend_version: of CUDA or HIP.
        gpus: what torch can use; ``None`` where it was not asked or did not answer.
        hung: what it was doing when it was given up; empty if it answered.
        environment: variables that steer how other loaders behave, as they are set.
        engine: why the native engine cannot be used; empty if it can.
    """

    libraries: tuple[Library, ...] = ()
    backend: str = ""
    backend_version: str = ""
    gpus: tuple[Gpu, ...] | None = None
    hung: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    engine: str = ""

    def library(self, name: str) -> Library:
        """One package; without a version if it is not installed."""
        return next((found for found in self.libraries if found.name == name), Library(name=name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What the probes measured, in GB/s; a path that could not be tried is missing.

    Attributes:
        storage: by path: ``direct``, ``uncached``, ``buffered`` and ``mmap`` from storage, ``cached`` out of the page
            cache.
        memory_copy: memory to memory, all processors together.
        notes: why a path was not tried, by path.
    """

    storage: Mapping[str, float] = field(default_factory=dict)
    memory_copy: float | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def fastest(self) -> tuple[str, float] | None:
        """The fastest path from storage and its speed."""
        cold = {path: speed for path, speed in self.storage.items() if path != "cached"}
        return max(cold.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Something that could not be found out.

    Attributes:
        what: it is.
        why: it could not.
    """

    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One machine, and one place on it if one was named.

    Attributes:
        machine: kernel, memory, swap, limits.
        cards: graphics cards, from the bus.
        drivers: versions of their drivers.
        software: packages and what they say.
        place: where models lie.
        speeds: what the probes measured there.
        gaps: what could not be found out.
    """

    machine: MachineFacts | None = None
    cards: tuple[GraphicsCard, ...] = ()
    drivers: DriverFacts = field(default_factory=DriverFacts)
    software: SoftwareFacts = field(default_factory=SoftwareFacts)
    place: PlaceFacts | None = None
    speeds: Speeds | None = None
    gaps: tuple[Gap, ...] = ()

    @property
    def gpu_bytes(self) -> int:
        """Memory of all GPUs that have memory of their own, from the framework or else from the bus."""
        if self.software.gpus:
            return sum(gpu.total_bytes for gpu in self.software.gpus if not self._shares(gpu))
        return sum(card.memory_bytes or 0 for card in self.cards if not card.unified)

    def _shares(self, gpu: Gpu) -> bool:
        return gpu.integrated or any(card.unified and card.address == gpu.pci_address for card in self.cards)

    @property
    def unified(self) -> bool:
        """Whether a GPU uses the machine's own memory and is what models would be loaded to."""
        if self.software.gpus:
            return any(self._shares(gpu) for gpu in self.software.gpus)
        # A small unit inside the processor counts for nothing beside a card.
        return any(card.unified for card in self.cards) and not any(
            not card.unified and card.driver in {"amdgpu", "nvidia"} for card in self.cards
        )

    @property
    def amd(self) -> bool:
        """Whether models would be loaded to an AMD GPU."""
        if self.software.backend in {"cuda", "hip"} and self.software.gpus:
            return self.software.backend == "hip"
        return any(card.vendor == AMD and card.driver == "amdgpu" for card in self.cards)

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU to load to, usable or not."""
        return bool(self.software.gpus) or any(card.driver in {"amdgpu", "nvidia"} for card in self.cards)

    def to_json(self) -> dict[str, Any]:
        """All of it, for ``doctor --json``."""
        return {key: value for key, value in to_builtins(self).items() if key != "gaps"}
