"""Frozen values that cross module boundaries: what was asked for, what was decided, what happened."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from weightlift.samples import Intervention, Sample


class Method(enum.StrEnum):
    """How bytes leave storage."""

    AUTO = "auto"
    MMAP = "mmap"
    DIRECT = "direct"
    BUFFERED = "buffered"


class CachePolicy(enum.StrEnum):
    """What happens to the page cache: decide from the headroom, let the file stay, or leave it as it was found."""

    AUTO = "auto"
    KEEP = "keep"
    DROP = "drop"


class Staging(enum.StrEnum):
    """Which memory lies between storage and a device; CPU destinations are filled in place and need ``none``."""

    AUTO = "auto"
    NONE = "none"
    PINNED = "pinned"
    PAGEABLE = "pageable"


class EngineName(enum.StrEnum):
    """Which engine moves the bytes."""

    AUTO = "auto"
    NATIVE = "native"
    PYTHON = "python"


class Framework(enum.StrEnum):
    """Whose tensors the caller gets."""

    AUTO = "auto"
    TORCH = "torch"
    NUMPY = "numpy"


class HeaderRules(enum.StrEnum):
    """How headers are judged: as the format's reference parser does, or refusing all it tolerates."""

    REFERENCE = "reference"
    STRICT = "strict"


class FileReport(Struct, frozen=True, kw_only=True):
    """How one shard was read.

    Attributes:
        path: the shard.
        used: bytes read by each method.
        reason: why, in one sentence.
    """

    path: str
    used: Mapping[str, int]
    reason: str


class BudgetTerm(Struct, frozen=True, kw_only=True):
    """One term of the sum that the host-memory budget is spent on.

    Attributes:
        name: what the memory is.
        nbytes: how much of it.
        reason: why that much.
    """

    name: str
    nbytes: int
    reason: str


class HostMemoryReport(Struct, frozen=True, kw_only=True):
    """Host memory planned and observed, in bytes.

    Attributes:
        budget_bytes: the bound the caller set.
        staging_bytes: slots that the plan reserved.
        description_bytes: the checkpoint's own description, reported beside the budget.
        peak_anonymous_bytes: sampled growth of private anonymous memory over the start of the load, without the
            destination tensors; ``None`` where the system does not tell.
        peak_file_bytes: sampled growth of file-backed resident memory; ``None`` where unknown.
        peak_shared_bytes: sampled growth of shared memory; ``None`` where unknown.
        peak_pinned_bytes: most memory pinned for a device at one time.
        terms: the budget, term by term.
    """

    budget_bytes: int
    staging_bytes: int
    description_bytes: int
    peak_anonymous_bytes: int | None
    peak_file_bytes: int | None
    peak_pinned_bytes: int
    peak_shared_bytes: int | None = None
    terms: tuple[BudgetTerm, ...] = ()


