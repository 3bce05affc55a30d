"""What is measured: weightlift's paths, and other loaders with the settings they are tried at.

Tables and look-ups in the list of installed packages; nothing of any loader is imported here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from weightlift.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ALL_PEERS: Final = "all"

PATHS: Final[Mapping[str, Mapping[str, str]]] = {
    "auto": {"method": "auto", "cache": "auto"},
    "auto-drop": {"method": "auto", "cache": "drop"},
    "direct": {"method": "direct", "cache": "auto"},
    "buffered": {"method": "buffered", "cache": "auto"},
    "mmap": {"method": "mmap", "cache": "auto"},
}
"""Keywords of a load by the path's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way to load the model.

    Attributes:
        name: unique, as tables call it.
        loader: which function of :mod:`weightlift.bench.loaders` loads.
        package: the package that does it.
        version: its version; empty where unknown.
        options: keywords for the loader.
        environment: environment variables it is configured by.
        mapped: it hands out mappings of the file, so that its time counts until every page was touched.
    """

    name: str
    loader: str
    package: str = "weightlift"
    version: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    mapped: bool = False

    @property
    def own(self) -> bool:
        """Whether it is weightlift's."""
        return self.package == "weightlift"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a peer is called.

    Attributes:
        name: what sets it apart; empty for the peer as shipped.
        loader: the function that calls it.
        options: keywords.
        environment: environment variables.
        mapped: on the CPU it hands out mappings.
        devices: what it can load to.
        since: the first version that has it.
    """

    name: str = ""
    loader: str
    options: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    mapped: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    since: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another loader.

    Attributes:
        name: of its package, and how it is asked for.
        settings: as shipped first, then what was seen to be fast in some state of the page cache.
    """

    name: str
    settings: tuple[Setting, ...]


PEERS: Final = (
    Peer(
        name="safetensors",
        settings=(
            Setting(loader="safetensors", mapped=True),
            Setting(name="pread", loader="safetensors", options={"backend": "pread"}, devices=("cpu",), since=(0, 9)),
            Setting(name="prefetch", loader="safetensors_prefetch", devices=("cuda",), since=(0, 9)),
            Setting(
                name="prefetch, 16 threads",
                loader="safetensors_prefetch",
                options={"threads": 16},
                devices=("cuda",),
                since=(0, 9),
            ),
        ),
    ),
    Peer(
        name="fastsafetensors",
        settings=(
            Setting(loader="fastsafetensors"),
            Setting(name="buffered", loader="fastsafetensors", environment={"FASTSAFETENSORS_ODIRECT": "0"}),
        ),
    ),
    Peer(
        name="instanttensor",
        settings=(
            Setting(loader="instanttensor", devices=("cuda",)),
            Setting(
                name="MMAP",
                loader="instanttensor",
                environment={"INSTANTTENSOR_BACKEND": "MMAP"},
                devices=("cuda",),
            ),
        ),
    ),
    Peer(
        name="runai-model-streamer",
        settings=(
            Setting(loader="runai"),
            Setting(name="sync_buffered", loader="runai", environment={"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}),
        ),
    ),
)
"""Where each setting was seen to win is told in ``docs/bench.md``."""


def find_peer(name: str) -> Peer | None:
    """A peer by its name, in which ``-`` and ``_`` are the same."""
    wanted = name.lower().replace("_", "-")
    return next((peer for peer in PEERS if peer.name == wanted), None)


def installed_version(package: str) -> str:
    """The version of a package of this Python; empty if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def own_contestants(paths: Sequence[str], keywords: Mapping[str, object], device: str) -> list[Contestant]:
    """weightlift along some paths.

    Args:
        paths: keys of :data:`PATHS`.
        keywords: what every load is given.
        device: where to.
    """
    return [
        Contestant(
            name=path,
            loader="weightlift",
            version=installed_version("weightlift"),
            options={**keywords, **PATHS[path]},
            mapped=path == "mmap" and device == "cpu",
        )
        for path in paths
    ]


def peer_contestants(names: Sequence[str], device: str) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that were asked for, at every setting that applies here.

    Args:
        names: of peers, or ``all``.
        device: where to.

    Returns:
        The contestants, and why others are not among them, by name.

    Raises:
        MissingExtraError: one that was named is not installed.
    """
    kind = device.partition(":")[0]
    found: dict[str, Contestant] = {}
    left_out: dict[str, str] = {}
    for peer, named in _asked(names):
        version = installed_version(peer.name)
        if not version and named:
            raise MissingExtraError(f"{peer.name} is not installed in this Python", hint=f"pip install {peer.name}")
        if not version:
            left_out[peer.name] = "not installed in this Python"
            continue
        settings = [each for each in peer.settings if kind in each.devices and each.since <= _numbers(version)]
        if not settings:
            left_out[peer.name] = f"it does not load to {kind}"
        for each in settings:
            contestant = _contestant(peer, each, version, kind)
            found[contestant.name] = contestant
    if found and not installed_version("torch"):
        return [], left_out | dict.fromkeys(found, "it needs torch, which is not installed in this Python")
    return list(found.values()), left_out


def _asked(names: Sequence[str]) -> Iterator[tuple[Peer, bool]]:
    """Every peer that was asked for, once, and whether by its name."""
    named = {peer.name for name in names if (peer := find_peer(name))}
    for peer in PEERS:
        if peer.name in named or ALL_PEERS in names:
            yield peer, peer.name in named


def _contestant(peer: Peer, setting: Setting, version: str, kind: str) -> Contestant:
    return Contestant(
        name=f"{peer.name} {version}{setting.name and f', {setting.name}'}",
        loader=setting.loader,
        package=peer.name,
        version=version,
        options=setting.options,
        environment=setting.environment,
        mapped=setting.mapped and kind == "cpu",
    )


def _numbers(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
