"""Making a :class:`~weightlift.types.LoadReport` out of what a load observed, with reasons in sentences."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from msgspec.structs import replace

from weightlift.ceilings import known_ceilings
from weightlift.options import DEQUANTIZE_BYTES
from weightlift.types import BudgetTerm, FileReport, HostMemoryReport, LoadReport, Method, Staging
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightlift.description import Description
    from weightlift.fitting import FitReport
    from weightlift.monitor import MonitorResult
    from weightlift.operations import Counters, ShardUse
    from weightlift.options import LoadOptions
    from weightlift.pipeline import Transfer
    from weightlift.plan import ShardFacts

_LINK_SHARE = 0.08
"""Share of the workers' time spent waiting for devices from which on the link counts as the bottleneck."""

_WHOLE = 0.99
"""From this share on a file counts as wholly cached in a sentence; under the rest to 1, as not cached at all."""


def used_by_method(use: ShardUse) -> dict[str, int]:
    """Bytes by read path, under the names the report uses."""
    return {"direct": use.direct_bytes, "buffered": use.buffered_bytes, "mmap": use.mapped_bytes}


def file_reason(method: Method, facts: ShardFacts, use: ShardUse, *, keep: bool) -> str:
    """Why a shard was read the way it was, in one sentence.

    Args:
        method: what the caller asked for.
        facts: what was known of the shard beforehand.
        use: how it was read.
        keep: whether the page cache was allowed to keep it.
    """
    if use.refused_bytes:
        name = errno.errorcode.get(use.refused_errno, str(use.refused_errno))
        why = f"{name}: {os.strerror(use.refused_errno)}" if use.refused_errno else "a short read"
        return (
            f"direct reads were refused on the way ({why}), so {use.refused_bytes:,} bytes went through the page cache"
        )
    if method is not Method.AUTO:
        if method is Method.DIRECT and not facts.direct:
            return f"read through the page cache, because {facts.direct_reason}"
        return f"method={method.value} was asked for"
    cached = facts.residency.cached_bytes / max(1, facts.residency.looked_bytes) if facts.residency else None
    if cached is not None and cached > _WHOLE:
        return "the file was in the page cache already, which is faster than any drive"
    share = f"{cached:.0%} of the file was in the page cache" if cached and cached > 1 - _WHOLE else ""
    if keep:
        return f"{share + '; ' if share else ''}{_kept(use)}"
    if use.direct_bytes:
        if share and use.buffered_bytes:
            return f"{share} and was taken from there, the rest was read directly past it"
        state = "what the page cache holds is unknown" if cached is None else "the file was not in the page cache"
        return f"{state} and is not meant to stay there, so it was read directly"
    return f"read through the page cache without leaving it there, because {facts.direct_reason}"


def _kept(use: ShardUse) -> str:
    if not use.direct_bytes:
        return "read through the page cache, where it stays for the next load"
    if not use.buffered_bytes:
        return "read directly to compare that with reading through the page cache, where it stays for the next load"
    compared = format_bytes(use.direct_bytes)
    return f"read through the page cache, where it stays for the next load, except {compared} read directly to compare"


def worker_seconds(counters: Counters) -> dict[str, float]:
    """What the workers' time went to, under the names the report uses."""
    return {
        "storage": counters.storage_seconds,
        "page cache": counters.cache_seconds,
        "preparing memory": counters.populate_seconds,
        "copying": counters.copy_seconds,
        "device": counters.device_seconds,
        "pinning": counters.register_seconds,
        "waiting for a slot": counters.slot_wait_seconds,
    }


def bottleneck(
    counters: Counters,
    *,
    consumer_seconds: float = 0.0,
    waiting_seconds: float = 0.0,
    handed_over: str = "processor",
) -> str:
    """What the time went to: ``storage``, ``memory copy``, ``link``, ``processor`` or ``consumer``.

    Args:
        counters: the engine's counters at the end.
        consumer_seconds: for streams, how long the program kept a tensor before it asked for the next.
        waiting_seconds: for streams, how long it then had to wait for it. With reading ahead, a program slower than the
            load hardly waits at all.
        handed_over: what holds slots up that are handed over: weightlift's own conversion and hashing, or the
            framework's own copies to a device.
    """
    if consumer_seconds > waiting_seconds:
        return "consumer"
    reading = counters.storage_seconds + counters.cache_seconds + counters.copy_seconds + counters.register_seconds
    if counters.device_seconds > _LINK_SHARE * (reading + counters.device_seconds):
        # Workers wait for the device only once all slots are on their way.
        return "link"
    spent = {
        "storage": counters.storage_seconds,
        "memory copy": counters.cache_seconds + counters.copy_seconds + counters.populate_seconds,
    }
    spent[handed_over] = spent.get(handed_over, 0.0) + counters.slot_wait_seconds
    return max(spent, key=lambda key: spent[key]) if any(spent.values()) else "none"


def _bottleneck(transfer: Transfer, counters: Counters, staging: str) -> str:
    return bottleneck(
        counters,
        consumer_seconds=transfer.consumer_seconds,
        waiting_seconds=transfer.waiting_seconds,
        handed_over="link" if staging == "framework" else "processor",
    )


def _staging(transfer: Transfer, options: LoadOptions, device: str, reason: str) -> tuple[str, str]:
    """What lay between storage and a device, and why."""
    if device in {"cpu", "null"}:
        return "none", "the memory of the tensors is filled in place"
    if reason:
        return "framework", reason
    if options.staging is Staging.PAGEABLE:
        return "pageable", "staging=pageable was asked for"
    if transfer.refused_bytes:
        refused = format_bytes(transfer.refused_bytes)
        if transfer.pinned_bytes:
            return "pinned", f"the device's runtime refused to pin {refused} of it, which stayed pageable"
        return (
            "pageable",
            f"the device's runtime refused to pin memory ({refused}), so copies came from ordinary memory",
        )
    return "pinned", "copies out of pinned memory run at the speed of the link"


