"""The other loaders: where they are installed, how each is called, and which of its settings are tried.

``python benchmarks/peers.py setup`` installs them, pinned, into a folder of their own. Nothing of them is in the
environment that weightlift runs in.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import claims
import running
from harness import Case, Checkpoint, Contestant

if TYPE_CHECKING:
    from states import CacheState

FOLDER = Path(os.environ.get("WEIGHTLIFT_BENCHMARKS_CACHE", str(Path.home() / ".cache" / "weightlift-benchmarks")))
PYTHON = FOLDER / "environment" / "bin" / "python"
COMMON = ("torch==2.13.0", "numpy", "xxhash", "safetensors==0.8.0", "humanize", "typer")
ALONE = ("safetensors==0.9.0rc1", "runai-model-streamer==0.17.0", "fastsafetensors==0.5.0")
TUNING_RUNS = 2
CLEARLY_BETTER = 1.05

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One loader, or one of its backends.

    Attributes:
        name: how tables call it, with its version.
        adapter: the worker's sub-command.
        package: its own folder under :data:`FOLDER`; empty if it is in the common environment.
        mapped: it hands out mappings of the file.
        environment: the setting that makes it this backend.
        options: the same, as keywords.
        candidates: further settings, tried once per state; environment variables are upper case, keywords lower.
    """

    name: str
    adapter: str
    package: str = ""
    mapped: bool = False
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Settings = dataclasses.field(default_factory=dict)
    candidates: tuple[Settings, ...] = ()

    def contestant(self, settings: Settings | None = None) -> Contestant:
        """The peer with its shipped settings, or with these on top."""
        more = settings or {}
        return Contestant(
            adapter=self.adapter,
            python=str(PYTHON),
            import_from=(str(FOLDER / self.package),) if self.package else (),
            mapped=self.mapped,
            environment={**self.environment, **{key: str(more[key]) for key in more if key.isupper()}},
            options={**self.options, **{key: more[key] for key in more if not key.isupper()}},
        )


_RUNAI_DEPTHS = tuple({"RUNAI_STREAMER_CONCURRENCY": count} for count in (1, 2, 4, 8, 32))
_FAST_THREADS = tuple(
    {"max_threads": threads, "bbuf_size_kb": kib} for threads in (2, 4) for kib in (4 * 1024, 16 * 1024)
)
_NINE, _RUNAI, _FAST = ALONE

PEERS = (
    Peer(name="safetensors 0.8.0 mmap", adapter="safetensors", mapped=True),
    Peer(name="safetensors 0.9.0rc1 mmap", adapter="safetensors", package=_NINE, mapped=True),
    Peer(name="safetensors 0.9.0rc1 pread", adapter="safetensors", package=_NINE, options={"backend": "pread"}),
    Peer(name="Run:ai 0.17.0", adapter="runai", package=_RUNAI, candidates=_RUNAI_DEPTHS),
    Peer(
        name="Run:ai 0.17.0 sync_buffered",
        adapter="runai",
        package=_RUNAI,
        environment={"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"},
        candidates=_RUNAI_DEPTHS,
    ),
    Peer(
        name="Run:ai 0.17.0 io_uring_buffered",
        adapter="runai",
        package=_RUNAI,
        environment={"RUNAI_STREAMER_FS_STRATEGY": "io_uring_buffered"},
    ),
    Peer(name="fastsafetensors 0.5.0", adapter="fastsafetensors", package=_FAST, candidates=_FAST_THREADS),
    Peer(
        name="fastsafetensors 0.5.0 buffered",
        adapter="fastsafetensors",
        package=_FAST,
        environment={"FASTSAFETENSORS_ODIRECT": "0"},
        candidates=_FAST_THREADS,
    ),
    Peer(name="plain readinto", adapter="readinto"),
)


def missing() -> str | None:
    """Why the peers cannot be measured, or ``None`` if they can."""
    absent = [str(path) for path in (PYTHON, *(FOLDER / package for package in ALONE)) if not path.exists()]
    return f"not installed: {', '.join(absent)}; run `python benchmarks/peers.py setup`" if absent else None


def tune(
    peer: Peer, checkpoint: Checkpoint, state: CacheState, note: Callable[[int, Case, claims.Run], None]
) -> dict[str, Any]:
    """Try the shipped settings and every candidate a few times and name the fastest.

    Returns:
        ``settings`` (``{}`` if nothing is clearly better than what is shipped) and the throughput of every one tried.
    """
    tried: list[Settings] = [{}, *peer.candidates]
    cases = [
        Case(name=json.dumps(dict(one)), contestant=peer.contestant(one), checkpoint=checkpoint, state=state)
        for one in tried
    ]
    runs = running.rounds(cases, TUNING_RUNS, note)
    speeds = {name: max(map(claims.speed, values)) for name, values in runs.items()}
    shipped, best = cases[0].name, max(speeds, key=lambda name: speeds[name])
    settings = json.loads(best) if speeds[best] > CLEARLY_BETTER * speeds[shipped] else {}
    return {"settings": settings, "gigabytes_per_second": speeds}


def cases(
    checkpoint: Checkpoint, state: CacheState, tuning: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[Peer, Case]]:
    """Every peer as shipped, and once more at its best where that is something else."""
    for peer in PEERS:
        name = f"{peer.name}, {state}"
        yield peer, Case(name=name, contestant=peer.contestant(), checkpoint=checkpoint, state=state)
        settings = tuning.get(peer.name, {}).get("settings")
        if settings:
            best = f"{name}, best"
            yield peer, Case(name=best, contestant=peer.contestant(settings), checkpoint=checkpoint, state=state)


def setup() -> None:
    """Install the common environment and each peer's own folder.

    Raises:
        subprocess.CalledProcessError: pip failed; its words are on the terminal.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PYTHON.parent.parent)], check=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *COMMON], check=True)
    for package in ALONE:
        if not (FOLDER / package).exists():
            subprocess.run([*pip, "--no-deps", "--target", str(FOLDER / package), package], check=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("setup", "check"))
    if parser.parse_args().action == "setup":
        setup()
    sys.exit(missing())


if __name__ == "__main__":
    main()
