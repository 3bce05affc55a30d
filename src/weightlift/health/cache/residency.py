"""How much of each file the page cache holds, and where in the file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from weightlift.engines.probing import run_probes
from weightlift.host import kernel
from weightlift.host.residency import count_together, whole_file
from weightlift.units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from weightlift.health.cache.files import FoundFile

CELLS: Final = 24
"""Into how many parts a file is cut to show where it is cached."""


@dataclass(frozen=True, slots=True)
class FileResidency:
    """What is cached of one file.

    Attributes:
        file: the file.
        cached_bytes: how much; ``None`` where the system does not tell this user.
        cells: the cached part, from 0 to 1, of up to 24 parts of the file that are equally long but for the last.
    """

    file: FoundFile
    cached_bytes: int | None
    cells: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return {
            "path": str(self.file.path),
            "bytes": self.file.size_bytes,
            "cached_bytes": self.cached_bytes,
            "cells": [round(cell, 3) for cell in self.cells],
        }


def residencies(files: Iterable[FoundFile]) -> list[FileResidency]:
    """What is cached of files; one that cannot be opened counts as unknown."""
    return [file_residency(file) for file in files]


def file_residency(file: FoundFile) -> FileResidency:
    """What is cached of a file."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return FileResidency(file, None)
    try:
        step = align_up(-(-file.size_bytes // CELLS), kernel.PAGE_SIZE)
        (counts,), _ = count_together([(descriptor, whole_file(file.size_bytes))], step, run_probes)
    finally:
        kernel.close_quickly(descriptor)
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return FileResidency(file, None)
    lengths = (min(step, file.size_bytes - index * step) for index in range(len(known)))
    cells = tuple(count / length for count, length in zip(known, lengths, strict=True))
    return FileResidency(file, sum(known), cells)


def total_cached(entries: Sequence[FileResidency]) -> int | None:
    """Cached bytes of files together; ``None`` if one is unknown."""
    counts = [entry.cached_bytes for entry in entries]
    return None if None in counts else sum(count for count in counts if count is not None)
