"""Ranges of bytes that follow each other: pure, whatever kind of range it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

R = TypeVar("R")


def joined(ranges: Iterable[R], join: Callable[[R, R], R | None]) -> Iterator[R]:
    """Ranges in order, neighbours that belong together made one.

    Args:
        ranges: of any kind.
        join: the one range that two neighbours make; ``None`` if they stay two.
    """
    last: R | None = None
    for one in ranges:
        both = None if last is None else join(last, one)
        if both is None and last is not None:
            yield last
        last = one if both is None else both
    if last is not None:
        yield last
