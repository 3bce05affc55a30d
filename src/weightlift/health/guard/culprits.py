"""Which mapping made a command grow, and what can be done about it. Pure functions over mappings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from weightlift.errors import printable
from weightlift.host.mappings import MappingKey, MappingKind, MappingUse
from weightlift.units import MIB, format_bytes

if TYPE_CHECKING:
    from weightlift.host.mappings import Mappings

_PATH_CHARACTERS: Final = 400
_WORTH_NAMING_BYTES: Final = 1 * MIB

_COPIED_HINT: Final = (
    "every page of a private writable mapping that is written to, or that a GPU driver takes for a copy under ROCm or "
    "on unified memory, becomes memory of its own: for Python with torch try `weightlift guard --readonly-mappings`; "
    "for llama.cpp `--no-mmap`; or load with weightlift, which stages instead"
)
_ANONYMOUS_HINT: Final = (
    "the program allocates this itself: give it a smaller model, context or batch, more of the model to the GPU, or "
    "more memory with --limit"
)
_SHARED_HINT: Final = "shared memory counts as lasting: fewer worker processes, or smaller buffers between them"


@dataclass(frozen=True, slots=True)
class Growth:
    """One kind of mapping and what became of it.

    Attributes:
        key: what is mapped and how.
        use: what it holds now.
        grown_bytes: lasting memory more than before; for shared memory what is resident.
    """

    key: MappingKey
    use: MappingUse
    grown_bytes: int

    @property
    def is_copied_file(self) -> bool:
        """Whether pages of a file turned into anonymous memory."""
        return self.key.kind is MappingKind.FILE and self.key.private

    def to_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return {
            "name": self.key.name,
            "kind": self.key.kind.value,
            "private": self.key.private,
            "writable": self.key.writable,
            "grown_bytes": self.grown_bytes,
            "anonymous_bytes": self.use.anonymous_bytes,
            "swapped_bytes": self.use.swapped_bytes,
            "resident_bytes": self.use.resident_bytes,
            "mapped_bytes": self.use.mapped_bytes,
        }


def growths(now: Mappings, before: Mappings) -> list[Growth]:
    """What grew by a MiB or more, most first.

    Args:
        now: the command's mappings.
        before: the same at an earlier moment; empty to compare with the start.
    """
    found = []
    for key, use in now.items():
        grown = lasting_bytes(key, use) - lasting_bytes(key, before.get(key, MappingUse()))
        if grown >= _WORTH_NAMING_BYTES:
            found.append(Growth(key, use, grown))
    return sorted(found, key=lambda growth: growth.grown_bytes, reverse=True)


def page_growths(now: Mappings, before: Mappings) -> list[Growth]:
    """Mapped files of which a MiB or more came into memory as pages that the kernel can drop, most first."""
    found = []
    for key, use in now.items():
        earlier = before.get(key, MappingUse())
        grown = _droppable_bytes(use) - _droppable_bytes(earlier)
        if key.kind is MappingKind.FILE and grown >= _WORTH_NAMING_BYTES:
            found.append(Growth(key, use, grown))
    return sorted(found, key=lambda growth: growth.grown_bytes, reverse=True)


def _droppable_bytes(use: MappingUse) -> int:
    return use.resident_bytes - use.anonymous_bytes


def lasting_bytes(key: MappingKey, use: MappingUse) -> int:
    """What the kernel cannot drop of a mapping."""
    return use.resident_bytes + use.swapped_bytes if key.kind is MappingKind.SHARED_MEMORY else use.lasting_bytes


def describe(growth: Growth) -> str:
    """What a growth is, in a sentence for people."""
    key, use, grown = growth.key, growth.use, format_bytes(growth.grown_bytes)
    name = printable(key.name, _PATH_CHARACTERS)
    if growth.is_copied_file:
        rights = "private and writable" if key.writable else "private"
        swapped = f", {format_bytes(use.swapped_bytes)} of it in swap" if use.swapped_bytes else ""
        whole = format_bytes(use.mapped_bytes)
        return f"{name}, mapped {rights}: {grown} of {whole} turned into anonymous memory{swapped}"
    if key.kind is MappingKind.SHARED_MEMORY:
        return f"shared memory {name}: {grown}"
    if key.kind is MappingKind.DEVICE:
        return f"memory of the device {name}: {grown}"
    return f"memory that the program allocated{f' as {name}' if name else ''}: {grown}"


def describe_pages(growth: Growth) -> str:
    """What a growth of droppable pages is."""
    use, name = growth.use, printable(growth.key.name, _PATH_CHARACTERS)
    return f"{name}, mapped: {format_bytes(_droppable_bytes(use))} of {format_bytes(use.mapped_bytes)} in memory"


def advice(growth: Growth) -> str:
    """What can be done about a growth."""
    if growth.is_copied_file:
        return _COPIED_HINT
    return _SHARED_HINT if growth.key.kind is MappingKind.SHARED_MEMORY else _ANONYMOUS_HINT
