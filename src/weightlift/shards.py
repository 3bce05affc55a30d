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
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Self

from msgspec.structs import replace

from weightlift.description import FileIdentity
from weightlift.errors import (
    AccessError,
    CheckpointNotFoundError,
    FileChangedError,
    InsufficientMemoryError,
    ReadError,
    TruncatedFileError,
    WeightliftError,
)
from weightlift.host import kernel, residency, storage, sweeping
from weightlift.host.probes import Probe, run_probes
from weightlift.operations import ShardSource
from weightlift.plan import GRANULE_BYTES, ShardFacts
from weightlift.units import KIB, MIB, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from weightlift.description import Description, Shard
    from weightlift.host.probes import RunProbes
    from weightlift.host.residency import Part
    from weightlift.operations import ShardUse
    from weightlift.plan import Wanted


_COUNTED_BYTES: Final = 64 * MIB

_READ_AHEAD_BYTES: Final = 128 * KIB
"""What the kernel reads ahead by default, and so what every request for more is cut down to, without a word."""


_TRIED_MAX: Final = 4096
_tried: dict[FileIdentity, storage.DirectAccess] = {}
"""Files that a trial read has shown to take direct reads: a program that loads a model module by module opens its files
dozens of times, and should they come to refuse, chunks still have their way out."""


class OpenShards:
    """The shards of a description, open for reading.

    Args:
        description: the checkpoint.
        used: indexes of the shards that will be read; the others stay closed.
        parts: what to look at in the page cache, by shard, where that is not the whole of it.
        want_direct: open for direct reads where the file system takes them.
        want_mapping: map each shard, shared and read-only.
        look_at_cache: record what the page cache holds; otherwise it counts as unknown.
        ask: how to ask the files several things at once.

    Raises:
        CheckpointNotFoundError: a shard is gone.
        AccessError: a shard may not be read.
        FileChangedError: a shard is not the file whose header was read.
    """

    def __init__(
        self,
        description: Description,
        used: Sequence[int],
        parts: Mapping[int, Sequence[Part]] = MappingProxyType({}),
        *,
        want_direct: bool,
        want_mapping: bool = False,
        look_at_cache: bool = True,
        ask: RunProbes = run_probes,
    ) -> None:
        self._look_at_cache = look_at_cache
        self._ask = ask
        self._description = description
        self._used = tuple(used)
        self._parts = parts
        self._stack = contextlib.ExitStack()
        self._absent: dict[int, list[tuple[int, int]]] = {}
        self.sources: list[ShardSource] = []
        self.facts: list[ShardFacts] = []
        self.mappings: dict[int, mmap.mmap] = {}
        try:
            self._open(want_direct=want_direct, want_mapping=want_mapping)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, *, want_direct: bool, want_mapping: bool) -> None:
        descriptors: dict[int, int] = {}
        trials: dict[int, storage.DirectTrial] = {}
        for index in sorted(self._used):
            shard = self._description.shards[index]
            descriptors[index] = descriptor = _open_file(shard.path)
            self._stack.callback(kernel.close_quickly, descriptor)
            check_identity(shard, descriptor, "since its header was read")
            if want_direct:
                trials[index] = storage.DirectTrial(shard.path, _tried.get(shard.identity))
                self._stack.callback(trials[index].close)
        counts, answers = self._look(descriptors, trials)
        for index, shard in enumerate(self._description.shards):
            size = shard.identity.size_bytes
            if index not in descriptors:
                self.sources.append(ShardSource(-1, -1, size, PAGE_BYTES))
                self.facts.append(ShardFacts(shard.path.name, size, False, "", False, None))
                continue
            access = _judge_direct(shard, trials[index], answers.get(index)) if want_direct else None
            cached = None
            if self._look_at_cache:
                parts, blocks = self._looked_at(index), counts.get(index)
                cached = residency.residency_map(descriptors[index], size, GRANULE_BYTES, blocks, parts)
            if cached is not None:
                # Recorded now, since read-ahead of the load would make neighbours look as if they had been cached.
                absent = residency.absent_ranges(descriptors[index], cached)
                self._absent[index] = residency.united([*shard.brought_in, *absent])
            self.sources.append(
                ShardSource(
                    descriptors[index],
                    trials[index].fd if want_direct else -1,
                    size,
                    access.offset_alignment if access and access.supported else PAGE_BYTES,
                    self._map(index, descriptors[index], size) if want_mapping and size else 0,
                )
            )
            reason = access.reason if access else "direct reads were not asked for"
            self.facts.append(
                ShardFacts(shard.path.name, size, bool(access and access.supported), reason, False, cached)
            )

    def _look(
        self, descriptors: dict[int, int], trials: dict[int, storage.DirectTrial]
    ) -> tuple[dict[int, list[int | None]], dict[int, int]]:
        """Try direct reads and count cached blocks in one go; without a word about blocks that are quickly counted."""
        files = [(fd, self._looked_at(index)) for index, fd in descriptors.items()]
        if not self._look_at_cache or residency.total_bytes(files) <= kernel.QUICK_RANGE_BYTES:
            files = []
        probes = {index: trial.probe for index, trial in trials.items() if trial.probe is not None}
        step = GRANULE_BYTES * residency.BLOCK_GRANULES
        counts, answers = residency.count_together(files, step, self._ask, list(probes.values()))
        by_shard = dict(zip(descriptors, counts, strict=True)) if files else {}
        return by_shard, dict(zip(probes, answers, strict=True))

    def _looked_at(self, index: int) -> Sequence[Part]:
        """The parts of a shard whose cached pages are counted."""
        parts = self._parts.get(index)
        return residency.whole_file(self._description.shards[index].identity.size_bytes) if parts is None else parts

    def _map(self, index: int, descriptor: int, size: int) -> int:
        mapping = _map_file(self._description.shards[index].path, descriptor, size)
        self._stack.callback(mapping.close)
        self.mappings[index] = mapping
        return readonly_address(mapping)

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
        self.detach().close()

    def __del__(self) -> None:
        # For what comes between opening and the first statement that would close them, such as Ctrl-C.
        if hasattr(self, "_stack"):
            self._stack.close()

    def detach(self) -> contextlib.ExitStack:
        """Give up ownership: the descriptors and mappings live until the returned stack is closed; nothing is swept."""
        self._absent.clear()
        return self._stack.pop_all()

    @property
    def names(self) -> str:
        """The file that is read, or the first of how many."""
        first = self._description.shards[self._used[0]].path if self._used else Path()
        return str(first) if len(self._used) <= 1 else f"{first} and {len(self._used) - 1} more"

    def cached_before(self) -> int | None:
        """Bytes of what was looked at that the page cache held at opening; ``None`` if unknown for one shard."""
        maps = [self.facts[index].residency for index in self._used]
        return None if None in maps else sum(entry.cached_bytes for entry in maps if entry is not None)

    def cached_now(self) -> int | None:
        """Bytes of what was looked at that the page cache holds; ``None`` if unknown for one shard."""
        if not self._look_at_cache:
            return None
        files = [(self.sources[index].descriptor, self._looked_at(index)) for index in self._used]
        total = residency.total_bytes(files)
        ask = run_probes if total <= kernel.QUICK_RANGE_BYTES else self._ask
        # Only their sum is wanted, so that no piece needs a closer look.
        counts, _ = residency.count_together(files, residency.piece_bytes(total, _COUNTED_BYTES), ask)
        flat = [count for shard in counts for count in shard]
        return None if None in flat else sum(count for count in flat if count is not None)

    def sweep(self, uses: Mapping[int, ShardUse] | None = None) -> None:
        """Drop from the page cache what was not in it before the shards' headers were read, and only that.

        Args:
            uses: how the shards were read, if that is known: only the header of one never read through the page cache
                can be in it.
        """
        for index, absent in self._absent.items():
            through_it = uses is None or uses[index].buffered_bytes or uses[index].mapped_bytes
            ranges = absent if through_it else self._description.shards[index].brought_in
            sweeping.sweep_until_settled(self.sources[index].descriptor, ranges)

    def drop_caused(self) -> None:
        """Drop what the load has brought into the page cache so far; :meth:`sweep` has to follow at the end."""
        for index, ranges in self._absent.items():
            sweeping.sweep(self.sources[index].descriptor, ranges)

    def fetch(self, parts: Iterable[Wanted]) -> None:
        """Have the system read ranges into the page cache by itself; where it cannot, nothing happens."""
        steps = [
            Probe(self.sources[part.shard].descriptor, offset, _READ_AHEAD_BYTES, ahead=True)
            for part in parts
            for offset in range(part.offset, part.offset + part.length, _READ_AHEAD_BYTES)
        ]
        if steps:
            self._ask(steps)

    def check_unchanged(self) -> None:
        """Raise :class:`FileChangedError` if a shard was written to or truncated while it was read."""
        for index in self._used:
            check_identity(self._description.shards[index], self.sources[index].descriptor, "while it was being read")

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


