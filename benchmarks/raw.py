"""The raw ceilings: builds ``raw_read.c``, sweeps it over threads and chunk sizes, and names the best points.

Knows nothing of loaders. A swept point is only a guess at the best setting; its figure for the record comes from
being measured again in the same rounds as the loaders.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import running
from claims import Run, speed
from harness import MIB, Case, Checkpoint, Contestant
from states import CacheState

from weightlift.host.memory import available_processors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

SOURCE = Path(__file__).resolve().parent / "raw_read.c"
THREADS = tuple(1 << power for power in range(max(4, available_processors().bit_length())))
CHUNKS = (MIB, 2 * MIB, 4 * MIB, 8 * MIB)
MEMORIES = ("reused", "fresh", "fresh-huge")
METHODS = {CacheState.COLD: ("direct", "buffered", "dontcache"), CacheState.WARM: ("buffered",)}
KEPT_POINTS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One way to read a file.

    Attributes:
        state: page cache before the read.
        method: ``direct``, ``buffered`` or ``dontcache``.
        memory: ``reused``, ``fresh`` or ``fresh-huge``.
        threads: how many read.
        chunk_bytes: bytes per read.
    """

    state: CacheState
    method: str
    memory: str
    threads: int
    chunk_bytes: int

    @property
    def name(self) -> str:
        """How the point is called in tables."""
        return f"raw {self.method}, {self.memory}, {self.threads} × {self.chunk_bytes / MIB:g} MiB"


def build(folder: Path) -> Path:
    """Compile the reader into ``folder`` and return the program.

    Raises:
        subprocess.CalledProcessError: there is a compiler and it refuses.
        FileNotFoundError: there is no C compiler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "raw_read"
    flags = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(program)], check=True)
    return program


def case(program: Path, point: Point, checkpoint: Checkpoint, *, nbytes: int | None = None) -> Case:
    """The point as something to measure; a ceiling is of one file, a checkpoint's largest."""
    file = max(checkpoint.files, key=lambda name: Path(name).stat().st_size)
    words = [str(program), file, point.method, point.memory, str(point.threads), str(point.chunk_bytes)]
    command = tuple(words + ([str(nbytes)] if nbytes else []))
    contestant = Contestant(command=command, delivers=point.memory != "reused")
    return Case(name=point.name, contestant=contestant, checkpoint=checkpoint, state=point.state)


def points(*, quick: bool = False) -> Iterable[Point]:
    """All points of the sweep, or a few of them."""
    threads, chunks = ((2, 4), (MIB, 4 * MIB)) if quick else (THREADS, CHUNKS)
    for state, methods in METHODS.items():
        for values in itertools.product(methods, MEMORIES, threads, chunks):
            yield Point(state, *values)


def sweep(
    program: Path, checkpoint: Checkpoint, *, nbytes: int, quick: bool, note: Callable[[Point, Run], None]
) -> list[dict[str, Any]]:
    """Measure every point once on the first ``nbytes`` of the file."""
    rows = []
    part = dataclasses.replace(checkpoint, tensor_bytes=min(nbytes, checkpoint.tensor_bytes))
    for point in points(quick=quick):
        run = running.once(case(program, point, part, nbytes=nbytes))
        note(point, run)
        rows.append(dataclasses.asdict(point) | {"error": run.get("error"), "gigabytes_per_second": speed(run)})
    return rows


def best(rows: Iterable[Mapping[str, Any]], state: CacheState, method: str, memory: str) -> list[Point]:
    """The fastest swept points of one kind; ``memory="fresh"`` includes huge pages."""
    names = [field.name for field in dataclasses.fields(Point)]
    wanted = [
        row for row in rows if (row["state"], row["method"]) == (state, method) and row["memory"].startswith(memory)
    ]
    wanted.sort(key=lambda row: -row["gigabytes_per_second"])
    kept = [Point(**{name: row[name] for name in names}) for row in wanted[:KEPT_POINTS]]
    return [dataclasses.replace(point, state=CacheState(point.state)) for point in kept]
