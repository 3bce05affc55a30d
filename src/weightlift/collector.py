"""Python's cyclic garbage collector, kept still while very many tensors are made, and while modules are imported.

It goes through everything that is new each time some hundreds of objects were made, and through everything there is
now and then; none of these tensors can be garbage, and for hundreds of thousands that takes longer than making them
(the documentation of :mod:`gc` says to switch it off only where no reference cycles are made, as here). Memory whose
last reference goes is freed as ever.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

MANY: Final = 4096
"""Objects from which on it is worth it."""

_lock = threading.Lock()
_resting = 0
_was_enabled = False
_follows_forks = False


@contextlib.contextmanager
def collector_resting(objects: int) -> Iterator[None]:
    """Have the garbage collector rest inside the block if so many objects are about to be made.

    It is one for the whole process: several threads may be inside at once, and the last to leave has it go on, unless
    the program had switched it off.
    """
    if objects < MANY:
        yield
        return
    try:
        # Inside, so that Ctrl-C right behind it does not leave the collector switched off.
        _begin()
        yield
    finally:
        _end()


def _begin() -> None:
    global _resting, _was_enabled, _follows_forks  # noqa: PLW0603 - there is one collector
    with _lock:
        if not _follows_forks and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_end_in_child)
            _follows_forks = True
        if _resting == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _resting += 1


def _end() -> None:
    global _resting  # noqa: PLW0603
    with _lock:
        # In a child that was forked inside a block it goes on already.
        _resting = max(0, _resting - 1)
        if _resting == 0 and _was_enabled:
            _take_for_old()
            gc.enable()


def _take_for_old() -> None:
    """Count everything that there is among the old: what was made here would be gone through twice first, for nothing.

    Freezing sets it apart without looking at it, and thawing adds it to the oldest; a program that has frozen something
    itself would get that back, so it is left alone.
    """
    if hasattr(gc, "freeze") and gc.get_freeze_count() == 0:
        gc.freeze()
        gc.unfreeze()


def _end_in_child() -> None:
    """A forked child has none of the other threads that were making tensors."""
    global _lock, _resting  # noqa: PLW0603
    _lock = threading.Lock()
    if _resting and _was_enabled:
        gc.enable()
    _resting = 0
