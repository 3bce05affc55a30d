"""Loading a selection of tensors at once: picks the target, runs the transfer, makes tensors and report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightlift.destinations import Destinations
from weightlift.errors import InsufficientMemoryError
from weightlift.host.memory import available_processors, headroom
from weightlift.pipeline import Transfer
from weightlift.summary import summarise, summarise_mapped
from weightlift.targets.digest import DigestTarget, digest_tensors
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.host import HostTarget
from weightlift.targets.mapped import map_shards, mappable_rows, mapped_tensors
from weightlift.targets.null import NullTarget
from weightlift.types import Method
from weightlift.units import format_bytes
from weightlift.views import carry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.description import Description
    from weightlift.options import LoadOptions
    from weightlift.targets.base import Target
    from weightlift.targets.device import DeviceAccess
    from weightlift.targets.frameworks import TensorMaker
    from weightlift.types import LoadReport
    from weightlift.views import Carried

Loaded = tuple[list[tuple[str, Any]], "LoadReport"]


def load_rows(description: Description, rows: Sequence[int], options: LoadOptions) -> Loaded:
    """Load the tensors of some rows.

    Args:
        description: the checkpoint.
        rows: the selected rows, in file order.
        options: how.

    Raises:
        WeightliftError: see :mod:`weightlift.errors`.
    """
    carried = carry(description, rows)
    if carried is not None:
        return _load_carried(carried, description, rows, options)
    where = Destinations(description, rows, options)
    if where.discards:
        return transfer_rows(description, rows, options, _null_target(description, rows, options))
    as_stored = options.dtype is None and where.dequantizer is None
    if options.method is Method.MMAP and where.in_host_memory and as_stored:
        return _load_mapped(description, rows, options, where.maker)
    target = where.target(rows)
    check_fit(target)
    return transfer_rows(
        description, rows, options, target, accesses=where.accesses, staging_reason=where.staging_reason
    )


def _load_carried(carried: Carried, description: Description, rows: Sequence[int], options: LoadOptions) -> Loaded:
    """Load tensors that share bytes or are strided: each range once, then views of it."""
    loaded, report = load_rows(carried.description, carried.rows, replace(options, digest=False))
    digests = {}
    if options.digest:
        digests = dict(transfer_rows(description, rows, options, _null_target(description, rows, options))[1].digests)
    tensors = list(carried.expand(loaded, pick_framework(options.framework).strided)) if loaded else []
    return tensors, replace(report, tensors=len(rows), digests=digests)


def check_fit(target: Target) -> None:
    """Raise before anything is read if the tensors cannot fit this machine or its cgroup.

    Raises:
        InsufficientMemoryError: says by how much.
    """
    if not target.host_bytes:
        return
    room = headroom()
    if room is None or target.host_bytes <= room.available_bytes + room.swap_free_bytes:
        return
    raise InsufficientMemoryError(
        f"the tensors need {format_bytes(target.host_bytes)} of memory and {room.sentence}",
        hint='load part of them (names=…), stream them (weightlift.stream), use method="mmap", or add swap',
    )


def _null_target(description: Description, rows: Sequence[int], options: LoadOptions) -> Target:
    if options.digest:
        return DigestTarget(description, rows, available_processors())
    return NullTarget(description, rows)


def shards_of(description: Description, rows: Sequence[int]) -> list[int]:
    """The shards that hold bytes of some rows."""
    if len(rows) == len(description):
        return sorted(set(description.shard_indexes))
    return sorted({description.shard_indexes[row] for row in rows})


def transfer_rows(
    description: Description,
    rows: Sequence[int],
    options: LoadOptions,
    target: Target,
    *,
    accesses: Sequence[DeviceAccess] = (),
    staging_reason: str = "",
) -> Loaded:
    """Read what a target wants, and report.

    Args:
        description: the checkpoint.
        rows: the rows the target was made for.
        options: how.
        target: where the tensors go.
        accesses: the GPUs that the target copies to.
        staging_reason: why some device is not among them.
    """
    transfer = Transfer(
        description,
        shards_of(description, rows),
        options,
        destination_bytes=target.host_bytes,
        accesses=accesses,
    )
    transfer.run(target)
    with transfer.aborting():
        digests = _digests(description, rows, options, target)
        tensors = transfer.tensors(target)
    finished = transfer.finish()
    if isinstance(target, DigestTarget):
        digests = {description.names[row]: target.digests[description.names[row]] for row in rows}
    report = summarise(
        transfer,
        description,
        rows,
        options,
        device=target.device,
        staging_reason=staging_reason,
        finished=finished,
        digests=digests,
    )
    return tensors, report


def _digests(description: Description, rows: Sequence[int], options: LoadOptions, target: Target) -> dict[str, str]:
    if not options.digest or isinstance(target, DigestTarget):
        return {}
    if isinstance(target, HostTarget):
        return digest_tensors(dict(target.stored()), available_processors())
    # Converted tensors no longer hold the bytes as stored, so these are read once more.
    second = DigestTarget(description, rows, available_processors())
    _, report = transfer_rows(description, rows, options, second)
    return dict(report.digests)


def _load_mapped(description: Description, rows: Sequence[int], options: LoadOptions, maker: TensorMaker) -> Loaded:
    """Hand out views of mapped files; tensors misaligned in the file are read into memory of their own."""
    mapped = mappable_rows(description, rows)
    aligned = set(mapped)
    owned = [row for row in rows if row not in aligned]
    target = HostTarget(description, owned, maker)
    used = shards_of(description, rows)
    transfer = Transfer(description, used, options, destination_bytes=target.host_bytes, look_at_cache=bool(owned))
    transfer.run(target)
    with transfer.aborting():
        descriptors = {index: transfer.shards.sources[index].descriptor for index in used}
        mappings = map_shards(description, used, descriptors, readonly=options.readonly)
        tensors = dict(mapped_tensors(description, mapped, mappings, maker)) | dict(target.finish())
        digests = {}
        if options.digest:
            digests = _digests_of_mappings(description, rows, mappings)
    finished = transfer.finish()
    report = summarise_mapped(transfer, description, rows, options, owned=owned, finished=finished, digests=digests)
    return [(description.names[row], tensors[description.names[row]]) for row in rows], report


def _digests_of_mappings(description: Description, rows: Sequence[int], mappings: dict[int, Any]) -> dict[str, str]:
    buffers = {}
    for row in rows:
        start, length = description.offsets[row], description.lengths[row]
        whole = memoryview(mappings[description.shard_indexes[row]]) if length else memoryview(b"")
        buffers[description.names[row]] = whole[start : start + length] if length else whole
    digests = digest_tensors(buffers, available_processors())
    for view in buffers.values():
        view.release()
    return digests
