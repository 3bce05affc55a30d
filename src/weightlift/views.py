"""Tensors that share bytes or are strided, as PyTorch checkpoints have them: pure arithmetic, no memory and no I/O.

A *carrier* is one range of a file that holds the elements of one or several such tensors. It is loaded as a flat
tensor, like any other and by any path; the tensors are views of it, so that what shared memory when it was saved does
so again.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

from weightlift.description import Description

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class View(NamedTuple):
    """One tensor as a view of its carrier.

    Attributes:
        name: the tensor's name.
        first: its first element in the carrier.
        shape: its shape.
        strides: elements between neighbours, per dimension.
    """

    name: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Carried(Struct, frozen=True):
    """What is loaded in place of some tensors, and how they come out of it.

    Attributes:
        description: one row per carrier, and one for every tensor that needs none; a carrier has the name of the first
            tensor in it.
        rows: all of its rows.
        views: by the carrier's name, the tensors in it.
    """

    description: Description
    rows: Sequence[int]
    views: Mapping[str, tuple[View, ...]]

    def expand(self, loaded: Iterable[tuple[str, Any]], strided: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
        """The tensors asked for, by name, in file order.

        Args:
            loaded: what was loaded by name.
            strided: makes a view of a flat tensor, given its first element, shape and strides.
        """
        for name, tensor in loaded:
            views = self.views.get(name)
            if views is None:
                yield name, tensor
                continue
            for view in views:
                yield view.name, strided(tensor, view.first, view.shape, view.strides)


def carry(description: Description, rows: Sequence[int]) -> Carried | None:
    """What to load so that every byte of some rows is read once; ``None`` where the rows are that already.

    Args:
        description: the checkpoint.
        rows: the selected rows, rising.
    """
    if not description.strides and not description.shared:
        return None
    clusters = list(_clusters(description, rows))
    carriers = [len(some) > 1 or some[0] in description.strides for some in clusters]
    if not any(carriers):
        return None
    firsts = [some[0] for some in clusters]
    begins = array("Q", [description.offsets[row] for row in firsts])
    ends = [max(description.offsets[row] + description.lengths[row] for row in some) for some in clusters]
    dims, ranks = array("Q"), array("I")
    views: dict[str, tuple[View, ...]] = {}
    for some, carries, begin, end in zip(clusters, carriers, begins, ends, strict=True):
        item = description.dtype(some[0]).block_bytes
        shape = ((end - begin) // item,) if carries else description.shape(some[0])
        dims.extend(shape)
        ranks.append(len(shape))
        if carries:
            views[description.names[some[0]]] = tuple(_view(description, row, begin, item) for row in some)
    loaded = Description(
        shards=description.shards,
        dtypes=description.dtypes,
        names=[description.names[row] for row in firsts],
        dtype_codes=array("B", [description.dtype_codes[row] for row in firsts]),
        shard_indexes=array("I", [description.shard_indexes[row] for row in firsts]),
        offsets=begins,
        lengths=array("Q", [end - begin for begin, end in zip(begins, ends, strict=True)]),
        dims=dims,
        dim_ends=array("I", accumulate(ranks)),
        file_format=description.file_format,
        notes=description.notes,
    )
    return Carried(loaded, range(len(loaded)), views)


def _clusters(description: Description, rows: Sequence[int]) -> Iterator[list[int]]:
    """Rows whose byte ranges overlap, in order; a tensor without bytes is alone."""
    cluster: list[int] = []
    shard, end = -1, 0
    waiting: list[int] = []
    for row in rows:
        begin, length = description.offsets[row], description.lengths[row]
        if not length:
            waiting.append(row)
            continue
        if cluster and description.shard_indexes[row] == shard and begin < end:
            cluster.append(row)
            end = max(end, begin + length)
            continue
        if cluster:
            yield cluster
        yield from ([empty] for empty in waiting)
        waiting.clear()
        cluster, shard, end = [row], description.shard_indexes[row], begin + length
    if cluster:
        yield cluster
    yield from ([empty] for empty in waiting)


def _view(description: Description, row: int, begin: int, item: int) -> View:
    shape = description.shape(row)
    strides = description.strides.get(row)
    if strides is None:
        strides = tuple(accumulate(shape[:0:-1], lambda step, size: step * size, initial=1))[::-1] if shape else ()
    return View(description.names[row], (description.offsets[row] - begin) // item, shape, strides)
