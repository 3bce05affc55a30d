"""Streaming: tensors one after the other while later ones are being read, with back-pressure.

The unit of streaming is a group of the layout: one large tensor, or a run of small ones that share a slab. Units are
submitted to the engine as long as nothing finished waits for the consumer and what is in flight is under a window, so
host memory holds what the consumer has, one finished unit, and the window.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Self

from msgspec.structs import replace

from weightlift.destinations import Destinations
from weightlift.errors import OptionError
from weightlift.host.memory import available_processors
from weightlift.layout import lay_out
from weightlift.loading import required_manifest, verify_beforehand
from weightlift.manifest import digest_differences, refuse
from weightlift.open_ended import OpenTransfer
from weightlift.operations import ChunkReady, ExtentDone
from weightlift.reach import reach_of
from weightlift.summary import summarise
from weightlift.targets.digest import digest_tensors
from weightlift.targets.host import HostTarget
from weightlift.types import Method
from weightlift.units import MIB
from weightlift.views import carry
from weightlift.weighing import weigh, within

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from weightlift.description import Description
    from weightlift.layout import Group
    from weightlift.options import LoadOptions
    from weightlift.targets.base import Target
    from weightlift.types import LoadReport

_WINDOW_BYTES: Final = 32 * MIB
_EXPECTED_BYTES: Final = 512 * MIB
"""Device memory that is prepared at once: a call to the driver for every tensor would hold the bytes up."""


class _Unit:
    """Rows that are read together, and how many of their extents have not landed."""

    __slots__ = ("left", "rows", "target")

    def __init__(self, rows: Sequence[int], target: Target) -> None:
        self.rows = rows
        self.target = target
        self.left = 0


class TensorStream:
    """An iterator of ``(name, tensor)`` in file order; also a context manager.

    Args:
        description: the checkpoint.
        rows: the selected rows, in file order.
        options: how.
        units: another order: the rows cut into parts, each in file order, that are read and delivered one after the
            other.

    Attributes:
        report: what the load did; ``None`` until the last tensor was delivered.
    """

    def __init__(
        self,
        description: Description,
        rows: Sequence[int],
        options: LoadOptions,
        units: Iterable[Sequence[int]] | None = None,
    ) -> None:
        asked, asked_rows = description, rows
        self._tensors = len(rows)
        self._carried = carry(description, rows)
        if self._carried is not None:
            assert units is None, "views are read in file order"
            description, rows = self._carried.description, self._carried.rows
        where = Destinations(description, rows, options)
        if where.discards:
            raise OptionError('device="null" has no tensors to stream', hint='use weightlift.load(…, device="null")')
        if options.method is Method.MMAP:
            raise OptionError(
                'method="mmap" has nothing to stream: its tensors are views of the file',
                hint='use weightlift.load(…, method="mmap")',
            )
        self.report: LoadReport | None = None
        self._description = description
        self._rows = rows
        total = description.bytes_of(rows)
        self._fit = weigh(description, options, staged_bytes=total, accesses=where.accesses)
        self._options = options = within(self._fit, options)
        self._where = where
        self._closed = True
        self._manifest = required_manifest(asked, asked_rows, options)
        changed = options.dtype is not None or where.dequantizer is not None or self._carried is not None
        if changed or not where.in_host_memory:
            # What is converted, a view or on a device cannot be hashed as it was stored.
            verify_beforehand(asked, asked_rows, options, self._manifest)
        if self._carried is not None:
            self._manifest = None
        self._pending: deque[Sequence[int]] = deque(self._unit_rows() if units is None else units)
        self._flying: deque[_Unit] = deque()
        self._by_extent: list[_Unit] = []
        self._ready: Iterator[tuple[str, Any]] = iter(())
        self._submitted_bytes = self._expected_bytes = 0
        self._window_bytes = options.host_memory if where.accesses else _WINDOW_BYTES
        self._transfer = OpenTransfer(
            description,
            reach_of(description, rows),
            options,
            destination_bytes=_WINDOW_BYTES,
            accesses=where.accesses,
        )
        with self._transfer.aborting():
            self._transfer.begin_stream(total)
        self._closed = False
        self._delivered = time.monotonic()

    def _unit_rows(self) -> Iterator[Sequence[int]]:
        groups: Sequence[Group] = lay_out(self._description, self._rows).groups
        begin = 0
        for group in groups:
            # Tensors without bytes are in no group; they travel with the next one.
            yield self._rows[begin : group.end]
            begin = group.end
        if begin < len(self._rows):
            yield self._rows[begin:]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[str, Any]:
        for item in self._ready:
            return item
        if self._closed:
            raise StopIteration
        asked = time.monotonic()
        self._transfer.consumer_seconds += asked - self._delivered
        with self._ending():
            unit = self._wait_for_unit()
            self._transfer.waiting_seconds += time.monotonic() - asked
            self._verify(unit)
        if unit is None:
            with self._ending():
                self._finish()
            raise StopIteration
        with self._ending():
            # All of a unit at once: its target is closed next.
            finished = unit.target.finish()
            if self._carried is not None:
                finished = self._carried.expand(finished, self._where.maker.strided)
            self._ready = iter(list(finished))
            self._transfer.drop(unit.target)
            self._submit()
        self._delivered = time.monotonic()
        return next(self._ready)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever is raised inside ends the stream; what was ready is not handed out any more."""
        with self._transfer.aborting():
            try:
                yield
            except BaseException:
                self._closed, self._ready = True, iter(())
                raise

    def _wait_for_unit(self) -> _Unit | None:
        while True:
            self._submit()
            if not self._flying:
                return None
            if self._flying[0].left == 0:
                return self._flying.popleft()
            self._take_events(wait=True)
            self._transfer.tick(host_bytes=0 if self._where.accesses else None)

    def _verify(self, unit: _Unit | None) -> None:
        """Raise if a tensor about to be handed out has other bytes than the manifest says."""
        if self._manifest is None or unit is None or not isinstance(unit.target, HostTarget):
            return
        digests = digest_tensors(dict(unit.target.stored()), available_processors())
        refuse(self._description, digest_differences(digests, self._manifest))

    def _take_events(self, *, wait: bool) -> None:
        for event in self._transfer.events(wait=wait):
            if isinstance(event, ExtentDone):
                self._by_extent[event.extent].left -= 1
            elif isinstance(event, ChunkReady):
                unit = self._by_extent[event.extent]
                unit.target.receive(event, self._transfer.tag(event.extent), self._transfer.release_slot)

    def _submit(self) -> None:
        """Hand units to the engine until the window is full or a finished one waits."""
        while self._pending and self._transfer.may_submit():
            # What has landed by now has its events waiting; what lands later is no reason to submit more before those
            # are taken, or a unit would be finished and nobody know.
            in_flight = self._submitted_bytes - self._transfer.landed_bytes()
            self._take_events(wait=False)
            finished_waits = any(unit.left == 0 for unit in self._flying)
            if self._flying and (finished_waits or in_flight >= self._window_bytes):
                return
            self._expect()
            rows = self._pending.popleft()
            unit = _Unit(rows, self._where.target(rows))
            extents = self._transfer.submit(unit.target)
            unit.left = len(extents)
            self._by_extent.extend([unit] * len(extents))
            self._submitted_bytes += sum(extent.length for extent in extents)
            self._flying.append(unit)

    def _expect(self) -> None:
        """Prepare the devices' memory for the next units together, once that of the ones before is used up."""
        if not self._where.accesses or self._submitted_bytes < self._expected_bytes:
            return
        rows: list[int] = []
        for unit in self._pending:
            rows.extend(unit)
            self._expected_bytes += self._description.bytes_of(unit)
            if self._expected_bytes - self._submitted_bytes >= _EXPECTED_BYTES:
                break
        wanted = self._where.device_bytes(rows)
        for access in self._where.accesses:
            access.memory.expect(wanted.get(access.device, 0))

    def _finish(self) -> None:
        self._closed = True
        finished = self._transfer.finish()
        report = summarise(
            self._transfer,
            self._description,
            self._rows,
            self._options,
            device=self._where.device,
            staging_reason=self._where.staging_reason,
            finished=finished,
            digests={},
            fit=self._fit,
        )
        self.report = replace(report, tensors=self._tensors)

    def close(self) -> None:
        """Stop reading and release everything; tensors already delivered stay."""
        self._ready = iter(())
        if not self._closed:
            self._closed = True
            self._transfer.abort(GeneratorExit())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()
