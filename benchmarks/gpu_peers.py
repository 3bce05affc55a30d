"""Who is compared on GPUs, and how each is set up: as shipped, and as it is fastest in some state.

Peers are used as they are installed: in the interpreter that runs the benchmark, or in a folder that comes first on the
import path (``--rc-folder`` for the release candidate of safetensors). What is not installed is left out and named.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any

from harness import Contestant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """One loader with one set of settings.

    Attributes:
        name: how tables call it.
        family: the loader's own name; settings of one family are one peer.
        package: what must be importable.
        adapter: the worker's name for it.
        options: keywords.
        environment: environment variables.
        slow: it takes many seconds, so it loads only once in a process.
        host_bytes: host memory that it is known to take beside the tensors.
        states: sections that it is run in; empty for all.
    """

    name: str
    family: str
    package: str
    adapter: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    slow: bool = False
    host_bytes: int = 0
    states: tuple[str, ...] = ()

    def contestant(self, import_from: Sequence[str] = ()) -> Contestant:
        """What the harness runs."""
        return Contestant(
            adapter=self.adapter,
            options=self.options,
            environment=self.environment,
            import_from=tuple(import_from),
        )


_RC = "safetensors 0.9.0rc1"

LOADERS = (
    Loader(name="safetensors 0.8.0", family="safetensors 0.8.0", package="safetensors", adapter="safetensors"),
    Loader(
        name=f"{_RC}, 8 threads",
        family=_RC,
        package="safetensors",
        adapter="safetensors_prefetch",
        options={"threads": 8},
        states=("warm", "cold", "half-warm", "busy"),
    ),
    Loader(
        name=f"{_RC}, 16 threads",
        family=_RC,
        package="safetensors",
        adapter="safetensors_prefetch",
        options={"threads": 16},
    ),
    Loader(
        name="fastsafetensors",
        family="fastsafetensors",
        package="fastsafetensors",
        adapter="fastsafetensors",
        states=("warm", "cold", "disk"),
    ),
    Loader(
        name="fastsafetensors, buffered",
        family="fastsafetensors",
        package="fastsafetensors",
        adapter="fastsafetensors",
        environment={"FASTSAFETENSORS_ODIRECT": "0"},
    ),
    Loader(
        name="InstantTensor",
        family="InstantTensor",
        package="instanttensor",
        adapter="instanttensor",
        host_bytes=4 << 30,
        slow=True,
        states=("warm", "cold"),
    ),
    Loader(
        name="InstantTensor, MMAP",
        family="InstantTensor",
        package="instanttensor",
        adapter="instanttensor",
        host_bytes=4 << 30,
        environment={"INSTANTTENSOR_BACKEND": "MMAP"},
    ),
    Loader(
        name="Run:ai",
        family="Run:ai",
        package="runai_model_streamer",
        adapter="runai",
        host_bytes=2 << 30,
        slow=True,
        states=("warm", "cold", "half-warm"),
    ),
    Loader(
        name="ExLlamaV3",
        family="ExLlamaV3",
        # Where that was built; the package alone cannot read.
        package="exllamav3_ext",
        adapter="exllamav3",
        host_bytes=1 << 30,
        states=("warm", "cold", "half-warm", "busy"),
    ),
)
"""Every peer as shipped, then at settings that were seen to be fast in some state."""


class Peers:
    """The loaders that this machine has.

    Args:
        rc_folder: where the release candidate of safetensors was installed by itself, if it was.
    """

    def __init__(self, rc_folder: Path | None) -> None:
        self._rc_folder = rc_folder

    def present(self) -> list[tuple[Loader, Contestant]]:
        """Every loader that can run here, with what the harness runs."""
        return [
            (loader, loader.contestant([str(self._rc_folder)] if loader.family == _RC else ()))
            for loader in LOADERS
            if self._has(loader)
        ]

    def missing(self) -> list[str]:
        """Names of those that cannot."""
        return sorted({loader.family for loader in LOADERS if not self._has(loader)})

    def _has(self, loader: Loader) -> bool:
        if loader.family == _RC:
            return self._rc_folder is not None and self._rc_folder.is_dir()
        return importlib.util.find_spec(loader.package) is not None
