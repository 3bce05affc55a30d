"""Tensors that are views of mapped files: lazy, shared with every process that maps them, and following the file.

This is the one exception to ownership. A mapping handed out is private copy-on-write, so that in-place edits work and
reach nobody else; with ``readonly`` it is shared and read-only. Tensors that the file holds at addresses wrong for
their data type are left to another target.

The kernel reads a mapping ahead in steps of the device's read-ahead, often 128 KiB, and maps what it read 64 KiB at a
fault, which on a fast drive is most of the time a first touch takes. Mappings are therefore advised to use huge pages
where the files may stay in memory: the page cache then takes them in units of 2 MiB, two at a time and in any order of
touching, and maps a unit with one fault. Units stay in the cache, so later mappings are touched faster too; pages that
are written to are still copied one by one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weightlift.description import Description
    from weightlift.targets.frameworks import TensorMaker


def mappable_rows(description: Description, rows: Sequence[int]) -> list[int]:
    """The rows whose place in the file suits their data type."""
    alignments = [dtype.alignment for dtype in description.dtypes]
    return [row for row in rows if description.offsets[row] % alignments[description.dtype_codes[row]] == 0]


def map_shards(
    description: Description,
    used: Sequence[int],
    descriptors: Mapping[int, int],
    *,
    readonly: bool,
    keep: bool = False,
) -> dict[int, mmap.mmap]:
    """Map shards for handing out. Nothing is read before it is touched.

    Args:
        description: the checkpoint.
        used: indexes of the shards.
        descriptors: their open descriptors; the mappings do not need them any longer.
        readonly: shared and read-only instead of private copy-on-write.
        keep: the files fit into free memory and may stay there, so that a touch may bring in the 4 MiB around it.
    """
    access = mmap.ACCESS_READ if readonly else mmap.ACCESS_COPY
    mappings = {}
    for index in used:
        size = description.shards[index].identity.size_bytes
        if size:
            mappings[index] = mmap.mmap(descriptors[index], size, access=access)
            _advise(mappings[index], descriptors[index], keep=keep)
    return mappings


def _advise(mapping: mmap.mmap, descriptor: int, *, keep: bool) -> None:
    """Tell the kernel how far to read ahead of a touch; advice that it does not take changes nothing but the speed."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        # Kept per open file, which the mapping and the descriptor share: twice the usual distance.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    if keep:
        read_around(mapping)


def read_around(mapping: mmap.mmap) -> None:
    """Let a touch bring in the 4 MiB around it, where the kernel can."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)


def mapped_tensors(
    description: Description, rows: Sequence[int], mappings: Mapping[int, mmap.mmap], maker: TensorMaker
) -> Iterator[tuple[str, Any]]:
    """Tensors over the mappings, by name; see :func:`mapped_tensor`.

    Args:
        description: the checkpoint.
        rows: rows from :func:`mappable_rows`.
        mappings: the mapped shards.
        maker: whose tensors.
    """
    with warnings.catch_warnings():
        # torch warns that it cannot stop writes to read-only memory; whoever asked for it was told so.
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        for row in rows:
            yield description.names[row], mapped_tensor(description, row, mappings, maker)


def mapped_tensor(description: Description, row: int, mappings: Mapping[int, mmap.mmap], maker: TensorMaker) -> Any:
    """One tensor over a mapping, which lives as long as any of them.

    Over a read-only mapping torch warns; over others this is the quick way to one tensor.

    Args:
        description: the checkpoint.
        row: one of :func:`mappable_rows`.
        mappings: the mapped shards.
        maker: whose tensor.
    """
    dtype, shape = description.dtype(row), description.shape(row)
    if not description.lengths[row]:
        return maker.over(bytearray(0), 0, dtype, shape)
    return maker.over(mappings[description.shard_indexes[row]], description.offsets[row], dtype, shape)
