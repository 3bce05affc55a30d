"""ExLlamaV3: the reader below its collection of files.

Its ``SafetensorsCollection`` decides what is loaded where, carves destinations out of arenas of its own and hands raw
pointers to four functions of its compiled extension: open, close, read one tensor, read a batch. Those four are
replaced where the collection looks them up; arenas, autosplit and everything else of its own work on unchanged. Batches
of one file onto GPUs are parts of one load, which ends when the collection closes the file.

Not covered: the worker process that it spawns for experts on the CPU, which imports ExLlamaV3 anew, and the ``python``
load method, which does not use the extension.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Unpack

from weightlift.errors import FormatError, printable
from weightlift.integrations.installing import Installed
from weightlift.integrations.raw import RawRange, open_raw, read_raw
from weightlift.integrations.versions import missing, require_known
from weightlift.options import LoadOptions
from weightlift.standing import PartLoads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.description import Shard
    from weightlift.keywords import LoadKeywords

PACKAGE: Final = "exllamav3"
KNOWN_VERSIONS: Final = ("1.6.5",)

_BF16_TO_FP16: Final = 1
_CUDA: Final = 4
_CONVERTED_BYTES: Final = 32 << 20
"""Bytes converted at a time, so that converting takes little memory of its own."""


class Handle:
    """An open file, in the place of the extension's list of file pointers.

    Attributes:
        shard: the file.
    """

    __slots__ = ("shard",)

    def __init__(self, shard: Shard) -> None:
        self.shard = shard


class _Row(NamedTuple):
    """One row of a batch, in the order of its columns."""

    file: int
    offset: int
    size: int
    address: int
    capacity: int
    flags: int
    device: int

    @property
    def device_name(self) -> str:
        return f"cuda:{self.device}" if self.flags & _CUDA else "cpu"


class Extension:
    """ExLlamaV3's extension with weightlift's reader in it; everything else is the extension's own.

    Args:
        extension: the real one.
        keywords: how to load.
        installed: told of every load.
    """

    def __init__(self, extension: Any, keywords: LoadKeywords, installed: Installed) -> None:
        self._extension = extension
        self._options = LoadOptions(**keywords)  # type: ignore[arg-type]
        self._loads = PartLoads(installed.note)
        installed.on_undo = self._loads.close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extension, name)

    @staticmethod
    def stloader_open_file(filename: str) -> Handle:
        """Open a file for reading."""
        return Handle(open_raw(filename))

    def stloader_close_file(self, handle: Any) -> None:
        """Close a file, and end the load that stands; one that was opened before is the extension's to close."""
        if isinstance(handle, Handle):
            self._loads.close()
        else:
            self._extension.stloader_close_file(handle)

    def stloader_read(self, handle: Any, offset: int, size: int, target: Any) -> None:
        """Read a range of a file into a tensor.

        Raises:
            WeightliftError: see :mod:`weightlift.errors`.
        """
        if not isinstance(handle, Handle):
            self._extension.stloader_read(handle, offset, size, target)
            return
        _check_room(size, target.nbytes, handle)
        device = _device_name(target)
        self._read([RawRange(handle.shard, offset, size, target.data_ptr(), device)])

    def stloader_deferred_batch(self, handles: Sequence[Any], loads: Any, max_chunk_size: int) -> None:
        """Carry out a batch: ranges of files to raw addresses, bfloat16 made float16 where a row asks for it.

        Args:
            handles: the files.
            loads: a row per range, in the columns of :class:`_Row`.
            max_chunk_size: of the extension's own reader.

        Raises:
            WeightliftError: see :mod:`weightlift.errors`.
        """
        if not all(isinstance(handle, Handle) for handle in handles):
            self._extension.stloader_deferred_batch(handles, loads, max_chunk_size)
            return
        rows = [_Row(*numbers) for numbers in loads.tolist()]
        for row in rows:
            _check_room(row.size, row.capacity, handles[row.file])
        self._read(
            [RawRange(handles[row.file].shard, row.offset, row.size, row.address, row.device_name) for row in rows]
        )
        for row in rows:
            if row.flags & _BF16_TO_FP16:
                _convert(row)

    def _read(self, ranges: Sequence[RawRange]) -> None:
        wanted = [one for one in ranges if one.length]
        if wanted:
            read_raw(wanted, self._options, self._loads)


def _device_name(tensor: Any) -> str:
    return f"cuda:{tensor.device.index or 0}" if tensor.device.type == "cuda" else "cpu"


def _check_room(size: int, capacity: int, handle: Handle) -> None:
    if size > capacity:
        raise FormatError(
            f"{printable(str(handle.shard.path), 400)}: {size:,} bytes for a destination of {capacity:,}",
            hint="the file's header is damaged: fetch it again",
            path=handle.shard.path,
        )


def _convert(row: _Row) -> None:
    """Make bfloat16 numbers float16 where they lie, rounding to nearest."""
    torch = importlib.import_module("torch")
    step = _CONVERTED_BYTES
    for start in range(0, row.size, step):
        length = min(step, row.size - start)
        memory = memory_at(row.address + start, length, row.device_name)
        memory.view(torch.float16).copy_(memory.view(torch.bfloat16).to(torch.float16))


def memory_at(address: int, nbytes: int, device: str) -> Any:
    """A tensor of bytes over memory that belongs to somebody else, valid as long as that memory is."""
    torch = importlib.import_module("torch")
    if device == "cpu":
        return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)
    return torch.as_tensor(_ArrayInterface(address, nbytes), device=device)


class _ArrayInterface:
    """How torch is told of memory on a CUDA or ROCm device."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def install(*, allow_untested: bool = False, **keywords: Unpack[LoadKeywords]) -> Installed:
    """Have ExLlamaV3 load through weightlift from now on.

    Args:
        allow_untested: go on with any version of ExLlamaV3.
        **keywords: how to load, as for :class:`~weightlift.options.LoadOptions`.

    Returns:
        What was replaced; ``undo`` takes it back.

    Raises:
        UnsupportedError: ExLlamaV3 is of a version that this was not tried with.
        MissingExtraError: it is not installed.
        OptionError: an option is not possible.
    """
    require_known(PACKAGE, KNOWN_VERSIONS, allow_untested=allow_untested)
    try:
        loader = importlib.import_module("exllamav3.loader.safetensors")
    except ImportError as err:
        raise missing(PACKAGE, PACKAGE) from err
    installed = Installed()
    installed.replacements.set(loader, "ext", Extension(loader.ext, keywords, installed))
    return installed
