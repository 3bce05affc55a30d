"""Turning quantised blocks of ggml types into floating point, chunk by chunk, by the routines of the package ``gguf``.

Engines cut ranges without regard to blocks. What a cut leaves of a block waits here for its other part, a few hundred
bytes at a time; everything else is converted straight out of the slot, few enough blocks at once that the routines'
working memory stays within ``DEQUANTIZE_BYTES`` of the budget.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from weightlift.dtypes import GGML_QUANTISED, SAFETENSORS
from weightlift.errors import MissingExtraError, UnsupportedDtypeError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.description import Description
    from weightlift.dtypes import DType
    from weightlift.targets.frameworks import TensorMaker

_ELEMENTS: Final = 1 << 16
"""Elements converted at a time. The routines' working memory is up to 19 bytes an element."""


def quantised_rows(description: Description, rows: Sequence[int]) -> list[int]:
    """The rows whose tensors are stored in a quantised ggml type."""
    quantised = [dtype.name in GGML_QUANTISED for dtype in description.dtypes]
    if not any(quantised):
        return []
    codes = description.dtype_codes
    return [row for row in rows if quantised[codes[row]]]


class Dequantizer:
    """Converts the chunks of quantised tensors, which may come in any order.

    Args:
        description: the checkpoint.
        rows: the quantised rows that will come.
        maker: whose tensors are filled.
        dtype: the framework's type of new tensors; ``None`` for float32.

    Attributes:
        rows: the rows given.
        dtype: the framework's type of new tensors.

    Raises:
        MissingExtraError: the package ``gguf`` is not installed.
        UnsupportedDtypeError: it has no routine for one of the types.
    """

    def __init__(self, description: Description, rows: Sequence[int], maker: TensorMaker, dtype: Any = None) -> None:
        try:
            self._gguf = importlib.import_module("gguf")
            self._numpy = importlib.import_module("numpy")
        except ImportError as err:
            raise MissingExtraError(
                "dequantize=True needs the package gguf, which is not installed",
                hint="pip install 'weightlift[gguf]'",
            ) from err
        self._description = description
        self._maker = maker
        self._torn: dict[tuple[int, int], tuple[bytearray, int]] = {}
        self.rows = frozenset(rows)
        self.dtype = maker.resolve_dtype("float32") if dtype is None else dtype
        for row in {description.dtype_codes[row]: row for row in rows}.values():
            self._check_type(row)

    def _check_type(self, row: int) -> None:
        dtype = self._description.dtype(row)
        try:
            self._values(self._numpy.zeros((1, dtype.block_bytes), "uint8"), dtype)
        except (NotImplementedError, KeyError, AttributeError) as err:
            name = self._description.names[row]
            raise UnsupportedDtypeError(
                f"tensor '{printable(name)}' is {dtype.name}, which the gguf package has no routine to dequantise",
                hint="leave dequantize out to get its raw blocks, or leave the tensor out with names=…",
                tensor=name,
            ) from err

    def _values(self, blocks: Any, dtype: DType) -> Any:
        kind = self._gguf.GGMLQuantizationType[dtype.name]
        # Any bits may be in a file; scales that overflow or are no numbers come out as they are.
        with self._numpy.errstate(all="ignore"):
            return self._gguf.quants.dequantize(blocks, kind)

    def assign(self, row: int, flat: Any, buffer: Any, offset: int) -> None:
        """Convert a chunk of a tensor into its part of the flattened destination.

        Args:
            row: which tensor.
            flat: the destination, one-dimensional, one element for each of the tensor.
            buffer: the chunk's bytes.
            offset: where in the tensor they begin.
        """
        dtype = self._description.dtype(row)
        size = dtype.block_bytes
        raw = self._numpy.frombuffer(buffer, "uint8")
        first, skipped = divmod(offset, size)
        if skipped:
            head = min(size - skipped, len(raw))
            self._join(row, flat, first, skipped, raw[:head])
            raw, first = raw[head:], first + 1
        whole = len(raw) // size
        if len(raw) % size:
            self._join(row, flat, first + whole, 0, raw[whole * size :])
        step = max(1, _ELEMENTS // dtype.block_elements)
        for begin in range(0, whole, step):
            end = min(begin + step, whole)
            self._put(flat, first + begin, raw[begin * size : end * size], dtype)

    def _join(self, row: int, flat: Any, block: int, at: int, part: Any) -> None:
        """Keep a part of a block until all of it is there."""
        dtype = self._description.dtype(row)
        whole, filled = self._torn.pop((row, block), (bytearray(dtype.block_bytes), 0))
        whole[at : at + len(part)] = part.tobytes()
        filled += len(part)
        if filled < dtype.block_bytes:
            self._torn[row, block] = (whole, filled)
        else:
            self._put(flat, block, self._numpy.frombuffer(whole, "uint8"), dtype)

    def _put(self, flat: Any, block: int, raw: Any, dtype: DType) -> None:
        values = self._numpy.ascontiguousarray(self._values(raw.reshape(1, -1), dtype).reshape(-1))
        self._maker.assign(flat, block * dtype.block_elements, values, SAFETENSORS["F32"], len(values))

    def close(self) -> None:
        """Forget the parts of blocks that were never completed."""
        self._torn.clear()
