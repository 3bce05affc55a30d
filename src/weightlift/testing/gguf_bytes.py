"""GGUF files put together byte by byte, so that any rule of the format can be broken; needs no package.

Kinds of values and tensors are the format's own numbers.
"""

from __future__ import annotations

import struct
from typing import Any, Final

STRING: Final = 8
ARRAY: Final = 9
NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string with its length, or with another one."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def value(kind: int, content: Any) -> bytes:
    """A value without its kind; an array's content is ``(kind of its items, items)``."""
    if kind == STRING:
        return text(content)
    if kind == ARRAY:
        item_kind, items = content
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(value(item_kind, item) for item in items)
    return struct.pack(f"<{NUMBERS[kind]}", content)


def entry(key: str | bytes, kind: int, content: Any) -> bytes:
    """One entry of the metadata."""
    return text(key) + struct.pack("<I", kind) + value(kind, content)


def tensor(name: str | bytes, ne: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    """One entry of the table of tensors, dimensions in the file's order, innermost first."""
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def gguf_file(
    tensors: list[bytes],
    entries: list[bytes],
    *,
    data: int = 16,
    version: int = 3,
    tensor_count: int | None = None,
    entry_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file.

    Args:
        tensors: entries of the table of tensors.
        entries: entries of the metadata.
        data: bytes behind the header.
        version: the format's version.
        tensor_count: how many tensors it says there are; ``None`` for as many as there are.
        entry_count: how many entries it says there are.
        alignment: where the data begins.
    """
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + bytes(number % 251 for number in range(data))
