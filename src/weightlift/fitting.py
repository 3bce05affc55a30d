"""Whether a load fits before anything is read: pure arithmetic over what is wanted and what is free.

Owns the comparison and its words. Knows nothing of files or frameworks; who asks brings the facts. What the host cannot
hold is an error beforehand, since the alternative is a frozen machine. What a device cannot hold is only told: its
memory may be freed meanwhile, and callers act on the framework's own out-of-memory error.
"""

from __future__ import annotations

import contextlib
import enum
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from msgspec.structs import asdict

from weightlift.errors import InsufficientMemoryError
from weightlift.host.memory import Headroom
from weightlift.options import SMALLEST_HOST_MEMORY_BYTES
from weightlift.units import MIB, align_down, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


_SHARE_OF_REST: Final = 0.5
"""Part of what the tensors leave free that staging may take where its whole budget would not fit."""


class Verdict(enum.StrEnum):
    """Whether the host can hold a load."""

    FITS = "fits"
    SWAPS = "fits only with swap"
    LACKS = "does not fit"
    UNKNOWN = "unknown"


class DeviceFit(Struct, frozen=True, kw_only=True):
    """One device's part of a load, in bytes; ``None`` where nobody tells.

    Attributes:
        device: the framework's name of it.
        tensor_bytes: what the tensors take there.
        free_bytes: what its driver calls free.
        reusable_bytes: what the framework's allocator holds without using it.
        total_bytes: all its memory.
    """

    device: str
    tensor_bytes: int
    free_bytes: int | None = None
    reusable_bytes: int | None = None
    total_bytes: int | None = None

    @property
    def missing_bytes(self) -> int:
        """How much the device lacks, as far as is known."""
        if self.free_bytes is None:
            return 0
        return max(0, self.tensor_bytes - self.free_bytes - (self.reusable_bytes or 0))

    @property
    def sentence(self) -> str:
        """What is wanted and what is there."""
        wanted = f"the tensors take {format_bytes(self.tensor_bytes)} on {self.device}"
        if self.free_bytes is None:
            return f"{wanted}, and how much is free there is unknown"
        held = f" and {format_bytes(self.reusable_bytes)} more held by the framework" if self.reusable_bytes else ""
        verdict = f": {format_bytes(self.missing_bytes)} too little" if self.missing_bytes else ""
        return f"{wanted}, where {format_bytes(self.free_bytes)} are free{held}{verdict}"


class CacheFit(Struct, frozen=True, kw_only=True):
    """What would become of the page cache, in bytes.

    Attributes:
        file_bytes: the files that would be read.
        cached_bytes: what the page cache holds of them; ``None`` where unknown.
        keep: whether what is read may stay there.
        reason: why, in a sentence.
    """

    file_bytes: int
    cached_bytes: int | None
    keep: bool
    reason: str


