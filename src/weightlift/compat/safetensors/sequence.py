"""Read-ahead for programs that ask for one tensor after the other: from the third on they come out of a stream.

A stream reads large sequential batches while the program works, within the host-memory budget. It pays where bytes come
from storage; what the page cache holds is copied as quickly by whoever asks for it. A request out of order ends the
stream, and whoever asks while another thread is being served reads for itself.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from weightlift.compat.safetensors.refusals import refusing
from weightlift.host import residency
from weightlift.streaming import TensorStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.description import Description
    from weightlift.options import LoadOptions
    from weightlift.types import LoadReport

_STREAK: Final = 3
"""So many requests in a row are taken for a habit."""

_WORTHWHILE_BYTES: Final = 32 << 20
"""What has to be left of the file for a stream to pay."""

_LOOK_BYTES: Final = 64 << 20
"""How far ahead the page cache is looked at; so much further on it is looked at again."""

_CACHED_FRACTION: Final = 0.9
"""Where more than this is cached there is nothing to read ahead."""


class Sequence:
    """Recognises requests in file order.

    Args:
        description: the file that tensors are asked of.
        descriptor: the same file, open.
        load_options: says how it is loaded, and is asked when it is.
        note: told of a stream that was used up.
    """

    def __init__(
        self,
        description: Description,
        descriptor: int,
        load_options: Callable[[], LoadOptions],
        note: Callable[[LoadReport], None],
    ) -> None:
        self._description = description
        self._descriptor = descriptor
        self._load_options = load_options
        self._note = note
        self._lock = threading.Lock()
        self._stream: TensorStream | None = None
        self._next = 0
        self._streak = 0
        self._closed = False
        self._cached_to = 0

    @staticmethod
    def pays_for(description: Description) -> bool:
        """Whether a file is large enough for read-ahead."""
        return description.shards[0].identity.size_bytes >= _WORTHWHILE_BYTES

    def take(self, row: int) -> Any:
        """The tensor of a row if it is the stream's next one, else ``None``."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            with refusing():
                return self._take(row)
        except BaseException:
            self._stop()
            raise
        finally:
            self._lock.release()

    def _take(self, row: int) -> Any:
        if row != self._next:
            self._stop()
            self._streak = 0
        self._next = row + 1
        self._streak += 1
        if self._stream is None:
            if self._closed or self._streak < _STREAK or self._left(row) < _WORTHWHILE_BYTES or self._is_cached(row):
                return None
            rows = range(row, len(self._description))
            self._stream = TensorStream(self._description, rows, self._load_options())
        name, tensor = next(self._stream)
        assert name == self._description.names[row]
        if self._next == len(self._description):
            self._finish()
        return tensor

    def _left(self, row: int) -> int:
        return self._description.shards[0].identity.size_bytes - self._description.offsets[row]

    def _is_cached(self, row: int) -> bool:
        """The page cache holds what comes next, or does not let itself be looked at."""
        offset = self._description.offsets[row]
        if offset < self._cached_to:
            return True
        length = min(self._left(row), _LOOK_BYTES)
        cached = residency.cached_in(self._descriptor, [(offset, length)])
        if cached is not None and cached < length * _CACHED_FRACTION:
            return False
        self._cached_to = offset + length
        return True

    def _finish(self) -> None:
        stream, self._stream = self._stream, None
        assert stream is not None
        for _ in stream:
            raise AssertionError("the stream has more tensors than the file")
        if stream.report is not None:
            self._note(stream.report)

    def _stop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def close(self) -> None:
        """End the stream, and begin no other."""
        with self._lock:
            self._closed = True
            self._stop()
