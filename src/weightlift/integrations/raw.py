"""Reading byte ranges of files to raw addresses, for frameworks that allocate themselves and name pointers.

A range becomes a row of a description of unsigned bytes and an address becomes something that looks enough like a
tensor to be filled in place, so that a load with its budget, its report and its errors does the rest.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightlift.description import Description, FileIdentity, Shard
from weightlift.errors import FormatError
from weightlift.formats.files import access_failure, shown_path
from weightlift.formats.safetensors import DTYPES
from weightlift.targets.access import gpu_access
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.module import ModuleTarget
from weightlift.types import Framework

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.options import LoadOptions
    from weightlift.standing import PartLoads
    from weightlift.targets.device import DeviceAccess

_BYTES = next(code for code, dtype in enumerate(DTYPES) if dtype.name == "U8")


class RawRange(NamedTuple):
    """Bytes of a file, and where they go.

    Attributes:
        shard: the file.
        offset: first byte in it.
        length: bytes.
        address: of the first byte of the destination.
        device: its device, such as ``cuda:0``; ``cpu`` for host memory.
    """

    shard: Shard
    offset: int
    length: int
    address: int
    device: str


class _Device(NamedTuple):
    name: str

    @property
    def type(self) -> str:
        return self.name.partition(":")[0]

    def __str__(self) -> str:
        return self.name


class _Memory:
    """An address that poses as a contiguous tensor of bytes."""

    def __init__(self, one: RawRange, dtype: Any) -> None:
        self.shape = (one.length,)
        self.device = _Device(one.device)
        self.dtype = dtype
        self._address = one.address

    def data_ptr(self) -> int:
        return self._address

    @staticmethod
    def is_contiguous() -> bool:
        return True


def open_raw(path: str) -> Shard:
    """Look at a file that ranges will be read from; it is compared with what it is then when it is read.

    Raises:
        WeightliftError: it is not there, or not to be had.
    """
    try:
        status = os.stat(path)
    except OSError as err:
        raise access_failure(Path(path), err) from err
    identity = FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return Shard(Path(path), identity, 0, {})


def read_raw(ranges: Sequence[RawRange], options: LoadOptions, loads: PartLoads) -> None:
    """Fill memory with ranges of files; done when it returns.

    Args:
        ranges: what goes where, in any order.
        options: how.
        loads: what this is a part of.

    Raises:
        FormatError: a range reaches behind the end of its file.
        WeightliftError: see :mod:`weightlift.errors`; the destinations are partly overwritten.
    """
    description, ordered = describe_ranges(_checked(ranges))
    maker = pick_framework(Framework.TORCH)
    accesses, reason = _accesses(dict.fromkeys(one.device for one in ordered))
    kind = maker.stored_dtype(DTYPES[_BYTES])
    memory = {name: _Memory(one, kind) for name, one in zip(description.names, ordered, strict=True)}
    rows = range(len(ordered))
    target = ModuleTarget(description, rows, maker, memory, accesses)
    loads.fill(description, rows, options, target, accesses, staging_reason=reason)


def describe_ranges(ranges: Sequence[RawRange]) -> tuple[Description, Sequence[RawRange]]:
    """Ranges as tensors of bytes, and the ranges in the order of their rows."""
    shards = list({id(one.shard): one.shard for one in ranges}.values())
    number = {id(shard): index for index, shard in enumerate(shards)}
    ordered = sorted(ranges, key=lambda one: (number[id(one.shard)], one.offset))
    names = [f"{one.shard.path.name}, bytes {one.offset:,} and on ({index})" for index, one in enumerate(ordered)]
    description = Description(
        shards=shards,
        dtypes=DTYPES,
        names=names,
        dtype_codes=array("B", bytes([_BYTES]) * len(ordered)),
        shard_indexes=array("I", (number[id(one.shard)] for one in ordered)),
        offsets=array("Q", (one.offset for one in ordered)),
        lengths=array("Q", (one.length for one in ordered)),
        dims=array("Q", (one.length for one in ordered)),
        dim_ends=array("I", range(1, len(ordered) + 1)),
    )
    return description, ordered


def _checked(ranges: Sequence[RawRange]) -> Sequence[RawRange]:
    for one in ranges:
        if one.offset < 0 or one.length < 0 or one.offset + one.length > one.shard.identity.size_bytes:
            raise FormatError(
                f"{shown_path(one.shard.path)}: {one.length:,} bytes at {one.offset:,} were asked for, and the file "
                f"has {one.shard.identity.size_bytes:,}",
                hint="the file is incomplete, or its header is damaged: fetch it again",
                path=one.shard.path,
                offset=one.offset,
                length=one.length,
            )
    return ranges


def _accesses(devices: dict[str, None]) -> tuple[list[DeviceAccess], str]:
    found = [gpu_access(name, pick_framework(Framework.TORCH)) for name in devices if name != "cpu"]
    reasons = [access for access in found if isinstance(access, str)]
    return [access for access in found if not isinstance(access, str)], reasons[0] if reasons else ""
