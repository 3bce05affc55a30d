"""Single tensors as views of a mapped file, made when they are asked for.

A handle is opened for every file of a checkpoint and often asked for a few of its tensors, so that setting up a load
would take longer than everything else. Nothing is read here: what is touched, the kernel brings in.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from weightlift.host.memory import headroom
from weightlift.plan import ShardFacts, decide_cache
from weightlift.shards import check_identity, mapping_failure
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.mapped import map_shards, mapped_tensor, mapped_tensors

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from weightlift.description import Description
    from weightlift.options import LoadOptions
    from weightlift.types import Framework


class MappedFile:
    """A file that is mapped when its first tensor is asked for. May be used from several threads.

    Args:
        description: of the one file.
        descriptor: the same file, open for as long as the first tensor has not been asked for.
        framework: whose tensors to make.
    """

    def __init__(self, description: Description, descriptor: int, framework: Framework) -> None:
        self._description = description
        self._descriptor = descriptor
        self._maker = pick_framework(framework)
        self._lock = threading.Lock()
        self._mappings: dict[int, mmap.mmap] | None = None
        self._readonly = False

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
        if self._readonly:
            return dict(mapped_tensors(description, [row], self._mappings, self._maker))[description.names[row]]
        return mapped_tensor(description, row, self._mappings, self._maker)

    def _map(self, options: LoadOptions) -> dict[int, mmap.mmap]:
        self._readonly = options.readonly
        (shard,) = self._description.shards
        size = shard.identity.size_bytes
        check_identity(shard, self._descriptor, "after it was opened")
        room = headroom()
        facts = ShardFacts(shard.path.name, size, direct=False, direct_reason="", dontcache=False, residency=None)
        decision = decide_cache(
            options.cache,
            options.method,
            [facts],
            destination_bytes=0,
            available_bytes=room.available_bytes if room else None,
        )
        descriptors = {0: self._descriptor}
        try:
            return map_shards(self._description, [0], descriptors, readonly=options.readonly, keep=decision.keep)
        except OSError as err:
            raise mapping_failure(shard.path, size, err) from err