class LoadReport(Struct, frozen=True, kw_only=True):
    """What a load did, measured while it ran.

    Attributes:
        tensors: how many tensors were delivered.
        nbytes: their bytes as stored.
        seconds: wall time of the whole call.
        phases: seconds per phase: ``open``, ``plan``, ``read``, ``finish``.
        device: where the tensors are.
        engine: ``native`` or ``python``; ``none`` where nothing had to be read (mapped tensors).
        method_requested: the caller's method.
        method_used: bytes read by each method.
        reason: why, in a sentence for the person who asked.
        cache_requested: the caller's cache policy.
        cache_decided: ``keep`` or ``drop``.
        files: the same per shard.
        staging: what lay between storage and a device: ``pinned`` or ``pageable`` memory of weightlift's, the
            ``framework``'s own copies, or ``none``.
        staging_reason: why, in one sentence.
        workers: threads reading when the load ended.
        chunk_bytes: bytes per read when the load ended.
        host_memory: memory planned and observed.
        page_cache_before_bytes: cached bytes of the files at the start, of a load of some tensors only of the stretches
            around them; ``None`` where unknown.
        page_cache_after_bytes: the same at the end.
        swap_in_bytes: machine-wide swap-in during the load; ``None`` where unknown.
        swap_out_bytes: machine-wide swap-out during the load; ``None`` where unknown.
        pressure_stall_seconds: time in which some task waited for memory, machine-wide; ``None`` where unknown.
        group_stall_seconds: the same in this process's control group.
        ceilings: known limits in GB/s by name (``storage``, ``memory_copy``, ``link``), ``None`` where unknown.
        bottleneck: what the workers spent their time on: ``storage``, ``memory copy``, ``link``,
            ``processor``, ``consumer``.
        worker_seconds: what the workers' time went to, summed over all of them, by what they did.
        consumer_seconds: for streams, time in which the program had a tensor and did not ask for the next one.
        floor_bytes: memory that the load was to leave to others; ``None`` where the system does not tell what is left.
        interventions: what was done on the way because memory got short.
        samples: the load from start to end, in a bounded number of points; not part of the JSON object.
        digests: xxh3-128 per tensor in hexadecimal, where asked for.
        fit: what was known beforehand of the memory needed and there, in one sentence; empty where nothing was asked.
    """

    tensors: int
    nbytes: int
    seconds: float
    phases: Mapping[str, float]
    device: str
    engine: str
    method_requested: str
    method_used: Mapping[str, int]
    reason: str
    cache_requested: str
    cache_decided: str
    files: tuple[FileReport, ...]
    staging: str
    staging_reason: str
    workers: int
    chunk_bytes: int
    host_memory: HostMemoryReport
    page_cache_before_bytes: int | None
    page_cache_after_bytes: int | None
    swap_in_bytes: int | None
    swap_out_bytes: int | None
    pressure_stall_seconds: float | None
    ceilings: Mapping[str, float | None]
    bottleneck: str
    group_stall_seconds: float | None = None
    worker_seconds: Mapping[str, float] = field(default_factory=dict)
    consumer_seconds: float | None = None
    floor_bytes: int | None = None
    interventions: tuple[Intervention, ...] = ()
    samples: tuple[Sample, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    fit: str = ""

    @property
    def gigabytes_per_second(self) -> float:
        """Throughput over the whole call, in 10^9 bytes a second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The report as the one JSON object that ``weightlift load --json`` prints."""
        memory = self.host_memory
        return {
            "schema": 1,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "gigabytes_per_second": self.gigabytes_per_second,
            "phases": dict(self.phases),
            "device": self.device,
            "engine": self.engine,
            "staging": {"used": self.staging, "reason": self.staging_reason},
            "workers": self.workers,
            "chunk_bytes": self.chunk_bytes,
            "method": {
                "requested": self.method_requested,
                "used": dict(self.method_used),
                "reason": self.reason,
            },
            "cache": {"requested": self.cache_requested, "decided": self.cache_decided},
            "files": [{"path": file.path, "used": dict(file.used), "reason": file.reason} for file in self.files],
            "host_memory": {
                "budget_bytes": memory.budget_bytes,
                "staging_bytes": memory.staging_bytes,
                "description_bytes": memory.description_bytes,
                "peak_anonymous_bytes": memory.peak_anonymous_bytes,
                "peak_file_bytes": memory.peak_file_bytes,
                "peak_shared_bytes": memory.peak_shared_bytes,
                "peak_pinned_bytes": memory.peak_pinned_bytes,
                "floor_bytes": self.floor_bytes,
                "terms": [{"name": term.name, "bytes": term.nbytes, "reason": term.reason} for term in memory.terms],
            },
            "page_cache": {
                "before_bytes": self.page_cache_before_bytes,
                "after_bytes": self.page_cache_after_bytes,
            },
            "swap": {"in_bytes": self.swap_in_bytes, "out_bytes": self.swap_out_bytes},
            "pressure_stall_seconds": self.pressure_stall_seconds,
            "group_stall_seconds": self.group_stall_seconds,
            "interventions": [entry._asdict() for entry in self.interventions],
            "worker_seconds": dict(self.worker_seconds),
            "consumer_seconds": self.consumer_seconds,
            "ceilings": dict(self.ceilings),
            "bottleneck": self.bottleneck,
            "fit": self.fit or None,
            "digest": dict(self.digests),
        }