class FitReport(Struct, frozen=True, kw_only=True):
    """What a load will take and what there is, in bytes, before anything is read.

    Attributes:
        tensor_bytes: tensors in host memory; of mapped tensors none until they are written to.
        mapped_bytes: tensors that are views of the files.
        staging_bytes: most that staging will take.
        budget_bytes: the bound on it.
        requested_budget_bytes: the bound that was asked for, if the machine has room for it.
        description_bytes: the checkpoint's own description, which is there already.
        devices: what goes to each device.
        room: what the machine and its control groups leave; ``None`` where unknown.
        cache: what would become of the page cache; ``None`` where it was not looked at.
    """

    tensor_bytes: int
    mapped_bytes: int
    staging_bytes: int
    budget_bytes: int
    requested_budget_bytes: int
    description_bytes: int
    devices: tuple[DeviceFit, ...]
    room: Headroom | None
    cache: CacheFit | None = None

    @property
    def needed_bytes(self) -> int:
        """Host memory that the load is going to take."""
        return self.tensor_bytes + self.staging_bytes

    @property
    def missing_bytes(self) -> int:
        """How much the host lacks for the tensors, swap counted in; 0 where that is unknown.

        Staging alone never lacks memory: its budget is cut, and page cache makes room for the smallest one.
        """
        if self.room is None or not self.tensor_bytes:
            return 0
        return max(0, self.needed_bytes - self.room.available_bytes - self.room.swap_free_bytes)

    @property
    def swapped_bytes(self) -> int:
        """How much of it only swap can make room for; 0 where that is unknown."""
        if self.room is None or not self.tensor_bytes:
            return 0
        return max(0, self.needed_bytes - self.room.available_bytes)

    @property
    def verdict(self) -> Verdict:
        """Whether the host can hold the load."""
        if self.room is None:
            return Verdict.UNKNOWN
        if self.missing_bytes:
            return Verdict.LACKS
        return Verdict.SWAPS if self.swapped_bytes else Verdict.FITS

    @property
    def sentence(self) -> str:
        """The whole comparison in one line, for the report of a load."""
        parts = [f"{format_bytes(self.tensor_bytes)} of tensors"] if self.tensor_bytes else []
        parts += [f"{format_bytes(self.mapped_bytes)} of mapped files"] if self.mapped_bytes else []
        parts += [f"at most {format_bytes(self.staging_bytes)} of staging"] if self.staging_bytes else []
        needed = " and ".join(parts) or "no memory"
        known = self.room.sentence if self.room else "what is available is unknown"
        lines = [f"{self.verdict.value}: {needed}, {known}", *self.warnings()]
        return "; ".join(lines)

    def warnings(self) -> Iterator[str]:
        """What is no error and should be known, one sentence each."""
        if self.budget_bytes < self.requested_budget_bytes:
            yield (
                f"staging gets {format_bytes(self.budget_bytes)} instead of the "
                f"{format_bytes(self.requested_budget_bytes)} allowed, because memory is short"
            )
        if self.verdict is Verdict.SWAPS:
            yield f"{format_bytes(self.swapped_bytes)} have to go to swap, which is slow"
        yield from (fit.sentence for fit in self.devices if fit.missing_bytes)

    def to_json(self) -> dict[str, Any]:
        """The report as the one JSON object that ``weightlift load --dry-run --json`` prints."""
        room = self.room
        return {
            "schema": 1,
            "verdict": self.verdict.name.lower(),
            "missing_bytes": self.missing_bytes if room else None,
            "swapped_bytes": self.swapped_bytes if room else None,
            "host_memory": {
                "tensor_bytes": self.tensor_bytes,
                "mapped_bytes": self.mapped_bytes,
                "staging_bytes": self.staging_bytes,
                "budget_bytes": self.budget_bytes,
                "requested_budget_bytes": self.requested_budget_bytes,
                "description_bytes": self.description_bytes,
                "needed_bytes": self.needed_bytes,
                "available_bytes": room.available_bytes if room else None,
                "swap_free_bytes": room.swap_free_bytes if room else None,
            },
            "limits": [
                {
                    "control_group": limit.group or None,
                    "version": limit.version or None,
                    "limit_bytes": limit.limit_bytes,
                    "available_bytes": limit.available_bytes,
                }
                for limit in (room.rooms if room else ())
            ],
            "devices": [
                {
                    "device": fit.device,
                    "tensor_bytes": fit.tensor_bytes,
                    "free_bytes": fit.free_bytes,
                    "reusable_bytes": fit.reusable_bytes,
                    "total_bytes": fit.total_bytes,
                    "missing_bytes": fit.missing_bytes if fit.free_bytes is not None else None,
                }
                for fit in self.devices
            ],
            "page_cache": asdict(self.cache) if self.cache is not None else None,
            "warnings": list(self.warnings()),
        }


def require_fit(fit: FitReport) -> None:
    """Raise if the host cannot hold a load.

    Raises:
        InsufficientMemoryError: says by how much, and what would help.
    """
    if fit.verdict is not Verdict.LACKS:
        return
    assert fit.room is not None
    parts = f" ({format_bytes(fit.tensor_bytes)} for tensors, the rest for staging)" if fit.staging_bytes else ""
    swap = f" and {format_bytes(fit.room.swap_free_bytes)} of swap" if fit.room.swap_free_bytes else ", without swap"
    raise InsufficientMemoryError(
        f"the tensors need {format_bytes(fit.needed_bytes)} of memory{parts} and {fit.room.sentence}{swap}: "
        f"{format_bytes(fit.missing_bytes)} too little",
        hint=_what_helps(fit),
    )


def _what_helps(fit: FitReport) -> str:
    helps = [
        "load part of the tensors (names=…)",
        "stream them (weightlift.stream)",
        'use method="mmap"',
        "load to a GPU (device=…)",
        f"add {format_bytes(fit.missing_bytes)} of swap",
    ]
    if fit.room is not None and fit.room.limit_source == "cgroup":
        helps.append("raise the control group's memory limit")
    return f"{', '.join(helps[:-1])}, or {helps[-1]}"


def staging_budget(budget_bytes: int, tensor_bytes: int, staged_bytes: int, room: Headroom | None) -> int:
    """The host-memory budget, cut down where the tensors fit and staging beside them would not.

    Args:
        budget_bytes: what the caller allows.
        tensor_bytes: host memory that the tensors take.
        staged_bytes: most bytes that may pass through staging.
        room: what there is; ``None`` where unknown.
    """
    rest = 0 if room is None else room.available_bytes - tensor_bytes
    if room is None or rest < 0 or min(budget_bytes, staged_bytes) <= rest:
        return budget_bytes
    return max(min(SMALLEST_HOST_MEMORY_BYTES, budget_bytes), align_down(int(rest * _SHARE_OF_REST), MIB))


@contextlib.contextmanager
def explaining_device_memory(fit: FitReport | Callable[[], FitReport]) -> Iterator[None]:
    """Let an out-of-memory error of the framework say what was known; the error itself stays as it is.

    Args:
        fit: what was found out beforehand, or how to find out once it happens.
    """
    try:
        yield
    except BaseException as err:
        if type(err).__name__ == "OutOfMemoryError":
            for device in (fit() if callable(fit) else fit).devices:
                if device.missing_bytes:
                    err.add_note(device.sentence)
        raise
