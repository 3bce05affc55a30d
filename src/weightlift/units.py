"""Sizes and alignment: parsing, printing and rounding of byte counts.

Owns no state and knows nothing of files or memory. Byte counts are plain ``int``; a name that holds one ends in
``_bytes``. Binary prefixes (KiB, MiB, GiB) are powers of 1024, decimal ones (KB, MB, GB) powers of 1000.
"""

from __future__ import annotations

import re
from typing import Final

from weightlift.errors import OptionError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

PAGE_BYTES: Final = 4096
"""Granularity used for destination layout; a multiple of every direct-I/O alignment met in practice."""

_FACTORS: Final = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "t": 1 << 40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: int | str, *, option: str = "size") -> int:
    """Turn ``134217728``, ``"128MiB"`` or ``"1.5 GB"`` into a number of bytes.

    Raises:
        OptionError: the text is not a number with a known unit, or the value is negative.
    """
    if isinstance(value, bool):
        raise OptionError(f"{option}={value!r} is not a size", hint=f'write it like {option}="128MiB"')
    if isinstance(value, int):
        if value < 0:
            raise OptionError(f"{option}={value} is negative", hint=f'write it like {option}="128MiB"')
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        units = "B, KiB, MiB, GiB, TiB, KB, MB, GB, TB"
        raise OptionError(f"{option}={value!r} is not a size", hint=f'write it like "128MiB"; units: {units}')
    return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def format_bytes(count: int) -> str:
    """Print a byte count with three significant digits, as ``"1.25 GiB"``; below 1 KiB exactly, as ``"12 B"``."""
    size = float(count)
    if abs(size) < KIB:
        return f"{count} B"
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        size, unit = size / KIB, larger
        if abs(size) < 999.5:
            break
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {unit}"


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of ``alignment`` that is not above ``value``."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is not below ``value``."""
    return value + -value % alignment
