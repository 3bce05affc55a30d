"""Fast decoding of ordinary safetensors headers with msgspec.

Takes headers in the form that every common writer produces and gives up (returns ``None``) on anything else, without
judging it: what is odd goes to :mod:`weightlift.formats.header_scanner`, which is exact and slower. This module must
therefore never return columns for a header that the format's reference parser refuses or reads differently.

What msgspec lets pass and the reference parser does not (or reads otherwise) is found by three cheap tests. Without a
backslash in the header, strings are what stands between two quotes, so counting quotes counts strings: ten quotes a
tensor mean that no field is unknown or given twice and no name is repeated within a block. ``-0`` is an integer for
msgspec and a float for the reference. Names repeated across blocks show when the names are put into a set.

The header is decoded in blocks, cut between two tensors, because objects made for a whole header at once fall out of
the processor's caches (three times slower) and cost several times the header's size.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from weightlift.dtypes import SAFETENSORS
from weightlift.formats.columns import TensorColumns

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_BYTES: Final = 64 * 1024
_BLOCK_BYTES_MAX: Final = 256 * 1024
_QUOTES_PER_TENSOR: Final = 10
_METADATA: Final = "__metadata__"

_BOUNDARY = re.compile(rb'\}[ \t\n\r]*+,[ \t\n\r]*+(?=")')
_MINUS_ZERO = re.compile(rb"-0[ \t\n\r,\]]")
_LEADING_METADATA = re.compile(
    rb'[ \t\n\r]*+\{[ \t\n\r]*+"__metadata__"[ \t\n\r]*+:[ \t\n\r]*+'
    rb'(\{[^{}]*+\})[ \t\n\r]*+(?:,[ \t\n\r]*+(?=")|(?=\}))'
)

if TYPE_CHECKING:
    _DtypeName = str
else:
    # Decoding into a literal returns the one string object that is already there instead of a new one per tensor.
    _DtypeName = Literal[tuple(SAFETENSORS)]


class _Tensor(msgspec.Struct, gc=False):
    dtype: _DtypeName
    shape: list[int]
    data_offsets: tuple[int, int]


_TENSORS = msgspec.json.Decoder(dict[str, _Tensor])
_TEXTS = msgspec.json.Decoder(dict[str, str])
_CODES: Final = {name: code for code, name in enumerate(SAFETENSORS)}


def decode(header: bytes) -> tuple[TensorColumns, dict[str, str]] | None:
    """Decode a header of the ordinary form.

    Args:
        header: the JSON text of the header, padding included.

    Returns:
        The tensors in the order in which the header lists them, with names unique and nothing else checked, and the
        free-form metadata. ``None`` if the header is of another form, right or wrong.
    """
    if b"\\" in header or _MINUS_ZERO.search(header):
        return None
    try:
        return _decode_ordinary(header)
    except (msgspec.MsgspecError, OverflowError, UnicodeError, RecursionError):
        return None


def _decode_ordinary(header: bytes) -> tuple[TensorColumns, dict[str, str]] | None:
    metadata: dict[str, str] = {}
    start, lead = 0, b""
    if found := _LEADING_METADATA.match(header):
        metadata = _TEXTS.decode(found[1])
        if found[1].count(b'"') != 4 * len(metadata):
            return None
        start, lead = found.end(), b"{"
    columns = TensorColumns()
    for block in _blocks(header, start, lead):
        if len(block) > _BLOCK_BYTES_MAX:
            return None
        _append(columns, _TENSORS.decode(block))
    unique = set(columns.names)
    if len(unique) != len(columns) or _METADATA in unique:
        return None
    if header.count(b'"', start) != _QUOTES_PER_TENSOR * len(columns):
        return None
    return columns, metadata


def _blocks(header: bytes, start: int, lead: bytes) -> Iterator[bytes]:
    """Cut a header into objects of about ``BLOCK_BYTES``.

    A cut inside a string or inside a nested object leaves a piece with an odd quote or brace, which does not decode:
    a wrong cut can only end in ``None``, never in a wrong result.
    """
    while True:
        cut = _BOUNDARY.search(header, start + BLOCK_BYTES)
        if cut is None:
            yield lead + header[start:]
            return
        yield b"%b%b}" % (lead, header[start : cut.start() + 1])
        start, lead = cut.end(), b"{"


def _append(columns: TensorColumns, tensors: dict[str, _Tensor]) -> None:
    values = tensors.values()
    shapes = [tensor.shape for tensor in values]
    ranges = [tensor.data_offsets for tensor in values]
    columns.names += tensors
    columns.dtype_codes.fromlist([_CODES[tensor.dtype] for tensor in values])
    columns.dims.extend(chain.from_iterable(shapes))
    columns.ranks.fromlist([len(shape) for shape in shapes])
    columns.begins.fromlist([begin for begin, _ in ranges])
    columns.ends.fromlist([end for _, end in ranges])
