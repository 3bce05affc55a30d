"""Turning what an engine reports into the error a person reads: file, tensor, offset, numbers, cause, hint."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NoReturn

from weightlift.errors import DeviceError, EngineError, InsufficientMemoryError, ReadError, WeightliftError, printable
from weightlift.operations import STAGE_WORDS, FailureKind, Stage
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weightlift.description import Description
    from weightlift.operations import Engine, Extent, Failure
    from weightlift.shards import OpenShards
    from weightlift.targets.device import DeviceAccess

_HINTS = {
    errno.EIO: "the drive reported an error: look at dmesg and its health (smartctl), then fetch the file again",
    errno.ESTALE: "the file was removed on the server that shares it: mount it again",
    errno.ETIMEDOUT: "the server that shares the file did not answer: check the network",
    errno.ENOMEM: "the machine is out of memory: close programs, or set a smaller host_memory",
    errno.EACCES: "the file system refuses the read: check permissions and mount options",
}


def raise_failure(
    failure: Failure,
    extent: Extent,
    description: Description,
    shards: OpenShards,
    accesses: Sequence[DeviceAccess] = (),
) -> NoReturn:
    """Raise the typed error for an engine's failure.

    Args:
        failure: what the engine told.
        extent: the extent it happened in.
        description: the checkpoint.
        shards: its open shards.
        accesses: the GPUs of the load.
    """
    shard = description.shards[extent.shard]
    tensor = description.tensor_at(extent.shard, max(failure.offset, extent.offset))
    if failure.kind is FailureKind.END_OF_FILE:
        raise shards.describe_end_of_file(extent.shard, failure.offset, tensor)
    if failure.kind is FailureKind.MEMORY:
        raise InsufficientMemoryError(
            f"{shard.path}: no memory for {format_bytes(failure.length)} more of the tensors "
            f"({os.strerror(failure.error_number)}), at {_named(tensor)}",
            hint='close other programs, load fewer tensors (names=…), use method="mmap", or add swap',
            path=shard.path,
            tensor=tensor,
        )
    if failure.kind is FailureKind.INTERNAL:
        raise EngineError(
            f"{shard.path}: a worker failed at byte {failure.offset:,}, in {_named(tensor)}: {failure.cause!r}",
            hint="this is a defect: please report it with the traceback",
            path=shard.path,
            tensor=tensor,
            offset=failure.offset,
        ) from failure.cause
    if failure.kind is FailureKind.DEVICE:
        raise _device_error(failure, accesses[extent.device], shard.path, tensor)
    error: WeightliftError = ReadError(
        f"{shard.path}: reading {failure.length:,} bytes at byte {failure.offset:,} failed, in {_named(tensor)}: "
        f"{os.strerror(failure.error_number)} ({errno.errorcode.get(failure.error_number, 'errno')} "
        f"{failure.error_number})",
        hint=_HINTS.get(failure.error_number, 'check the storage; method="buffered" asks least of it'),
        path=shard.path,
        tensor=tensor,
        offset=failure.offset,
        length=failure.length,
    )
    if isinstance(error, ReadError):
        error.errno = failure.error_number
    raise error


_abandoned: list[object] = []
"""What reads that never returned may still write to; kept for the life of the process."""


def abandon(engine: Engine, stuck: int, cause: BaseException, description: Description, held: object) -> None:
    """Keep alive what workers that do not return may still touch, and name in a note to ``cause`` what they are at."""
    named = "; ".join(
        f"{STAGE_WORDS[doing.stage]} {description.shards[doing.shard].path} at byte {doing.offset:,} "
        f"({format_bytes(doing.length)}, for {doing.seconds:.1f} s)"
        for doing in engine.activity()
    )
    cause.add_note(f"{stuck} workers have not returned and keep their buffers: {named}")
    _abandoned.append(held)


_DEVICE_STAGES = {Stage.DEVICE_COPY: "starting a copy to", Stage.DEVICE_WAIT: "waiting for a copy to"}


def _device_error(failure: Failure, access: DeviceAccess, path: Path, tensor: str | None) -> DeviceError:
    doing = f"{_DEVICE_STAGES.get(failure.stage, 'using')} {access.device}"
    try:
        access.runtime.check(failure.error_number, doing)
    except DeviceError as err:
        return DeviceError(
            f"{path}: {err.message}, at byte {failure.offset:,}, in {_named(tensor)}",
            hint=err.hint,
            path=path,
            tensor=tensor,
            offset=failure.offset,
            length=failure.length,
            code=err.code,
            name=err.name,
            call=err.call,
        )
    raise AssertionError("a device failure without an error code")


def _named(tensor: str | None) -> str:
    return f"tensor {printable(tensor)}" if tensor else "the space between tensors"
