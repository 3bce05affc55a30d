"""A tensor that is still in its file: indexing reads the bytes that the index needs, and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlift.compat.safetensors.opened import OpenedFile


class TensorMeta:
    """A tensor's entry in the header.

    Attributes:
        dtype: the format's name of the data type, for example ``F32``.
        shape: the logical shape.
        data_offsets: where its bytes begin and end, counted from the first byte behind the header.
    """

    __slots__ = ("data_offsets", "dtype", "shape")

    def __init__(self, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.data_offsets = data_offsets

    def __repr__(self) -> str:
        return f'TensorMeta {{ dtype: "{self.dtype}", shape: {self.shape}, data_offsets: {self.data_offsets} }}'


class PySafeSlice:
    """What ``safe_open.get_slice`` returns.

    Attributes:
        file: the open file, for what loads many tensors at once.
        row: which of its tensors.
    """

    __slots__ = ("file", "row")

    def __init__(self, file: OpenedFile, row: int) -> None:
        self.file = file
        self.row = row

    def get_shape(self) -> list[int]:
        """The tensor's logical shape."""
        return list(self.file.description.shape(self.row))

    def get_dtype(self) -> str:
        """The format's name of the data type, for example ``F32``."""
        return self.file.description.dtype(self.row).name

    def __getitem__(self, index: Any) -> Any:
        return self.file.part(self.row, index)
