"""The GGUF format of llama.cpp: metadata, a table of tensors, then their bytes, each aligned.

Owns the format's rules for one file (``ggml/src/gguf.cpp`` and the package ``gguf`` agree on them except where said).
Quantised tensors are described by their ggml type and logical shape; dimensions are in the order of frameworks,
outermost first, which is the reverse of the file's. Nothing is allocated from a number that has not been checked.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NoReturn

from weightlift.description import Shard
from weightlift.dtypes import GGML
from weightlift.errors import HeaderError, IndexFileError, TruncatedFileError, UnsupportedDtypeError, printable
from weightlift.formats.columns import ShardContents, TensorColumns
from weightlift.formats.files import GGUF_MAGIC, shown_path
from weightlift.formats.folder import SPLIT_NAME
from weightlift.formats.gguf_values import read_metadata, read_name
from weightlift.formats.header_reader import HeaderReader
from weightlift.types import HeaderRules
from weightlift.units import align_up

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weightlift.formats.files import OpenFile

DTYPES: Final = tuple(GGML.values())
"""The data types that ``dtype_codes`` of this format refer to."""

_CODES: Final = {number: code for code, number in enumerate(GGML)}
_FIXED_BYTES: Final = 24
_VERSIONS: Final = (2, 3)
_DIMENSIONS_MAX: Final = 4
_KEYS_MAX: Final = 1 << 16
_PARTS_MAX: Final = 1 << 16
_TENSORS_MAX: Final = 1 << 20
_INT64_MAX: Final = (1 << 63) - 1
_KEY_BYTES_MIN: Final = 8 + 4 + 1
_TENSOR_BYTES_MIN: Final = 8 + 4 + 4 + 8
_DEFAULT_ALIGNMENT: Final = 32
_DAMAGED: Final = "the file is damaged or was written by a faulty tool: fetch it again or convert it again"
_INCOMPLETE: Final = "the download or copy is incomplete: resume it or fetch the file again"

_REMOVED: Final = {
    **dict.fromkeys((4, 5), "Q4_2 or Q4_3, which ggml dropped in 2023"),
    **dict.fromkeys((31, 32, 33), "Q4_0 repacked for one kind of processor (Q4_0_4_4 and the like), since dropped"),
    **dict.fromkeys((36, 37, 38), "IQ4_NL repacked for one kind of processor (IQ4_NL_4_4 and the like), since dropped"),
}


def read_shard(file: OpenFile, rules: HeaderRules) -> ShardContents:
    """Read the header of an open GGUF file.

    By default gaps between tensors are accepted, as the package ``gguf`` does; ``strict`` wants every tensor where
    llama.cpp expects it, right behind the one before.

    Raises:
        HeaderError: the header breaks a rule, or the file is of a version or byte order that is not read.
        TruncatedFileError: it ends before its header or its tensors do.
        UnsupportedDtypeError: it has a tensor of an unknown type.
        FileChangedError: it became shorter while it was read.
    """
    reader = HeaderReader(file, len(GGUF_MAGIC))
    _check_version(reader)
    tensor_count, key_count = reader.uint64("the number of tensors"), reader.uint64("the number of metadata keys")
    if key_count > _KEYS_MAX:
        reader.refuse(f"says that it has {key_count:,} metadata keys, above the limit of {_KEYS_MAX:,}")
    reader.require(key_count * _KEY_BYTES_MIN, f"metadata of {key_count:,} keys")
    metadata = read_metadata(reader, file, key_count)
    reader.require(tensor_count * _TENSOR_BYTES_MIN, f"a table of {tensor_count:,} tensors")
    if tensor_count > _TENSORS_MAX:
        reader.refuse(f"says that it has {tensor_count:,} tensors, above the limit of {_TENSORS_MAX:,}")
    alignment = _alignment(reader, metadata)
    table = _Table(reader, file, alignment)
    for number in range(tensor_count):
        table.read(f"the entry of tensor {number:,}")
    data_offset = align_up(reader.position, alignment)
    columns = table.judged(data_offset, rules)
    return ShardContents(Shard(file.path, file.identity, data_offset, metadata), columns)


def _check_version(reader: HeaderReader) -> None:
    version = reader.uint32("the version")
    if version in _VERSIONS:
        return
    if version & 0xFFFF == 0 and version:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        reader.refuse(
            f"a big-endian GGUF file (its version reads {swapped} from the other end): numbers in its tensors are "
            f"in the byte order of other machines"
        )
    if version == 1:
        reader.refuse("version 1 of GGUF, which was in use for some weeks of 2023 and counts in 32 bits")
    reader.refuse(f"version {version:,} of GGUF, where versions 2 and 3 are read")


def _alignment(reader: HeaderReader, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value & (value - 1):
        reader.refuse(f"general.alignment is {printable(repr(value))}, not a power of two")
    return value


class _Table:
    """Reads the table of tensors and checks its numbers against each other and against the file."""

    def __init__(self, reader: HeaderReader, file: OpenFile, alignment: int) -> None:
        self._reader = reader
        self._path, self._size = file.path, file.identity.size_bytes
        self._alignment = alignment
        self._columns = TensorColumns()
        self._seen: set[str] = set()

    def _refuse(self, name: str, message: str) -> NoReturn:
        raise HeaderError(
            f"{shown_path(self._path)}: tensor '{printable(name)}' {message}",
            hint=_DAMAGED,
            path=self._path,
            tensor=name,
        )

    def read(self, what: str) -> None:
        """Read one entry: name, dimensions, type, position."""
        reader, columns = self._reader, self._columns
        name = read_name(reader, what)
        if name in self._seen:
            self._refuse(name, "is described twice")
        self._seen.add(name)
        rank = reader.uint32(what)
        if rank > _DIMENSIONS_MAX:
            self._refuse(name, f"has {rank:,} dimensions, and ggml has at most {_DIMENSIONS_MAX}")
        shape = [reader.uint64(what) for _ in range(rank)][::-1]
        number, begin = reader.uint32(what), reader.uint64(what)
        code = _CODES.get(number)
        if code is None:
            raise self._unknown_type(name, number)
        length = self._length(name, shape, code)
        if begin % self._alignment:
            self._refuse(name, f"begins at byte {begin:,} of the data, not a multiple of {self._alignment:,}")
        if length > self._size or begin > self._size:
            raise self._cut_off(name, begin, length)
        columns.names.append(name)
        columns.dtype_codes.append(code)
        columns.begins.append(begin)
        columns.ends.append(begin + length)
        columns.ranks.append(rank)
        columns.dims.extend(shape)

    def _unknown_type(self, name: str, number: int) -> UnsupportedDtypeError:
        removed = _REMOVED.get(number)
        what = f"has ggml type {number:,}, {removed}" if removed else f"has ggml type {number:,}, which is unknown"
        return UnsupportedDtypeError(
            f"{shown_path(self._path)}: tensor '{printable(name)}' {what}",
            hint="convert the model again with a current llama.cpp"
            if removed
            else "update weightlift, or check the file",
            path=self._path,
            tensor=name,
        )

    def _length(self, name: str, shape: Sequence[int], code: int) -> int:
        dtype = DTYPES[code]
        elements = math.prod(shape)
        if max(shape, default=0) > _INT64_MAX or elements > _INT64_MAX:
            self._refuse(name, f"has shape {list(shape)}, more elements than 63 bits can count")
        row = shape[-1] if shape else 1
        if row % dtype.block_elements:
            self._refuse(
                name, f"is {dtype.name} with rows of {row:,} elements, not whole blocks of {dtype.block_elements}"
            )
        return elements // dtype.block_elements * dtype.block_bytes

    def _cut_off(self, name: str, begin: int, length: int) -> TruncatedFileError:
        return TruncatedFileError(
            f"{shown_path(self._path)}: tensor '{printable(name)}' takes {length:,} bytes from byte {begin:,} of the "
            f"data, but the file has {self._size:,} in all: it is cut off (incomplete download?)",
            hint=_INCOMPLETE,
            path=self._path,
            tensor=name,
            offset=begin,
            length=length,
        )

    def judged(self, data_offset: int, rules: HeaderRules) -> TensorColumns:
        """The columns, sorted by position, once nothing overlaps and everything is inside the file."""
        columns = self._columns
        begins, ends = columns.begins, columns.ends
        if any(begin < before for begin, before in zip(begins[1:], ends[:-1], strict=True)):
            if rules is HeaderRules.STRICT:
                self._refuse_disorder()
            columns = columns.select(sorted(range(len(columns)), key=lambda row: (begins[row], ends[row])))
        end = 0
        for row, (begin, stop) in enumerate(zip(columns.begins, columns.ends, strict=True)):
            name = columns.names[row]
            if begin < end:
                before = printable(columns.names[row - 1])
                self._refuse(name, f"begins at byte {begin:,} of the data and overlaps '{before}', to {end:,}")
            expected = align_up(end, self._alignment)
            if begin != expected and rules is HeaderRules.STRICT:
                self._refuse(name, f"begins at byte {begin:,} of the data, where llama.cpp expects {expected:,}")
            if data_offset + stop > self._size:
                raise self._cut_off(name, begin, stop - begin)
            end = stop
        return columns

    def _refuse_disorder(self) -> NoReturn:
        begins, ends, names = self._columns.begins, self._columns.ends, self._columns.names
        row = next(row for row in range(1, len(names)) if begins[row] < ends[row - 1])
        self._refuse(names[row], f"begins at byte {begins[row]:,} of the data, before the end of the one before it")


def other_parts(path: Path, contents: ShardContents) -> list[Path]:
    """All parts of the split checkpoint that a file belongs to, in order; the file alone where it is not split.

    Raises:
        HeaderError: its metadata and its name do not agree on how many parts there are and which one it is.
    """
    count = _split_number(path, contents, "split.count", 0)
    if count <= 1:
        return [path]
    number = _split_number(path, contents, "split.no", 0) + 1
    named = SPLIT_NAME.fullmatch(path.name)
    if named is None or (int(named["number"]), int(named["count"])) != (number, count):
        raise HeaderError(
            f"{shown_path(path)}: its metadata says part {number:,} of {count:,}, its name says otherwise",
            hint=f"give the parts their names back: NAME-00001-of-{count:05}.gguf and so on",
            path=path,
        )
    suffix = path.name[-len(".gguf") :]
    return [path.with_name(f"{named['stem']}-{part:05}-of-{count:05}{suffix}") for part in range(1, count + 1)]


def check_parts(contents: Sequence[ShardContents]) -> None:
    """Check that files read one by one are the parts of one checkpoint, in order.

    Raises:
        HeaderError: a part says that it is another one, or one of another number of parts.
        IndexFileError: the parts together do not hold as many tensors as the first one says.
    """
    for position, item in enumerate(contents):
        path = item.shard.path
        number = _split_number(path, item, "split.no", 0) + 1
        count = _split_number(path, item, "split.count", 0)
        if (number, count) != (position + 1, len(contents)):
            raise HeaderError(
                f"{shown_path(path)}: its metadata says that it is part {number:,} of {count:,}, where part "
                f"{position + 1:,} of {len(contents):,} is expected",
                hint="the parts are of different versions of the model: fetch all of them again",
                path=path,
            )
    first = contents[0].shard
    total, found = first.metadata.get("split.tensors.count"), sum(len(item.columns) for item in contents)
    if total is not None and total != found:
        raise IndexFileError(
            f"{shown_path(first.path)}: says that {printable(repr(total))} tensors are in its {len(contents):,} parts, "
            f"which hold {found:,}",
            hint="the parts are of different versions of the model: fetch all of them again",
            path=first.path,
        )


def _split_number(path: Path, contents: ShardContents, key: str, default: int) -> int:
    value = contents.shard.metadata.get(key, default)
    if not isinstance(value, int) or not 0 <= value <= _PARTS_MAX:
        raise HeaderError(f"{shown_path(path)}: {key} is {printable(repr(value))}", hint=_DAMAGED, path=path)
    return value