def _judge_direct(shard: Shard, trial: storage.DirectTrial, answer: int | None) -> storage.DirectAccess:
    access = trial.judge(answer)
    if access.offset_alignment > PAGE_BYTES:
        # Slots and regions leave a page of room around what is read, no more.
        trial.close()
        reason = f"it wants direct reads aligned to {access.offset_alignment} bytes, more than the {PAGE_BYTES} used"
        return replace(access, supported=False, reason=reason)
    if access.supported:
        _remember(shard, access)
    return access


def _remember(shard: Shard, access: storage.DirectAccess) -> None:
    if len(_tried) >= _TRIED_MAX:
        _tried.clear()
    _tried[shard.identity] = access


def _open_file(path: Path) -> int:
    try:
        return kernel.open_quickly(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as err:
        raise CheckpointNotFoundError(
            f"{path}: the file is gone since its header was read", hint="open the checkpoint again", path=path
        ) from err
    except PermissionError as err:
        raise AccessError(
            f"{path}: this user may not read the file", hint=f"chmod a+r {path}, or run as its owner", path=path
        ) from err
    except OSError as err:
        failure = ReadError(
            f"{path}: the file cannot be opened ({os.strerror(err.errno or errno.EIO)})",
            hint="check the storage and the limit on open files (ulimit -n)",
            path=path,
        )
        failure.errno = err.errno
        raise failure from err


def _map_file(path: Path, descriptor: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    except OSError as err:
        raise mapping_failure(path, size, err) from err


def mapping_failure(path: Path, size: int, err: OSError) -> WeightliftError:
    """The typed error that stands for the operating system's refusal to map a file."""
    message = f"{path}: its {size:,} bytes cannot be mapped ({os.strerror(err.errno or errno.EIO)})"
    if err.errno == errno.ENOMEM:
        return InsufficientMemoryError(
            message,
            hint='method="buffered" maps nothing; or raise the limit on address space (ulimit -v)',
            path=path,
        )
    failure = ReadError(message, hint='method="buffered" maps nothing', path=path, offset=0, length=size)
    failure.errno = err.errno
    return failure


def check_identity(shard: Shard, descriptor: int, when: str) -> None:
    """Raise if a file is not what it was when its header was read.

    Args:
        shard: the file as it was.
        descriptor: the file as it is.
        when: when that was, for the sentence.

    Raises:
        TruncatedFileError: it has become shorter.
        FileChangedError: it was replaced or written to.
    """
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
