"""The metadata of a GGUF file: typed values by key, of which long ones stay in the file until somebody asks.

Owns the format's value types. A vocabulary is an array of hundreds of thousands of strings: going past one costs a
look at each length, building it costs many times that and is done on request only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from weightlift.errors import FileChangedError, printable
from weightlift.formats.files import open_file, shown_path
from weightlift.formats.header_reader import HeaderReader

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.description import FileIdentity
    from weightlift.formats.files import OpenFile

STRING: Final = 8
ARRAY: Final = 9
_BOOL: Final = 7

_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_NAMES: Final = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64", "int64",
    "float64",
)  # fmt: skip
_SIZES: Final = {kind: struct.calcsize(f"<{code}") for kind, code in _NUMBERS.items()}
_SMALLEST: Final = {**_SIZES, STRING: 8, ARRAY: 12}

_DEPTH_MAX: Final = 8
_INNER_ARRAYS_MAX: Final = 1 << 20
_NAME_BYTES_MAX: Final = 64 << 10
_KEPT_STRING_BYTES: Final = 64 << 10
_KEPT_BYTES_MAX: Final = 16 << 20
"""Strings up to the first size are kept, and up to the second in all; others stay in the file like arrays."""


class StoredValue(Struct, frozen=True):
    """A value that was left in the file.

    Attributes:
        offset: where it begins, behind its type.
        kind: its type's number, ``STRING`` or ``ARRAY``.
        item_kind: for an array, the number of its items' type.
        count: how many items, or bytes of a string.
    """

    offset: int
    kind: int
    item_kind: int
    count: int

    def __str__(self) -> str:
        if self.kind == STRING:
            return f"a string of {self.count:,} bytes"
        return f"{self.count:,} × {_NAMES[self.item_kind]}"


class GGUFMetadata(Mapping[str, Any]):
    """Metadata by key: numbers, booleans, strings, and lists for arrays.

    Arrays and very long strings are read from the file each time they are asked for. Bytes of a string that are not
    UTF-8 become lone surrogates, as ``os.fsdecode`` makes them.

    Args:
        path: the file.
        identity: what the file was when its header was read.
        values: decoded values, or where in the file they are.
    """

    def __init__(self, path: Path, identity: FileIdentity, values: dict[str, Any]) -> None:
        self._path = path
        self._identity = identity
        self._values = values

    def __getitem__(self, key: str) -> Any:
        """The value of a key.

        Raises:
            KeyError: there is no such key.
            FileChangedError: the value is in the file, and the file was changed.
        """
        value = self._values[key]
        return self._read(key, value) if isinstance(value, StoredValue) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __repr__(self) -> str:
        return f"<GGUFMetadata of {len(self)} keys in {self._path.name}>"

    def stored(self, key: str) -> StoredValue | None:
        """Type and length of a value that was left in the file; ``None`` for others."""
        value = self._values.get(key)
        return value if isinstance(value, StoredValue) else None

    def _read(self, key: str, stored: StoredValue) -> Any:
        with open_file(self._path) as file:
            if file.identity != self._identity:
                raise FileChangedError(
                    f"{shown_path(self._path)}: the file was changed since its header was read, so that the value of "
                    f"'{printable(key)}' is no longer where it was",
                    hint="open the checkpoint again",
                    path=self._path,
                )
            return _build(HeaderReader(file, stored.offset), stored.kind, f"the value of '{printable(key)}'")


def read_metadata(reader: HeaderReader, file: OpenFile, count: int) -> GGUFMetadata:
    """Read ``count`` keys and their values; the reader stands behind the last one afterwards.

    Raises:
        HeaderError: a key is given twice, or a value has an unknown type or is nested too deeply.
        TruncatedFileError: the file ends before.
    """
    values: dict[str, Any] = {}
    inner_arrays, kept = [0], 0
    for number in range(count):
        name = f"metadata key {number:,}"
        key = read_name(reader, name)
        if key in values:
            reader.refuse(f"metadata key '{printable(key)}' is given twice")
        what = f"the value of '{printable(key)}'"
        kind = _kind(reader, what)
        begin = reader.position
        if kind in _NUMBERS:
            values[key] = _number(reader, kind, what)
        elif kind == STRING:
            length = reader.uint64(what)
            if length <= _KEPT_STRING_BYTES and kept + length <= _KEPT_BYTES_MAX:
                kept += length
                values[key] = reader.take(length, what).decode("utf-8", "surrogateescape")
            else:
                reader.skip(length, what)
                values[key] = StoredValue(begin, STRING, 0, length)
        else:
            values[key] = StoredValue(begin, ARRAY, *_skip_array(reader, what, 1, inner_arrays))
    return GGUFMetadata(file.path, file.identity, values)


def read_name(reader: HeaderReader, what: str) -> str:
    """The next string, which must be UTF-8 and of a sensible length.

    Raises:
        HeaderError: it is not.
        TruncatedFileError: the file ends before.
    """
    length = reader.uint64(what)
    reader.require(length, what)
    if length > _NAME_BYTES_MAX:
        reader.refuse(f"{what} has a name of {length:,} bytes, above the limit of {_NAME_BYTES_MAX:,}")
    try:
        return reader.take(length, what).decode()
    except UnicodeDecodeError as err:
        reader.refuse(f"{what} is not UTF-8: {printable(str(err))}")


def _kind(reader: HeaderReader, what: str) -> int:
    kind = reader.uint32(what)
    if kind >= len(_NAMES):
        reader.refuse(f"{what} has type {kind}, which is unknown; the last known is 12, float64")
    return kind


def _number(reader: HeaderReader, kind: int, what: str) -> Any:
    return struct.unpack(f"<{_NUMBERS[kind]}", reader.take(_SIZES[kind], what))[0]


def _array_head(reader: HeaderReader, what: str) -> tuple[int, int]:
    kind, count = _kind(reader, what), reader.uint64(what)
    reader.require(count * _SMALLEST[kind], f"{what}, {count:,} × {_NAMES[kind]},")
    return kind, count


def _skip_array(reader: HeaderReader, what: str, depth: int, inner_arrays: list[int]) -> tuple[int, int]:
    kind, count = _array_head(reader, what)
    if kind in _NUMBERS:
        reader.skip(count * _SIZES[kind], what)
    elif kind == STRING:
        reader.skip_strings(count, what)
    else:
        if depth == _DEPTH_MAX:
            reader.refuse(f"{what} is an array nested more than {_DEPTH_MAX} deep")
        inner_arrays[0] += count
        if inner_arrays[0] > _INNER_ARRAYS_MAX:
            reader.refuse(f"{what} brings the arrays inside arrays to {inner_arrays[0]:,}, above {_INNER_ARRAYS_MAX:,}")
        for _ in range(count):
            _skip_array(reader, what, depth + 1, inner_arrays)
    return kind, count


def _build(reader: HeaderReader, kind: int, what: str) -> Any:
    if kind == STRING:
        return reader.string(what).decode("utf-8", "surrogateescape")
    item_kind, count = _array_head(reader, what)
    if item_kind in _NUMBERS:
        return list(struct.unpack(f"<{count}{_NUMBERS[item_kind]}", reader.take(count * _SIZES[item_kind], what)))
    if item_kind == STRING:
        return [raw.decode("utf-8", "surrogateescape") for raw in reader.strings(count, what)]
    return [_build(reader, item_kind, what) for _ in range(count)]
