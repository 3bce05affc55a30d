"""PyTorch's zip format (``torch.save`` since 2020): a pickle that says what there is, and one entry per storage.

Owns what may be in the pickle: dictionaries, lists and plain values of any nesting, and dense tensors, which is what
``torch.load`` with ``weights_only=True`` gives. Nothing is executed; whatever else is in there is refused by its name.

Tensors are named by their path in the nesting, joined by dots; what is no tensor becomes metadata under such a path.
Several tensors may lie in one storage, share bytes, or be strided: the columns say so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from weightlift.description import Shard
from weightlift.dtypes import PYTORCH
from weightlift.errors import FormatError, HeaderError, NotACheckpointError, printable
from weightlift.formats.columns import ShardContents, TensorColumns
from weightlift.formats.files import shown_path
from weightlift.formats.pickle_reader import PickleError, PickleReader
from weightlift.formats.pytorch_objects import StorageRecord, TensorRecord, call, flatten, look_up, resolve
from weightlift.formats.zip_directory import data_offset, read_directory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightlift.formats.files import OpenFile
    from weightlift.formats.zip_directory import ZipEntry
    from weightlift.types import HeaderRules

DTYPES: Final = tuple(PYTORCH.values())
"""The data types that ``dtype_codes`` of this format refer to."""

_CODES: Final = {name: code for code, name in enumerate(PYTORCH)}
_PICKLE_BYTES_MAX: Final = 64 << 20
_BYTE_ORDER_BYTES_MAX: Final = 16
_ELEMENTS_MAX: Final = (1 << 63) - 1
_RANK_MAX: Final = 64
_DAMAGED: Final = "the file is damaged or was written by a faulty tool: fetch it again or save it again"
_WEIGHTS_ONLY: Final = (
    "only tensors, dictionaries, lists and plain values are read: save the model's state_dict() instead of the object"
)


class _Place(NamedTuple):
    """Where a tensor's elements lie in the file."""

    begin: int
    end: int
    code: int


def read_shard(file: OpenFile, _: HeaderRules) -> ShardContents:
    """Read what an open PyTorch checkpoint says that it holds.

    Raises:
        NotACheckpointError: it is a zip archive of another kind.
        HeaderError: it breaks a rule, or its pickle holds what is not read.
        UnsupportedDtypeError: it has a tensor of a type that is not read.
        TruncatedFileError: it ends before its directory or its tensors do.
        FileChangedError: it became shorter while it was read.
    """
    entries = read_directory(file)
    root = _root(file, entries)
    _check_byte_order(file, entries.get(f"{root}byteorder"))
    tensors, metadata = _unpickle(file, entries[f"{root}data.pkl"])
    storages = _Storages(file, entries, root)
    names = list(tensors)
    places = [storages.place(name, tensors[name]) for name in names]
    storages.check_overlaps()
    columns = _columns(names, [tensors[name] for name in names], places)
    return ShardContents(Shard(file.path, file.identity, 0, metadata), columns)


