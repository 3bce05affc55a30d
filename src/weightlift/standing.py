"""Loads of parts of a checkpoint onto GPUs, one after the other, with files, engine and staging open in between.

Beside moving bytes a load opens and looks at files, starts threads and ends them, watches memory and reports, which
takes a few milliseconds. A program that loads a model module by module pays that for every one, which over a fast link
is as long as reading takes. Here the modules are parts of one load, which has one report.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from weightlift import device_staging
from weightlift.destinations import Destinations
from weightlift.errors import FileChangedError, TruncatedFileError
from weightlift.fitting import explaining_device_memory, require_fit
from weightlift.loading import load_rows, transfer_rows
from weightlift.open_ended import OpenTransfer
from weightlift.options import SMALLEST_HOST_MEMORY_BYTES
from weightlift.reach import Reach
from weightlift.summary import summarise
from weightlift.types import Method
from weightlift.views import carry
from weightlift.weighing import weigh, within

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightlift.description import Description
    from weightlift.fitting import FitReport
    from weightlift.options import LoadOptions
    from weightlift.targets.base import Target
    from weightlift.targets.device import DeviceAccess
    from weightlift.targets.module import ModuleTarget
    from weightlift.types import LoadReport


PARTS_MAX: Final = 1024
"""Of one load: an engine remembers all that it was given."""

BESIDE_BYTES: Final = SMALLEST_HOST_MEMORY_BYTES
"""What a load that stands leaves of its budget, for parts that go to host memory in between.

