"""What the pipeline asks of a target: what to read into which memory, and what to make of it afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightlift.operations import ChunkReady, Extent
    from weightlift.plan import Wanted


class Target(Protocol):
    """Where the tensors of one load go.

    The pipeline calls :meth:`prepare` once, has the engine carry out what it returned, in parts that each go through
    :meth:`bind` first, calls :meth:`receive` for every chunk that was handed over, and :meth:`finish` once when
    everything has landed.

    Attributes:
        device: the device's name for the report.
        host_bytes: host memory that the tensors themselves take.
        in_order: chunks must be claimed in file order.
        makes_ahead: :meth:`finish` may be asked for tensors once everything is bound, while bytes are still on their
            way; they are handed out when all have landed.
    """

    device: str
    host_bytes: int
    in_order: bool
    makes_ahead: bool

    def prepare(self) -> Sequence[Wanted]:
        """Say what to read, and into which memory as far as it is allocated yet."""
        ...

    def bind(self, extents: Sequence[Extent]) -> Sequence[Extent]:
        """Allocate what these extents fill; they are submitted right afterwards, as returned, in the same order."""
        ...

    def receive(self, chunk: ChunkReady, want: int, release: Callable[[int], None]) -> None:
        """Take a chunk that lies in a slot.

        Args:
            chunk: the chunk.
            want: index of the range it belongs to, in what :meth:`prepare` returned.
            release: gives a slot back; to be called once per chunk, now or later, from any thread.
        """
        ...

    def finish(self) -> Iterator[tuple[str, Any]]:
        """The tensors by name, in file order; what is not held by them is released."""
        ...

    def close(self) -> None:
        """Stop using slots; called once, before they are freed, however the load ended."""
        ...


class Bound:
    """For targets whose memory is allocated by ``prepare`` already, and whose tensors are made of landed bytes."""

    makes_ahead = False

    def bind(self, extents: Sequence[Extent]) -> Sequence[Extent]:
        """See :class:`Target`."""
        return extents
