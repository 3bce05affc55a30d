"""The table of data types: how many bytes a number of elements takes, and what frameworks call them.

A data type is a block of ``block_elements`` elements in ``block_bytes`` bytes. Ordinary types have one element a
block; packed ones (F4, F6, quantised types) have several. Framework names are strings here, so that neither torch nor
numpy is imported to read a header.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct


class DType(Struct, frozen=True):
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
        total, rest = divmod(elements * self.block_bytes, self.block_elements)
        return None if rest else total


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

PYTORCH: Final[dict[str, DType]] = {
    dtype.torch: dtype
    for dtype in (*SAFETENSORS.values(), _plain("C128", 16, "complex128", "complex128"))
    if dtype.torch and dtype.packed == 1
}
"""Every data type of PyTorch checkpoints that is read, by torch's name for it."""


def _blocks(name: str, elements: int, nbytes: int) -> DType:
    return DType(name, elements, nbytes, None, None)


GGML: Final[dict[int, DType]] = {
    0: SAFETENSORS["F32"],
    1: SAFETENSORS["F16"],
    2: _blocks("Q4_0", 32, 18),
    3: _blocks("Q4_1", 32, 20),
    6: _blocks("Q5_0", 32, 22),
    7: _blocks("Q5_1", 32, 24),
    8: _blocks("Q8_0", 32, 34),
    9: _blocks("Q8_1", 32, 40),
    10: _blocks("Q2_K", 256, 84),
    11: _blocks("Q3_K", 256, 110),
    12: _blocks("Q4_K", 256, 144),
    13: _blocks("Q5_K", 256, 176),
    14: _blocks("Q6_K", 256, 210),
    15: _blocks("Q8_K", 256, 292),
    16: _blocks("IQ2_XXS", 256, 66),
    17: _blocks("IQ2_XS", 256, 74),
    18: _blocks("IQ3_XXS", 256, 98),
    19: _blocks("IQ1_S", 256, 50),
    20: _blocks("IQ4_NL", 32, 18),
    21: _blocks("IQ3_S", 256, 110),
    22: _blocks("IQ2_S", 256, 82),
    23: _blocks("IQ4_XS", 256, 136),
    24: SAFETENSORS["I8"],
    25: SAFETENSORS["I16"],
    26: SAFETENSORS["I32"],
    27: SAFETENSORS["I64"],
    28: SAFETENSORS["F64"],
    29: _blocks("IQ1_M", 256, 56),
    30: SAFETENSORS["BF16"],
    34: _blocks("TQ1_0", 256, 54),
    35: _blocks("TQ2_0", 256, 66),
    39: _blocks("MXFP4", 32, 17),
    40: _blocks("NVFP4", 64, 36),
    41: _blocks("Q1_0", 128, 18),
}
"""Every tensor type of ggml (``ggml.h``, as of gguf 0.19), by its number in a GGUF file."""

GGML_QUANTISED: Final = frozenset(dtype.name for dtype in GGML.values() if dtype.block_elements > 1)
"""Names of the ggml types that arrive as raw blocks, and that ``dequantize=True`` turns into floating point."""
