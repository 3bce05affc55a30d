"""The table of data types: how many bytes a number of elements takes, and what frameworks call them.

A data type is a block of ``block_elements`` elements in ``block_bytes`` bytes. Ordinary types have one element a
block; packed ones (F4, F6, quantised types) have several. Framework names are strings here, so that neither torch nor
numpy is imported to read a header.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class DType:
    """One data type as stored in a checkpoint.

    Attributes:
        name: the name the format uses, for example ``"BF16"``.
        block_elements: elements in one block.
        block_bytes: bytes in one block.
        torch: attribute of ``torch`` that stands for it, or ``None`` where torch has none.
        numpy: name of the numpy or ``ml_dtypes`` type, or ``None`` where neither has one.
        packed: how many elements share one framework element along the last dimension; 1 for ordinary types.
            A packed type's framework type is ``torch``/``numpy`` where the framework has one, else ``uint8``.
    """

    name: str
    block_elements: int
    block_bytes: int
    torch: str | None
    numpy: str | None
    packed: int = 1

    @property
    def alignment(self) -> int:
        """Address alignment in bytes that an array of this type needs."""
        if self.block_elements > 1:
            return 1
        return min(self.block_bytes, 8)

    def storage_bytes(self, elements: int) -> int | None:
        """Bytes that ``elements`` elements take, or ``None`` if they do not fill whole bytes."""
        bits = self.block_bytes * 8 // self.block_elements
        total = elements * bits
        return None if total % 8 else total // 8


def _plain(name: str, size: int, torch: str | None, numpy: str | None) -> DType:
    return DType(name, 1, size, torch, numpy)


SAFETENSORS: Final[dict[str, DType]] = {
    dtype.name: dtype
    for dtype in (
        _plain("BOOL", 1, "bool", "bool"),
        DType("F4", 2, 1, "float4_e2m1fn_x2", None, packed=2),
        DType("F6_E2M3", 4, 3, None, None, packed=1),
        DType("F6_E3M2", 4, 3, None, None, packed=1),
        _plain("U8", 1, "uint8", "uint8"),
        _plain("I8", 1, "int8", "int8"),
        _plain("F8_E5M2", 1, "float8_e5m2", "float8_e5m2"),
        _plain("F8_E4M3", 1, "float8_e4m3fn", "float8_e4m3fn"),
        _plain("F8_E5M2FNUZ", 1, "float8_e5m2fnuz", "float8_e5m2fnuz"),
        _plain("F8_E4M3FNUZ", 1, "float8_e4m3fnuz", "float8_e4m3fnuz"),
        _plain("F8_E8M0", 1, "float8_e8m0fnu", "float8_e8m0fnu"),
        _plain("I16", 2, "int16", "int16"),
        _plain("U16", 2, "uint16", "uint16"),
        _plain("F16", 2, "float16", "float16"),
        _plain("BF16", 2, "bfloat16", "bfloat16"),
        _plain("I32", 4, "int32", "int32"),
        _plain("U32", 4, "uint32", "uint32"),
        _plain("F32", 4, "float32", "float32"),
        _plain("C64", 8, "complex64", "complex64"),
        _plain("F64", 8, "float64", "float64"),
        _plain("I64", 8, "int64", "int64"),
        _plain("U64", 8, "uint64", "uint64"),
    )
}
"""Every data type of the safetensors format, by its name there."""
