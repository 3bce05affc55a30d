"""The open shards of one load: descriptors, the facts probed on them, and leaving the page cache as it was found.

Owns every descriptor and mapping of a load, from opening to closing. A shard is opened only if it is still the file
whose header was read, and checked again when the load ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from weightlift.description import FileIdentity
from weightlift.errors import AccessError, CheckpointNotFoundError, FileChangedError, ReadError, TruncatedFileError
from weightlift.host import kernel, residency, storage
from weightlift.operations import ShardSource
from weightlift.plan import GRANULE_BYTES, ShardFacts
from weightlift.units import KIB, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from weightlift.description import Description, Shard
    from weightlift.host.residency import CountCached


_SWEEPS_MAX: Final = 20
_SWEEP_PAUSE_SECONDS: Final = 0.005
_SWEPT_BYTES: Final = 64 * KIB


class OpenShards:
    """The shards of a description, open for reading.

    Args:
        description: the checkpoint.
        used: indexes of the shards that will be read; the others stay closed.
        want_direct: open for direct reads where the file system takes them.
        want_mapping: map each shard, shared and read-only.
        look_at_cache: record what the page cache holds; otherwise it counts as unknown.
        count_cached: a quicker way to look at the page cache than :func:`weightlift.host.residency.count_cached`.

    Raises:
        CheckpointNotFoundError: a shard is gone.
        AccessError: a shard may not be read.
        FileChangedError: a shard is not the file whose header was read.
    """

    def __init__(
        self,
        description: Description,
        used: Sequence[int],
        *,
        want_direct: bool,
        want_mapping: bool = False,
        look_at_cache: bool = True,
        count_cached: CountCached | None = None,
    ) -> None:
        self._look_at_cache = look_at_cache
        self._count_cached = count_cached
        self._description = description
        self._used = tuple(used)
        self._stack = contextlib.ExitStack()
        self._absent: dict[int, list[tuple[int, int]]] = {}
        self.sources: list[ShardSource] = []
        self.facts: list[ShardFacts] = []
        self.mappings: dict[int, mmap.mmap] = {}
        try:
            wanted = frozenset(self._used)
            for index, shard in enumerate(description.shards):
                if index in wanted:
                    self._open(index, shard, want_direct=want_direct, want_mapping=want_mapping)
                else:
                    self.sources.append(ShardSource(-1, -1, shard.identity.size_bytes, PAGE_BYTES))
                    self.facts.append(ShardFacts(shard.path.name, shard.identity.size_bytes, False, "", False, None))
        except BaseException:
            self._stack.close()
            raise

    def _open(self, index: int, shard: Shard, *, want_direct: bool, want_mapping: bool) -> None:
        size = shard.identity.size_bytes
        descriptor = _open_file(shard.path, os.O_RDONLY)
        self._stack.callback(kernel.close_quickly, descriptor)
        _check_identity(shard, descriptor, "since its header was read")
        access, direct_descriptor = self._open_direct(shard.path) if want_direct else (None, -1)
        if direct_descriptor >= 0:
            self._stack.callback(kernel.close_quickly, direct_descriptor)
        cached = None
        if self._look_at_cache:
            cached = residency.residency_map(descriptor, size, GRANULE_BYTES, self._count_cached)
        if cached is not None:
            # Recorded now, since read-ahead of the load itself would make neighbours look as if they had been cached.
            self._absent[index] = residency.absent_ranges(descriptor, cached)
        mapping_address = 0
        if want_mapping and size:
            mapping = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
            self._stack.callback(mapping.close)
            self.mappings[index] = mapping
            mapping_address = readonly_address(mapping)
        self.sources.append(
            ShardSource(
                descriptor,
                direct_descriptor,
                size,
                access.offset_alignment if access and access.supported else PAGE_BYTES,
                mapping_address,
            )
        )
        self.facts.append(
            ShardFacts(
                shard.path.name,
                size,
                direct_descriptor >= 0,
                access.reason if access else "direct reads were not asked for",
                False,
                cached,
            )
        )

    @staticmethod
    def _open_direct(path: Path) -> tuple[storage.DirectAccess, int]:
        access, descriptor = storage.open_direct(path)
        if descriptor >= 0 and access.offset_alignment > PAGE_BYTES:
            # Slots and regions leave a page of room around what is read, no more.
            kernel.close_quickly(descriptor)
            reason = (
                f"it wants direct reads aligned to {access.offset_alignment} bytes, more than the {PAGE_BYTES} used"
            )
            return replace(access, supported=False, reason=reason), -1
        return access, descriptor

    def probe_uncached(self) -> None:
        """Find out which shards take uncached buffered reads; until asked, none is known to."""
        for index in self._used:
            answer = storage.probe_dontcache(self.sources[index].descriptor)
            self.facts[index] = self.facts[index]._replace(dontcache=answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def detach(self) -> contextlib.ExitStack:
        """Give up ownership: the descriptors and mappings live until the returned stack is closed."""
        return self._stack.pop_all()

    @property
    def names(self) -> str:
        """The file that is read, or the first of how many."""
        first = self._description.shards[self._used[0]].path if self._used else Path()
        return str(first) if len(self._used) <= 1 else f"{first} and {len(self._used) - 1} more"

    def cached_before(self) -> int | None:
        """Bytes of the shards that the page cache held when they were opened; ``None`` if unknown for one of them."""
        maps = [self.facts[index].residency for index in self._used]
        return None if None in maps else sum(entry.cached_bytes for entry in maps if entry is not None)

    def cached_now(self) -> int | None:
        """Bytes of the shards that the page cache holds; ``None`` if unknown for one of them."""
        if not self._look_at_cache:
            return None
        counts = [
            residency.residency(self.sources[index].descriptor, self.facts[index].size_bytes, self._count_cached)
            for index in self._used
        ]
        return None if None in counts else sum(count for count in counts if count is not None)

    def sweep(self) -> None:
        """Drop from the page cache what was not in it when the shards were opened, and only that.

        Read-ahead that is still under way is skipped by the kernel and arrives afterwards, so the sweep is repeated for
        a moment until nothing to speak of is left.
        """
        for index, ranges in self._absent.items():
            descriptor = self.sources[index].descriptor
            for _ in range(_SWEEPS_MAX if ranges else 0):
                residency.sweep(descriptor, ranges)
                left = residency.cached_in(descriptor, ranges)
                if left is None or left <= _SWEPT_BYTES:
                    break
                time.sleep(_SWEEP_PAUSE_SECONDS)

    def fetch(self, index: int, offset: int, length: int) -> None:
        """Have the system read a range into the page cache by itself; where it cannot, nothing happens."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.sources[index].descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise :class:`FileChangedError` if a shard was written to or truncated while it was read."""
        for index in self._used:
            _check_identity(self._description.shards[index], self.sources[index].descriptor, "while it was being read")

    def describe_end_of_file(self, index: int, offset: int, tensor: str | None) -> TruncatedFileError:
        """The error for a shard that ended at ``offset``."""
        shard = self._description.shards[index]
        size = kernel.file_status(self.sources[index].descriptor).size_bytes
        wanted = shard.identity.size_bytes
        return TruncatedFileError(
            f"{shard.path}: the file ends at byte {size:,} but its header describes {wanted:,} "
            f"(truncated while it was being read?)",
            hint="check that nothing writes to the file, and fetch it again if it is incomplete",
            path=shard.path,
            tensor=tensor,
            offset=offset,
        )


