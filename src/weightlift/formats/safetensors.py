"""The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes without gaps.

Owns the format's rules. A header is decoded fast if it has the ordinary form and scanned exactly if it has not; both
ways give columns whose numbers are then judged here. By default exactly those files are accepted that the format's
reference parser accepts. Nothing is allocated from a number that has not been checked against the file's size.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NoReturn

from msgspec import Struct

from weightlift.description import Shard
from weightlift.dtypes import SAFETENSORS
from weightlift.errors import HeaderError, TruncatedFileError, printable
from weightlift.formats import compiled
from weightlift.formats.columns import ShardContents, TensorColumns
from weightlift.formats.files import recognise_other_kind, shown_path
from weightlift.formats.header_decoder import decode
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.formats.files import OpenFile

DTYPES: Final = tuple(SAFETENSORS.values())
"""The data types that ``dtype_codes`` of this format refer to."""

HEADER_BYTES_MAX: Final = 100_000_000
LENGTH_BYTES: Final = 8

_UINT64_MAX: Final = (1 << 64) - 1
_BITS: Final = array("Q", [dtype.block_bytes * 8 // dtype.block_elements for dtype in DTYPES])
_MANY_NUMBERS: Final = 1 << 4
_SHORT_RANK: Final = 8
_DAMAGED: Final = "the file is damaged or was written by a faulty tool: fetch it again or convert it again"
_INCOMPLETE: Final = "the download or copy is incomplete: resume it or fetch the file again"


class Header(Struct, frozen=True):
    """A header that was read and judged.

    Attributes:
        columns: the tensors, sorted by position; positions count from ``data_offset``.
        metadata: the free-form text entries.
        data_offset: where the tensors' bytes begin in the file.
    """

    columns: TensorColumns
    metadata: Mapping[str, str]
    data_offset: int


def read_shard(file: OpenFile, rules: HeaderRules) -> ShardContents:
    """Read the header of an open safetensors file.

    Raises:
        NotACheckpointError: the file is something else.
        TruncatedFileError: it ends before its header or its tensors do.
        HeaderError: its header breaks a rule.
        UnsupportedDtypeError: it has a tensor of an unknown data type.
        FileChangedError: it became shorter while it was read.
    """
    size = file.identity.size_bytes
    length = _header_length(file, size)
    header = parse_header(file.read(LENGTH_BYTES, length), path=file.path, file_size=size, rules=rules)
    return ShardContents(Shard(file.path, file.identity, header.data_offset, header.metadata), header.columns)


def _header_length(file: OpenFile, size: int) -> int:
    path, shown = file.path, shown_path(file.path)
    length = int.from_bytes(file.head[:LENGTH_BYTES], "little")
    if size >= LENGTH_BYTES and 0 < length <= min(HEADER_BYTES_MAX, size - LENGTH_BYTES):
        return length
    if other := recognise_other_kind(path, file.head):
        raise other
    if size < LENGTH_BYTES:
        raise TruncatedFileError(
            f"{shown}: the file has {size} bytes, and a safetensors file begins with {LENGTH_BYTES}",
            hint=_INCOMPLETE,
            path=path,
            offset=0,
            length=LENGTH_BYTES,
        )
    if length > HEADER_BYTES_MAX:
        raise HeaderError(
            f"{shown}: its first bytes give a header length of {length:,} bytes, above the format's limit of "
            f"{HEADER_BYTES_MAX:,} (not a safetensors file?)",
            hint="check that the file is in safetensors format and not encrypted or compressed",
            path=path,
        )
    if length == 0:
        raise HeaderError(f"{shown}: its first bytes give a header length of 0", hint=_DAMAGED, path=path)
    raise TruncatedFileError(
        f"{shown}: header says {length:,} bytes but the file has {size:,} (incomplete download?)",
        hint=_INCOMPLETE,
        path=path,
        offset=LENGTH_BYTES,
        length=length,
    )


def parse_header(header: bytes, *, path: Path, file_size: int, rules: HeaderRules = HeaderRules.REFERENCE) -> Header:
    """Read and judge the JSON text of a header.

    Args:
        header: the whole text, padding included, without the eight bytes before it.
        path: the file, for messages; it is not opened.
        file_size: the file's length in bytes.
        rules: whose rules apply.

    Raises:
        HeaderError: the header breaks a rule.
        UnsupportedDtypeError: a tensor has an unknown data type.
        TruncatedFileError: the tensors do not fit the file.
    """
    is_plain = rules is not HeaderRules.STRICT or header[:1] == b"{"
    columns, metadata = (decode(header) if is_plain else None) or _scan(header, path, rules)
    judge = _Judge(columns, path)
    judge.sort()
    judge.check_sizes()
    judge.check_positions()
    data_offset = LENGTH_BYTES + len(header)
    judge.check_end(file_size, data_offset)
    return Header(judge.columns, metadata, data_offset)


def _scan(header: bytes, path: Path, rules: HeaderRules) -> tuple[TensorColumns, dict[str, str]]:
    # Few files need it, and its patterns take longer to compile than an ordinary header to decode.
    from weightlift.formats.header_scanner import scan

    return scan(header, path=shown_path(path), rules=rules)


class _Judge:
    """Checks the numbers of a header against each other and against the file."""

    def __init__(self, columns: TensorColumns, path: Path) -> None:
        self.columns = columns
        self.path = path

    def refuse(self, row: int, message: str) -> NoReturn:
        name = self.columns.names[row]
        raise HeaderError(
            f"{shown_path(self.path)}: tensor '{printable(name)}' {message}", hint=_DAMAGED, path=self.path, tensor=name
        )

    def sort(self) -> None:
        """Put the tensors in the order of their positions, in which most files already are."""
        columns = self.columns
        if columns.begins[1:] != columns.ends[:-1]:
            begins, ends = columns.begins, columns.ends
            # Twice by one number is several times faster than once by two, and sorting keeps the order of equals.
            order = sorted(range(len(columns)), key=ends.__getitem__)
            order.sort(key=begins.__getitem__)
            self.columns = columns.select(order)

    def check_positions(self) -> None:
        """Tensors begin at 0 and follow each other without a hole or an overlap."""
        begins, ends = self.columns.begins, self.columns.ends
        if begins[1:] == ends[:-1] and not any(begins[:1]):
            return
        wanted = array("Q", [0]) + ends[:-1]
        row = next(row for row, (begin, end) in enumerate(zip(begins, wanted, strict=True)) if begin != end)
        begin, expected = begins[row], wanted[row]
        if begin > expected:
            self.refuse(row, f"begins at byte {begin:,} of the data, {begin - expected:,} bytes after the last one")
        before = printable(self.columns.names[row - 1])
        self.refuse(row, f"begins at byte {begin:,} of the data and overlaps '{before}', to {expected:,}")

    def check_sizes(self) -> None:
        """Every tensor's byte range has the size that its data type and shape give."""
        columns, bits = self.columns, _BITS
        library = compiled.library() if len(columns) + len(columns.dims) > _MANY_NUMBERS else None
        if library is not None:
            row = library.first_wrong_size(columns, bits)
            if row < len(columns):
                first = sum(columns.ranks[:row])
                self.check_size(row, first, first + columns.ranks[row])
            return
        dims, first = columns.dims, 0
        for row, (code, rank, begin, end) in enumerate(
            zip(columns.dtype_codes, columns.ranks, columns.begins, columns.ends, strict=True)
        ):
            last = first + rank
            elements = 1
            # Long shapes and shapes with a zero are left to the exact check, which stops at the first overflow.
            if rank <= _SHORT_RANK:
                for dim in dims[first:last]:
                    elements *= dim
            if rank > _SHORT_RANK or not elements or elements * bits[code] != (end - begin) * 8:
                self.check_size(row, first, last)
            first = last

    def check_size(self, row: int, first: int, last: int) -> None:
        """Judge one tensor as the reference parser does, with products in 64 bits."""
        columns = self.columns
        dtype = DTYPES[columns.dtype_codes[row]]
        begin, end = columns.begins[row], columns.ends[row]
        if end < begin:
            self.refuse(row, f"ends at byte {end:,} of the data, before its beginning at {begin:,}")
        elements = 1
        for position in range(first, last):
            elements *= columns.dims[position]
            if elements > _UINT64_MAX:
                self.refuse(row, f"has shape {self.shown_shape(first, last)}, more elements than 64 bits can count")
        total_bits = elements * _BITS[columns.dtype_codes[row]]
        what = f"{dtype.name} of shape {self.shown_shape(first, last)}"
        if total_bits > _UINT64_MAX:
            self.refuse(row, f"is {what}, more bits than 64 bits can count")
        if total_bits % 8:
            self.refuse(row, f"is {what}, {total_bits:,} bits, which do not fill whole bytes")
        if end - begin != total_bits // 8:
            self.refuse(row, f"is {what}, {total_bits // 8:,} bytes, but its data_offsets span {end - begin:,}")

    def shown_shape(self, first: int, last: int) -> str:
        shown = ", ".join(map(str, self.columns.dims[first : min(last, first + 12)]))
        return f"[{shown}, … {last - first:,} dimensions]" if last - first > 12 else f"[{shown}]"

    def check_end(self, file_size: int, data_offset: int) -> None:
        """The last tensor ends where the file ends."""
        columns = self.columns
        end = data_offset + (columns.ends[-1] if columns.ends else 0)
        if end == file_size:
            return
        shown = shown_path(self.path)
        if end < file_size:
            raise HeaderError(
                f"{shown}: the last tensor ends at byte {end:,} but the file has {file_size:,}: "
                f"{file_size - end:,} bytes belong to no tensor",
                hint=_DAMAGED,
                path=self.path,
                offset=end,
                length=file_size - end,
            )
        row = next(row for row, tensor_end in enumerate(columns.ends) if data_offset + tensor_end > file_size)
        begin, length = data_offset + columns.begins[row], columns.ends[row] - columns.begins[row]
        raise TruncatedFileError(
            f"{shown}: the header describes {end:,} bytes but the file has {file_size:,}; "
            f"tensor '{printable(columns.names[row])}' is cut off (incomplete download?)",
            hint=_INCOMPLETE,
            path=self.path,
            tensor=columns.names[row],
            offset=begin,
            length=length,
        )
