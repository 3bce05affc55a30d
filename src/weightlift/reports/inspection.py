"""What a checkpoint holds, summed up: totals, per data type, per file, and the tensors asked for.

Owns the numbers and their JSON; laying them out is another module's work. Goes over columns once, because a checkpoint
may have hundreds of thousands of tensors.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlift.formats.gguf_values import GGUFMetadata
from weightlift.reports.model_summary import summarise_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightlift.api import Checkpoint
    from weightlift.description import Description, TensorInfo
    from weightlift.reports.model_summary import ModelSummary


class SortKey(enum.StrEnum):
    """The order in which tensors are listed: by name, largest first, or by place in the files."""

    NAME = "name"
    SIZE = "size"
    FILE = "file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of the selected tensors that has something in common.

    Attributes:
        name: the data type or the file.
        tensors: how many tensors.
        parameters: their elements.
        nbytes: their bytes as stored.
    """

    name: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        path: the checkpoint, as the user named it.
        tensors_total: tensors in the checkpoint.
        tensors: tensors selected.
        parameters: elements of the tensors selected.
        nbytes: their bytes as stored.
        dtypes: by data type, largest first.
        files: by file, in the checkpoint's order; only files with selected tensors.
        file_bytes: sizes of those files as a whole, by name.
        metadata: free-form text entries of all files.
        description_bytes: memory that the description takes.
        listed: the tensors to show, in the order asked for.
        listing: tensors were asked for at all.
        file_format: the name of the files' format.
        model: what the checkpoint is as a whole, whatever was selected; ``None`` where nobody asked.
        notes: what was chosen when the checkpoint was found.
    """

    path: str
    tensors_total: int
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[Share, ...]
    files: tuple[Share, ...]
    file_bytes: Mapping[str, int]
    metadata: Mapping[str, Any]
    description_bytes: int
    listed: tuple[TensorInfo, ...]
    listing: bool = True
    file_format: str = "safetensors"
    model: ModelSummary | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The one JSON object that ``weightlift inspect --json`` prints; ``list`` is null where it was not wanted."""
        return {
            "schema": 1,
            "path": self.path,
            "format": self.file_format,
            "notes": list(self.notes),
            "model": self.model.to_json() if self.model else None,
            "tensors_total": self.tensors_total,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": [
                {"dtype": part.name, "tensors": part.tensors, "parameters": part.parameters, "bytes": part.nbytes}
                for part in self.dtypes
            ],
            "files": [
                {
                    "path": part.name,
                    "tensors": part.tensors,
                    "parameters": part.parameters,
                    "bytes": part.nbytes,
                    "file_bytes": self.file_bytes[part.name],
                }
                for part in self.files
            ],
            "metadata": {key: _plain(value) for key, value in self.metadata.items()},
            "description_bytes": self.description_bytes,
            "list": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype.name,
                    "shape": tensor.shape,
                    "bytes": tensor.nbytes,
                    "file": str(tensor.path),
                    "offset": tensor.offset,
                    **({"strides": tensor.strides} if tensor.strides else {}),
                }
                for tensor in self.listed
            ]
            if self.listing
            else None,
        }


def inspect_checkpoint(
    checkpoint: Checkpoint,
    rows: Sequence[int],
    *,
    path: str,
    sort: SortKey = SortKey.FILE,
    list_tensors: bool = True,
    limit: int | None = None,
) -> Inspection:
    """Sum up some tensors of a checkpoint.

    Args:
        checkpoint: the opened checkpoint.
        rows: the rows selected, in file order.
        path: the checkpoint, as the user named it.
        sort: the order of the list.
        list_tensors: make a list at all.
        limit: most entries of the list; ``None`` for all.
    """
    description = checkpoint.description
    by_dtype = [[0, 0, 0] for _ in description.dtypes]
    by_file = [[0, 0, 0] for _ in description.shards]
    for row in rows:
        count, size = math.prod(description.shape(row)), description.lengths[row]
        for sums in (by_dtype[description.dtype_codes[row]], by_file[description.shard_indexes[row]]):
            sums[0] += 1
            sums[1] += count
            sums[2] += size
    dtypes = _shares([dtype.name for dtype in description.dtypes], by_dtype)
    listed = _sorted(description, rows, sort)[:limit] if list_tensors else ()
    return Inspection(
        path=path,
        tensors_total=len(description),
        tensors=len(rows),
        parameters=sum(part.parameters for part in dtypes),
        nbytes=sum(part.nbytes for part in dtypes),
        dtypes=tuple(sorted(dtypes, key=lambda part: -part.nbytes)),
        files=_shares([str(shard.path) for shard in description.shards], by_file),
        file_bytes={str(shard.path): shard.identity.size_bytes for shard in description.shards},
        metadata=_metadata(checkpoint),
        description_bytes=description.nbytes,
        listed=tuple(map(description.tensor, listed)),
        listing=list_tensors,
        file_format=description.file_format,
        model=summarise_model(description),
        notes=checkpoint.notes,
    )


def _metadata(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The metadata, with a summary in place of every array that is still in a file."""
    found: dict[str, Any] = {}
    for shard in checkpoint.description.shards:
        for key in shard.metadata:
            if key not in found:
                stored = shard.metadata.stored(key) if isinstance(shard.metadata, GGUFMetadata) else None
                found[key] = str(stored) if stored else shard.metadata[key]
    return found


def _plain(value: Any) -> Any:
    """A metadata value as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, bool, int, float, type(None))) else str(value)


def _shares(names: Sequence[str], sums: Sequence[Sequence[int]]) -> tuple[Share, ...]:
    return tuple(
        Share(name=name, tensors=tensors, parameters=parameters, nbytes=nbytes)
        for name, (tensors, parameters, nbytes) in zip(names, sums, strict=True)
        if tensors
    )


def _sorted(description: Description, rows: Sequence[int], sort: SortKey) -> Sequence[int]:
    if sort is SortKey.NAME:
        return sorted(rows, key=description.names.__getitem__)
    if sort is SortKey.SIZE:
        lengths = description.lengths
        return sorted(rows, key=lambda row: -lengths[row])
    return rows
