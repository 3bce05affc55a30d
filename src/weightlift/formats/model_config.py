"""The ``config.json`` beside a model's weights, as far as somebody wants to know what the model is.

Owns reading it within bounds. It describes and decides nothing, so a missing or damaged one is no error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from weightlift.errors import WeightliftError
from weightlift.formats.files import open_file

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "config.json"
_BYTES_MAX: Final = 16 << 20


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` in a folder says; empty where there is none that can be read."""
    import msgspec

    try:
        with open_file(folder / NAME) as file:
            size = file.identity.size_bytes
            if size > _BYTES_MAX:
                return {}
            return msgspec.json.decode(file.read(0, size), type=dict[str, Any])
    except (WeightliftError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return {}
