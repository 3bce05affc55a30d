"""Single tensors as views of a mapped file, made when they are asked for.

A handle is opened for every file of a checkpoint and often asked for a few of its tensors, so that setting up a load
would take longer than everything else. Nothing is read here: what is touched, the kernel brings in.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from weightlift.host import kernel
from weightlift.host.memory import headroom
from weightlift.host.residency import count_cached
from weightlift.plan import ShardFacts, decide_cache
from weightlift.shards import check_identity, mapping_failure
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.mapped import map_shards, mapped_tensor, mapped_tensors, read_around
from weightlift.types import CachePolicy
from weightlift.units import MIB, align_down

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from weightlift.description import Description
    from weightlift.options import LoadOptions
    from weightlift.types import Framework


_AROUND_BYTES: Final = 4 * MIB
"""What a touch may bring in; parts of this size are looked at once."""


class MappedFile:
    """A file that is mapped when its first tensor is asked for. May be used from several threads.

    Args:
        description: of the one file.
        descriptor: the same file, open for as long as tensors are asked for.
        framework: whose tensors to make.
    """

    def __init__(self, description: Description, descriptor: int, framework: Framework) -> None:
        self._description = description
        self._descriptor = descriptor
        self._maker = pick_framework(framework)
        self._lock = threading.Lock()
        self._mappings: dict[int, mmap.mmap] | None = None
        self._readonly = False
        self._undecided: LoadOptions | None = None
        self._looked_at: set[int] = set()

    def tensor(self, row: int, options: Callable[[], LoadOptions]) -> Any | None:
        """A new view of a row's bytes, which keeps the mapping alive; ``None`` where they lie wrong for its data type.

        Args:
            row: of the description.
            options: asked once, whether the page cache may grow and whether views may be written to.

        Raises:
            TruncatedFileError: the file has become shorter since it was opened.
            FileChangedError: it was replaced or written to since then.
            InsufficientMemoryError: there is no address space left for it.
            ReadError: it cannot be mapped for another reason.
        """
        description = self._description
        if description.offsets[row] % description.dtype(row).alignment:
            return None
        if self._mappings is None:
            with self._lock:
                # Another thread may have been first meanwhile.
                self._mappings = self._mappings or self._map(options())
        undecided = self._undecided
        if undecided is not None and not self._is_cached(row):
            self._decide(undecided)
        if self._readonly:
            return dict(mapped_tensors(description, [row], self._mappings, self._maker))[description.names[row]]
        return mapped_tensor(description, row, self._mappings, self._maker)

    def _map(self, options: LoadOptions) -> dict[int, mmap.mmap]:
        self._readonly = options.readonly
        (shard,) = self._description.shards
        size = shard.identity.size_bytes
        check_identity(shard, self._descriptor, "after it was opened")
        self._undecided = options
        try:
            return map_shards(self._description, [0], {0: self._descriptor}, readonly=options.readonly)
        except OSError as err:
            raise mapping_failure(shard.path, size, err) from err

    def _is_cached(self, row: int) -> bool:
        """Whether both ends of a tensor are in the page cache, or were when a tensor beside them was asked for."""
        start, length = self._description.offsets[row], self._description.lengths[row]
        for offset in (start, start + length - 1) if length else ():
            if offset // _AROUND_BYTES not in self._looked_at:
                page = align_down(offset, kernel.PAGE_SIZE)
                if count_cached(self._descriptor, page, kernel.PAGE_SIZE, kernel.PAGE_SIZE) != [kernel.PAGE_SIZE]:
                    return False
                self._looked_at.add(offset // _AROUND_BYTES)
        return True

    def _decide(self, options: LoadOptions) -> None:
        """Let touches bring in what lies around them, where that may stay in the page cache.

        Put off until something has to be read: finding out how much memory is left takes longer than making a view.
        """
        self._undecided = None
        (shard,) = self._description.shards
        size, room = shard.identity.size_bytes, headroom() if options.cache is CachePolicy.AUTO else None
        facts = ShardFacts(shard.path.name, size, direct=False, direct_reason="", dontcache=False, residency=None)
        decision = decide_cache(
            options.cache,
            options.method,
            [facts],
            destination_bytes=0,
            available_bytes=room.available_bytes if room else None,
        )
        if decision.keep:
            for mapping in (self._mappings or {}).values():
                read_around(mapping)