def readonly_address(mapping: mmap.mmap) -> int:
    """The address of a mapping's first byte, read-only ones included."""
    # ctypes wants a writable buffer; the buffer protocol itself tells the address of a read-only one.
    view = memoryview(mapping)
    try:
        return _address_of(view)
    finally:
        view.release()


class _PyBuffer(ctypes.Structure):
    """The head of CPython's ``Py_buffer`` and room for the rest of it."""

    _fields_ = (("address", ctypes.c_void_p), ("object", ctypes.py_object), ("rest", ctypes.c_byte * 256))


def _address_of(view: memoryview) -> int:
    buffer = _PyBuffer()
    get, release = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
    get.argtypes, get.restype = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int), ctypes.c_int
    release.argtypes, release.restype = (ctypes.c_void_p,), None
    get(view, ctypes.byref(buffer), 0)
    try:
        return int(buffer.address or 0)
    finally:
        release(ctypes.byref(buffer))


def _open_file(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as err:
        raise CheckpointNotFoundError(
            f"{path}: the file is gone since its header was read", hint="open the checkpoint again", path=path
        ) from err
    except PermissionError as err:
        raise AccessError(
            f"{path}: this user may not read the file", hint=f"chmod a+r {path}, or run as its owner", path=path
        ) from err
    except OSError as err:
        raise ReadError(
            f"{path}: the file cannot be opened ({os.strerror(err.errno or errno.EIO)})",
            hint="check the storage and the limit on open files (ulimit -n)",
            path=path,
        ) from err


def _check_identity(shard: Shard, descriptor: int, when: str) -> None:
    found = FileIdentity(*kernel.file_status(descriptor))
    known = shard.identity
    if found == known:
        return
    if found.size_bytes < known.size_bytes:
        raise TruncatedFileError(
            f"{shard.path}: the file shrank from {known.size_bytes:,} to {found.size_bytes:,} bytes {when}",
            hint="check that nothing writes to the file, and fetch it again if it is incomplete",
            path=shard.path,
            offset=found.size_bytes,
        )
    what = "replaced" if found[:2] != known[:2] else "written to"
    raise FileChangedError(
        f"{shard.path}: the file was {what} {when} ({known.size_bytes:,} bytes then, {found.size_bytes:,} now)",
        hint="wait until whatever writes it has finished, then open the checkpoint again",
        path=shard.path,
    )