They are filled in place, so little of them passes through staging.
"""

_SHARED_MIN: Final = 4
"""From how many times as much on: a link is slower with less."""


class PartLoads:
    """Loads of parts, of which those of the same files to the same GPUs are one load; safe to use from any thread.

    Args:
        note: told of every load when it has ended: at once where no GPU is reached through its runtime, else when other
            files or GPUs are asked for, or by :meth:`close`.
    """

    def __init__(self, note: Callable[[LoadReport], None]) -> None:
        self._note = note
        self._lock = threading.RLock()
        self._standing: _Standing | None = None
        self._reads = False

    def rows(self, description: Description, rows: Sequence[int], options: LoadOptions) -> list[tuple[str, Any]]:
        """Load the tensors of some rows; see :func:`~weightlift.loading.load_rows`."""
        with self._lock:
            if not self._reads and not _stands_alone(options) and carry(description, rows) is None:
                where = Destinations(description, rows, options)
                if where.accesses and not where.staging_reason and not where.has_host_memory:
                    target, wanted = where.target(rows), where.device_bytes(rows)
                    return self._stand(description, rows, options, target, where.accesses, device_bytes=wanted)
            loaded, report = load_rows(description, rows, self._beside(options))
            self._note(report)
            return loaded

    def _beside(self, options: LoadOptions) -> LoadOptions:
        """How to load what is no part of the load that stands, which ends if both together would exceed the budget."""
        fixed = options.workers is not None or options.chunk_bytes is not None
        if self._standing is not None and self._standing.leaves_room and options.device == "cpu" and not fixed:
            return replace(options, host_memory=BESIDE_BYTES)
        self.close()
        return options

    def fill(
        self,
        description: Description,
        rows: Sequence[int],
        options: LoadOptions,
        target: ModuleTarget,
        accesses: Sequence[DeviceAccess],
        *,
        staging_reason: str = "",
    ) -> None:
        """Fill memory that is there.

        Args:
            description: the checkpoint.
            rows: the rows that the target was made for.
            options: how.
            target: what is filled.
            accesses: the GPUs that are reached through their runtime.
            staging_reason: why some device is not among them.

        Raises:
            WeightliftError: see :mod:`weightlift.errors`; what was to be filled is partly overwritten.
        """
        with self._lock:
            devices = {access.device for access in accesses}
            if not self._reads and not _stands_alone(options) and set(target.device.split(", ")) == devices:
                self._stand(description, rows, options, target, accesses)
                return
            self.close()
            _, report = transfer_rows(
                description, rows, options, target, accesses=accesses, staging_reason=staging_reason
            )
            self._note(report)

    def _stand(
        self,
        description: Description,
        rows: Sequence[int],
        options: LoadOptions,
        target: Target,
        accesses: Sequence[DeviceAccess],
        *,
        device_bytes: dict[str, int] | None = None,
    ) -> list[tuple[str, Any]]:
        standing = self._standing
        if standing is None or not standing.serves(description, options, accesses):
            self.close()
            standing = self._standing = _Standing(description, options, accesses)
            device_staging.hold(self)
        self._reads = True
        try:
            with explaining_device_memory(lambda: standing.weigh(device_bytes)):
                return standing.read(description, rows, target)
        except BaseException:
            self._standing = None
            raise
        finally:
            self._reads = False

    def close(self) -> None:
        """End the load that stands, if one does, and tell of it; what it brought stays.

        Not while it reads, should the program do this when its progress callback is called.
        """
        with self._lock:
            if self._reads:
                return
            standing, self._standing = self._standing, None
            report = standing.finish() if standing is not None else None
            if report is not None:
                self._note(report)

    def give_back(self) -> None:
        """The same, unless a part is being read: somebody else needs the staging."""
        if self._lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                self._lock.release()

    def __del__(self) -> None:
        standing = getattr(self, "_standing", None)
        if standing is not None:
            standing.give_up()


def _stands_alone(options: LoadOptions) -> bool:
    """Whether a load does more than bring bytes to devices as they are stored."""
    changed = options.dtype is not None or options.dequantize
    looked_at = options.verify is not None or options.digest or options.recording is not None
    return options.method is Method.MMAP or changed or looked_at


class _Standing:
    """One load that stands.

    Args:
        description: the first part, or what it is a part of.
        options: how.
        accesses: the GPUs.

    Attributes:
        leaves_room: a load of its own may take :data:`BESIDE_BYTES` meanwhile.
    """

    def __init__(self, description: Description, options: LoadOptions, accesses: Sequence[DeviceAccess]) -> None:
        self._process = os.getpid()
        self._asked = options
        self._description = description
        self._shards = tuple(description.shards)
        self._accesses = accesses
        self._parts = self._tensors = self._nbytes = 0
        self._fit = self.weigh()
        require_fit(self._fit)
        self._options = within(self._fit, options)
        self.leaves_room = self._options.host_memory >= _SHARED_MIN * BESIDE_BYTES
        if self.leaves_room:
            self._options = replace(self._options, host_memory=self._options.host_memory - BESIDE_BYTES)
        self._transfer = OpenTransfer(
            description,
            Reach(range(len(self._shards)), {}),
            self._options,
            destination_bytes=0,
            accesses=accesses,
            room=self._fit.room,
        )
        with self._transfer.aborting():
            self._transfer.begin_stream(self._file_bytes)
            self._transfer.supervisor.leave_concurrency()

    @property
    def _file_bytes(self) -> int:
        return sum(shard.identity.size_bytes for shard in self._shards)

    def weigh(self, device_bytes: dict[str, int] | None = None) -> FitReport:
        """What the load takes, with what its devices are to hold, and what there is."""
        return weigh(
            self._description,
            self._asked,
            staged_bytes=self._file_bytes,
            accesses=self._accesses,
            device_bytes=device_bytes,
        )

    def serves(self, description: Description, options: LoadOptions, accesses: Sequence[DeviceAccess]) -> bool:
        """Whether a part can be one of this load's: of the same files, in this process, loaded the same way."""
        devices = [access.device for access in accesses]
        return (
            self._process == os.getpid()
            and self._parts < PARTS_MAX
            and self._asked == options
            and [access.device for access in self._accesses] == devices
            and self._shards == tuple(description.shards)
        )

    def read(self, description: Description, rows: Sequence[int], target: Target) -> list[tuple[str, Any]]:
        """Read one part."""
        tensors = self._transfer.read_part(description, target)
        self._parts += 1
        self._tensors += len(rows)
        self._nbytes += description.bytes_of(rows)
        return tensors

    def finish(self) -> LoadReport | None:
        """End the load and say what it did; ``None`` in a forked child, which has none of its threads."""
        if self._process != os.getpid():
            return None
        # Every part was looked at when it had been read, and was whole then.
        with contextlib.suppress(FileChangedError, TruncatedFileError):
            self._transfer.supervisor.sample(0)
            finished = self._transfer.finish()
            report = summarise(
                self._transfer,
                self._description,
                (),
                self._options,
                device=", ".join(access.device for access in self._accesses),
                finished=finished,
                digests={},
                fit=self._fit,
            )
            return replace(report, tensors=self._tensors, nbytes=self._nbytes)
        return None

    def give_up(self) -> None:
        """Stop and release everything, without a word."""
        if self._process == os.getpid():
            self._transfer.abort(GeneratorExit())
