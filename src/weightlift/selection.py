"""Which tensors are wanted: names and globs against a description."""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING

from weightlift.errors import SelectionError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.description import Description

_GLOB = re.compile(r"[*?\[]")


def select_rows(description: Description, names: Sequence[str] | None) -> Sequence[int]:
    """The rows of the tensors wanted, in file order.

    Args:
        description: the checkpoint.
        names: tensor names or globs (``*``, ``?``, ``[…]``); ``None`` for all tensors.

    Raises:
        SelectionError: a name or glob matches no tensor.
    """
    if names is None:
        return range(len(description))
    rows: set[int] = set()
    for pattern in names:
        # A name that holds brackets is still a name.
        if pattern in description:
            rows.add(description.row(pattern))
            continue
        matches = re.compile(fnmatch.translate(pattern)).match if _GLOB.search(pattern) else None
        found = [row for row, name in enumerate(description.names) if matches(name)] if matches else []
        if not found:
            raise SelectionError(
                f"no tensor matches {printable(pattern)!r} among {len(description)} tensors",
                hint=_nearest(description, pattern),
            )
        rows.update(found)
    return sorted(rows)


def _nearest(description: Description, pattern: str) -> str:
    import difflib

    sample = description.names[:5000]
    close = difflib.get_close_matches(pattern, sample, n=3, cutoff=0.5) or sample[:3]
    named = ", ".join(printable(name) for name in close)
    return f"names look like: {named}; globs use * and ?" if named else "the checkpoint holds no tensors"