def _root(file: OpenFile, entries: Mapping[str, ZipEntry]) -> str:
    """The folder in the archive that holds the checkpoint, with a slash at its end."""
    shown = shown_path(file.path)
    found = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise NotACheckpointError(
            f"{shown}: a zip archive of {len(entries):,} entries that is no PyTorch checkpoint: "
            f"{'none' if not found else 'more than one'} is called data.pkl",
            hint="name the file with the weights, or unpack the archive first",
            path=file.path,
        )
    root = found[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise NotACheckpointError(
            f"{shown}: a TorchScript archive, which holds a program beside its weights",
            hint="load it with torch.jit.load and save its state_dict() with torch.save",
            path=file.path,
        )
    return root


def _check_byte_order(file: OpenFile, entry: ZipEntry | None) -> None:
    if entry is None:
        return
    begin = data_offset(file, entry, "its byte order")
    order = file.read(begin, min(entry.nbytes, _BYTE_ORDER_BYTES_MAX))
    if order != b"little":
        what = "big-endian" if order == b"big" else f"in an unknown byte order, {printable(repr(order))}"
        raise HeaderError(
            f"{shown_path(file.path)}: its numbers are {what}",
            hint="load it with torch.load on any machine and save it again with torch.save on a little-endian one",
            path=file.path,
        )


def _unpickle(file: OpenFile, entry: ZipEntry) -> tuple[dict[str, TensorRecord], dict[str, Any]]:
    if entry.nbytes > _PICKLE_BYTES_MAX:
        raise HeaderError(
            f"{shown_path(file.path)}: its pickle has {entry.nbytes:,} bytes, above the limit of {_PICKLE_BYTES_MAX:,}",
            hint="tensors belong beside the pickle: save them as tensors, not as lists",
            path=file.path,
        )
    data = file.read(data_offset(file, entry, "its pickle"), entry.nbytes)
    try:
        return flatten(PickleReader(data, look_up=look_up, call=call, resolve=resolve).read(), len(data))
    except PickleError as err:
        raise HeaderError(
            f"{shown_path(file.path)}: its pickle holds {err}", hint=_WEIGHTS_ONLY, path=file.path
        ) from err


class _Storages:
    """The storages that tensors refer to, each looked up in the archive once."""

    def __init__(self, file: OpenFile, entries: Mapping[str, ZipEntry], root: str) -> None:
        self._file = file
        self._entries = entries
        self._root = root
        self._begins: dict[str, int] = {}
        self._dtype_of: dict[str, str] = {}

    def _refuse(self, name: str, message: str) -> NoReturn:
        raise HeaderError(
            f"{shown_path(self._file.path)}: tensor '{printable(name)}' {message}",
            hint=_DAMAGED,
            path=self._file.path,
            tensor=name,
        )

    def place(self, name: str, tensor: TensorRecord) -> _Place:
        """Where a tensor lies, once its numbers are known to be possible."""
        storage = tensor.storage
        dtype = PYTORCH[tensor.dtype]
        if self._dtype_of.setdefault(storage.key, tensor.dtype) != tensor.dtype:
            known = self._dtype_of[storage.key]
            self._refuse(name, f"is {tensor.dtype}, but others see the same storage as {known}")
        if len(tensor.shape) > _RANK_MAX or max(*tensor.shape, *tensor.strides, tensor.offset, 0) > _ELEMENTS_MAX:
            self._refuse(name, f"has {len(tensor.shape):,} dimensions, or numbers beyond 63 bits")
        elements = math.prod(tensor.shape)
        reach = 0
        if elements:
            reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
        if elements > _ELEMENTS_MAX:
            self._refuse(name, f"has shape {list(tensor.shape)}, more elements than 63 bits can count")
        room = storage.nbytes // dtype.block_bytes
        if elements and tensor.offset + reach > room:
            self._refuse(
                name,
                f"reaches to element {tensor.offset + reach:,} of storage '{printable(storage.key)}' with {room:,}",
            )
        begin = self._begin(name, storage) + (tensor.offset * dtype.block_bytes if elements else 0)
        return _Place(begin, begin + reach * dtype.block_bytes, _CODES[tensor.dtype])

    def _begin(self, name: str, storage: StorageRecord) -> int:
        begin = self._begins.get(storage.key)
        if begin is not None:
            return begin
        entry = self._entries.get(f"{self._root}data/{storage.key}")
        if entry is None:
            self._refuse(name, f"lies in storage '{printable(storage.key)}', which the archive does not hold")
        if entry.nbytes < storage.nbytes:
            self._refuse(
                name,
                f"lies in storage '{printable(storage.key)}' of {storage.nbytes:,} bytes, of which the archive holds "
                f"{entry.nbytes:,}",
            )
        try:
            begin = self._begins[storage.key] = data_offset(self._file, entry, f"the data of '{printable(name)}'")
        except FormatError as err:
            err.tensor = name
            raise
        return begin

    def check_overlaps(self) -> None:
        """Check that no two entries of the archive claim the same bytes."""
        ranges = sorted(
            (begin, begin + self._entries[f"{self._root}data/{key}"].nbytes, key) for key, begin in self._begins.items()
        )
        end, before = 0, ""
        for begin, stop, key in ranges:
            if begin < end:
                raise HeaderError(
                    f"{shown_path(self._file.path)}: storage '{printable(key)}' begins at byte {begin:,} and overlaps "
                    f"storage '{printable(before)}', to {end:,}",
                    hint=_DAMAGED,
                    path=self._file.path,
                    offset=begin,
                )
            if stop > begin:
                end, before = stop, key


def _columns(names: Sequence[str], tensors: Sequence[TensorRecord], places: Sequence[_Place]) -> TensorColumns:
    """The tensors in columns, sorted by position."""
    order = sorted(range(len(names)), key=lambda index: (places[index].begin, places[index].end))
    columns = TensorColumns()
    end = 0
    for row, index in enumerate(order):
        tensor, place = tensors[index], places[index]
        columns.names.append(names[index])
        columns.dtype_codes.append(place.code)
        columns.begins.append(place.begin)
        columns.ends.append(place.end)
        columns.ranks.append(len(tensor.shape))
        columns.dims.extend(tensor.shape)
        if place.end > place.begin:
            if not tensor.is_contiguous:
                columns.strides[row] = tensor.strides
            columns.shared = columns.shared or place.begin < end
            end = max(end, place.end)
    return columns
