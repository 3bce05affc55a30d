"""Loading a selection of tensors at once: picks the target, runs the transfer, makes tensors and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from weightlift.collector import collector_resting
from weightlift.destinations import Destinations
from weightlift.engines.probing import run_probes
from weightlift.errors import IntegrityError
from weightlift.fitting import CacheFit, explaining_device_memory, require_fit
from weightlift.host.memory import available_processors
from weightlift.manifest import as_manifest, described_differences, digest_differences, missing_tensors, refuse
from weightlift.pipeline import Transfer
from weightlift.plan import decide_cache
from weightlift.reach import reach_of
from weightlift.shards import OpenShards
from weightlift.summary import summarise, summarise_mapped
from weightlift.targets.digest import DigestTarget, digest_tensors
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.host import HostTarget
from weightlift.targets.mapped import map_shards, mappable_rows, mapped_tensors
from weightlift.targets.null import NullTarget
from weightlift.types import Method
from weightlift.views import carry
from weightlift.weighing import weigh, within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.description import Description
    from weightlift.fitting import FitReport
    from weightlift.manifest import Manifest
    from weightlift.options import LoadOptions
    from weightlift.targets.base import Target
    from weightlift.targets.device import DeviceAccess
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
    manifest = required_manifest(description, rows, options)
    if where.discards:
        fit = _weigh(description, rows, options, where, None)
        null = _null_target(description, rows, options)
        return transfer_rows(description, rows, within(fit, options), null, fit=fit, manifest=manifest)
    if _hands_out_mappings(where, options):
        return _load_mapped(description, rows, options, where, manifest)
    target = where.target(rows)
    fit = _weigh(description, rows, options, where, target)
    require_fit(fit)
    with explaining_device_memory(fit):
        return transfer_rows(
            description,
            rows,
            within(fit, options),
            target,
            fit=fit,
            accesses=where.accesses,
            staging_reason=where.staging_reason,
            manifest=manifest,
        )


def _load_carried(carried: Carried, description: Description, rows: Sequence[int], options: LoadOptions) -> Loaded:
    """Load tensors that share bytes or are strided: each range once, then views of it."""
    manifest = required_manifest(description, rows, options)
    digests = {}
    if options.digest or manifest is not None:
        hashed = DigestTarget(description, rows, available_processors())
        transfer_rows(description, rows, replace(options, recording=None), hashed, manifest=manifest)
        digests = hashed.digests if options.digest else {}
    loaded, report = load_rows(carried.description, carried.rows, replace(options, digest=False, verify=None))
    tensors = list(carried.expand(loaded, pick_framework(options.framework).strided)) if loaded else []
    return tensors, replace(report, tensors=len(rows), digests=digests)


def required_manifest(description: Description, rows: Sequence[int], options: LoadOptions) -> Manifest | None:
    """The manifest that the tensors have to satisfy, if one was given; names, types and shapes do already.

    Raises:
        IntegrityError: a tensor is not described as the manifest says, or one that was not left out is missing.
        ManifestError: the manifest itself is no good.
    """
    if options.verify is None:
        return None
    manifest = as_manifest(options.verify)
    differences = described_differences(description, rows, manifest)
    if options.names is None:
        missing = missing_tensors(description, manifest)
        differences |= dict.fromkeys(missing, "is in the manifest and not in the checkpoint")
    refuse(description, differences)
    return manifest


def verify_beforehand(
    description: Description, rows: Sequence[int], options: LoadOptions, manifest: Manifest | None
) -> None:
    """Read tensors once only to hash them, where they cannot be looked at before they are handed out.

    Raises:
        IntegrityError: a tensor has other bytes than the manifest says.
    """
    if manifest is not None:
        target = DigestTarget(description, rows, available_processors())
        transfer_rows(description, rows, options, target, manifest=manifest)


def fit_rows(description: Description, rows: Sequence[int], options: LoadOptions) -> FitReport:
    """What loading some rows will take and what there is, without reading data or allocating anything.

    Args:
        description: the checkpoint.
        rows: the selected rows, in file order.
        options: how they would be loaded.

    Raises:
        WeightliftError: the options do not go together, or a file is not there any more.
    """
    carried = carry(description, rows)
    if carried is not None:
        description, rows = carried.description, carried.rows
    where = Destinations(description, rows, options)
    keeps = not where.discards and not _hands_out_mappings(where, options)
    fit = _weigh(description, rows, options, where, where.target(rows) if keeps else None, thorough=True)
    return replace(fit, cache=_weigh_cache(description, rows, options, fit))


def _weigh_cache(description: Description, rows: Sequence[int], options: LoadOptions, fit: FitReport) -> CacheFit:
    """What the load would decide about the page cache."""
    used, parts = reach_of(description, rows)
    with OpenShards(description, used, want_direct=False, parts=parts, ask=run_probes) as shards:
        facts, cached = [shards.facts[index] for index in used], shards.cached_before()
    decision = decide_cache(
        options.cache,
        options.method,
        facts,
        destination_bytes=fit.tensor_bytes,
        available_bytes=fit.room.available_bytes if fit.room else None,
    )
    total = sum(shard.size_bytes for shard in facts)
    return CacheFit(file_bytes=total, cached_bytes=cached, keep=decision.keep, reason=decision.reason)


def _hands_out_mappings(where: Destinations, options: LoadOptions) -> bool:
    as_stored = options.dtype is None and where.dequantizer is None
    return options.method is Method.MMAP and where.in_host_memory and as_stored


def _weigh(
    description: Description,
    rows: Sequence[int],
    options: LoadOptions,
    where: Destinations,
    target: Target | None,
    *,
    thorough: bool = False,
) -> FitReport:
    total = description.bytes_of(rows)
    mapped = target is None and not where.discards
    return weigh(
        description,
        options,
        host_bytes=target.host_bytes if target is not None else 0,
        mapped_bytes=total if mapped else 0,
        staged_bytes=target.staged_bytes if isinstance(target, HostTarget) else 0 if mapped else total,
        accesses=where.accesses,
        device_bytes={} if where.in_host_memory else where.device_bytes(rows),
        thorough=thorough,
    )


def _null_target(description: Description, rows: Sequence[int], options: LoadOptions) -> Target:
    if options.digest or options.verify is not None:
        return DigestTarget(description, rows, available_processors())
    return NullTarget(description, rows)


def transfer_rows(
    description: Description,
    rows: Sequence[int],
    options: LoadOptions,
    target: Target,
    *,
    fit: FitReport | None = None,
    accesses: Sequence[DeviceAccess] = (),
    staging_reason: str = "",
    manifest: Manifest | None = None,
) -> Loaded:
    """Read what a target wants, and report.

    Args:
        description: the checkpoint.
        rows: the rows the target was made for.
        options: how.
        target: where the tensors go.
        fit: whether that fits, for the report.
        accesses: the GPUs that the target copies to.
        staging_reason: why some device is not among them.
        manifest: what the bytes of the tensors have to be.

    Raises:
        IntegrityError: a tensor has other bytes than the manifest says.
    """
    transfer = Transfer(
        description,
        reach_of(description, rows),
        options,
        destination_bytes=target.host_bytes,
        accesses=accesses,
        room=fit.room if fit is not None else None,
    )
    with transfer.aborting():
        transfer.run(target)
        wanted = options.digest or manifest is not None
        digests = _digests(description, rows, options, target) if wanted else {}
        tensors = transfer.tensors(target)
        if isinstance(target, DigestTarget):
            digests = {description.names[row]: target.digests[description.names[row]] for row in rows}
        if manifest is not None:
            refuse(description, digest_differences(digests, manifest))
        finished = transfer.finish()
    report = summarise(
        transfer,
        description,
        rows,
        options,
        device=target.device,
        staging_reason=staging_reason,
        finished=finished,
        digests=digests if options.digest else {},
        fit=fit,
    )
    return tensors, report


def _digests(description: Description, rows: Sequence[int], options: LoadOptions, target: Target) -> dict[str, str]:
    if isinstance(target, DigestTarget):
        return {}
    if isinstance(target, HostTarget):
        return digest_tensors(dict(target.stored()), available_processors())
    # Converted tensors no longer hold the bytes as stored, so these are read once more.
    second = DigestTarget(description, rows, available_processors())
    transfer_rows(description, rows, replace(options, recording=None), second)
    return second.digests


def _load_mapped(
    description: Description,
    rows: Sequence[int],
    options: LoadOptions,
    where: Destinations,
    manifest: Manifest | None,
) -> Loaded:
    """Hand out views of mapped files; tensors misaligned in the file are read into memory of their own."""
    maker, fit = where.maker, _weigh(description, rows, options, where, None)
    mapped = mappable_rows(description, rows)
    aligned = set(mapped)
    owned = [row for row in rows if row not in aligned]
    target = HostTarget(description, owned, maker)
    reach = reach_of(description, rows)
    transfer = Transfer(
        description,
        reach,
        options,
        destination_bytes=target.host_bytes,
        look_at_cache=bool(owned),
        room=fit.room,
    )
    with transfer.aborting():
        transfer.run(target)
        descriptors = {index: transfer.shards.sources[index].descriptor for index in reach.shards}
        mappings = map_shards(
            description, reach.shards, descriptors, readonly=options.readonly, keep=transfer.cache.keep
        )
        digests = {}
        if options.digest or manifest is not None:
            digests = _digests_of_mappings(description, rows, mappings)
        try:
            if manifest is not None:
                refuse(description, digest_differences(digests, manifest))
        except IntegrityError:
            # The error's traceback would keep them as long as somebody keeps the error.
            for mapping in mappings.values():
                mapping.close()
            raise
        with collector_resting(len(rows)):
            tensors = list(mapped_tensors(description, mapped, mappings, maker))
            if owned:
                tensors = _in_order(description, rows, tensors + transfer.tensors(target))
        finished = transfer.finish()
    shown = digests if options.digest else {}
    report = summarise_mapped(
        transfer, description, rows, options, owned=owned, finished=finished, digests=shown, fit=fit
    )
    return tensors, report


def _in_order(
    description: Description, rows: Sequence[int], tensors: Sequence[tuple[str, Any]]
) -> list[tuple[str, Any]]:
    by_name = dict(tensors)
    return [(description.names[row], by_name[description.names[row]]) for row in rows]


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