def _dequantizing(options: LoadOptions) -> tuple[BudgetTerm, ...]:
    if not options.dequantize:
        return ()
    reason = "working memory of the gguf package's routines, which get a few blocks at a time"
    return (BudgetTerm(name="dequantising", nbytes=DEQUANTIZE_BYTES, reason=reason),)


def summarise(
    transfer: Transfer,
    description: Description,
    rows: Sequence[int],
    options: LoadOptions,
    *,
    device: str,
    finished: tuple[Counters, MonitorResult, int | None],
    digests: Mapping[str, str],
    staging_reason: str = "",
    fit: FitReport | None = None,
) -> LoadReport:
    """The report of a finished transfer.

    Args:
        transfer: the load, finished.
        description: the checkpoint.
        rows: the rows that were read.
        options: the caller's options.
        device: where the tensors are.
        finished: what :meth:`~weightlift.pipeline.Transfer.finish` returned.
        digests: digests by tensor name.
        staging_reason: why a device was not reached through its runtime.
        fit: what was found out about memory beforehand.
    """
    staging, staging_reason = _staging(transfer, options, device, staging_reason)
    counters, observed, cached = finished
    files = _files(transfer, description, options)
    used: dict[str, int] = {key: sum(file.used[key] for file in files) for key in ("direct", "buffered", "mmap")}
    return LoadReport(
        tensors=len(rows),
        nbytes=description.bytes_of(rows),
        seconds=time.monotonic() - transfer.started,
        phases=transfer.phases,
        device=device,
        engine=transfer.engine_name,
        method_requested=options.method.value,
        method_used=used,
        reason="; ".join((_overall(files, transfer.cache.reason), *description.notes)),
        cache_requested=options.cache.value,
        cache_decided="keep" if transfer.cache.keep else "drop",
        files=files,
        staging=staging,
        staging_reason=staging_reason,
        workers=counters.workers,
        chunk_bytes=transfer.chunk_bytes,
        host_memory=_host_memory(transfer, description, options, observed),
        page_cache_before_bytes=transfer.shards.cached_before(),
        page_cache_after_bytes=cached,
        swap_in_bytes=observed.swap_in_bytes,
        swap_out_bytes=observed.swap_out_bytes,
        pressure_stall_seconds=observed.pressure_stall_seconds,
        ceilings=known_ceilings((description.shards[index].identity.device for index in transfer.uses), device),
        bottleneck=_bottleneck(transfer, counters, staging),
        group_stall_seconds=observed.group_stall_seconds,
        worker_seconds=worker_seconds(counters),
        consumer_seconds=transfer.consumer_seconds if transfer.waiting_seconds else None,
        floor_bytes=transfer.supervisor.floor_bytes,
        interventions=tuple(transfer.supervisor.interventions),
        samples=observed.samples,
        digests=digests,
        fit=fit.sentence if fit is not None else "",
    )


def _files(transfer: Transfer, description: Description, options: LoadOptions) -> tuple[FileReport, ...]:
    """How every shard was read, and why."""
    facts, keep = transfer.shards.facts, transfer.cache.keep
    return tuple(
        FileReport(
            path=str(description.shards[index].path),
            used=used_by_method(use),
            reason=file_reason(options.method, facts[index], use, keep=keep),
        )
        for index, use in transfer.uses.items()
    )


def _host_memory(
    transfer: Transfer, description: Description, options: LoadOptions, observed: MonitorResult
) -> HostMemoryReport:
    pool = transfer.pool
    return HostMemoryReport(
        budget_bytes=options.host_memory,
        staging_bytes=pool.slot_count * pool.slot_bytes,
        description_bytes=description.nbytes,
        peak_anonymous_bytes=observed.peak_anonymous_bytes,
        peak_file_bytes=observed.peak_file_bytes,
        peak_shared_bytes=observed.peak_shared_bytes,
        peak_pinned_bytes=transfer.pinned_bytes,
        terms=(*pool.terms, *_dequantizing(options)),
    )


def summarise_mapped(
    transfer: Transfer,
    description: Description,
    rows: Sequence[int],
    options: LoadOptions,
    *,
    owned: Sequence[int],
    finished: tuple[Counters, MonitorResult, int | None],
    digests: Mapping[str, str],
    fit: FitReport | None = None,
) -> LoadReport:
    """The report of a load that handed out mapped tensors, of which ``owned`` rows had to be read instead."""
    base = summarise(transfer, description, rows, options, device="cpu", finished=finished, digests=digests, fit=fit)
    kind = "shared read-only" if options.readonly else "private copy-on-write"
    reason = f"method=mmap was asked for: the tensors are {kind} views of the files and are read when first touched"
    if owned:
        reason += f"; {len(owned)} lie at addresses wrong for their data type and were read into memory of their own"
    handed_out = base.nbytes - description.bytes_of(owned)
    return replace(
        base,
        engine=base.engine if owned else "none",
        method_used={**base.method_used, "mmap": base.method_used["mmap"] + handed_out},
        reason=reason,
        bottleneck=base.bottleneck if owned else "none",
    )


def _overall(files: Sequence[FileReport], cache_reason: str) -> str:
    reasons = list(dict.fromkeys(file.reason for file in files))
    if not reasons:
        return "nothing had to be read"
    more = f" (and {len(reasons) - 1} other reasons among {len(files)} files)" if len(reasons) > 1 else ""
    return f"{reasons[0]}{more}; {cache_reason}"
