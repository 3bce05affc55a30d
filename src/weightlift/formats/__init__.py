"""From a path to a checkpoint's description: which format, which files, which tensors.

Owns the choice of format and the joining of shards. A format is one entry of ``_FORMATS`` and one module that reads a
header; nothing else here knows a format. Reads headers only, holds no file open afterwards, needs no framework.
"""

from __future__ import annotations

import functools
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from weightlift.dtypes import DType
from weightlift.errors import FormatError, IndexFileError, printable
from weightlift.formats import safetensors
from weightlift.formats.columns import ShardContents, join
from weightlift.formats.files import OpenFile, file_status, is_gguf, is_zip, open_file, shown_path
from weightlift.formats.folder import find_checkpoint
from weightlift.formats.index_file import IndexFile, read_index
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    import os

    from weightlift.description import Description


class _Format(Struct, frozen=True):
    """One file format.

    Attributes:
        name: what the format is called.
        dtypes: the data types that its columns refer to.
        read_shard: reads and judges the header of an open file.
        other_parts: which files belong to a checkpoint of which one part was read; ``None`` where files do not tell.
        check_parts: whether files are the parts of one checkpoint, in order.
    """

    name: str
    dtypes: Sequence[DType]
    read_shard: Callable[[OpenFile, HeaderRules], ShardContents]
    other_parts: Callable[[Path, ShardContents], list[Path]] | None = None
    check_parts: Callable[[Sequence[ShardContents]], None] | None = None


@functools.cache
def _gguf() -> _Format:
    from weightlift.formats import gguf

    return _Format("GGUF", gguf.DTYPES, gguf.read_shard, gguf.other_parts, gguf.check_parts)


@functools.cache
def _pytorch() -> _Format:
    from weightlift.formats import pytorch

    return _Format("PyTorch", pytorch.DTYPES, pytorch.read_shard)


@functools.cache
def _safetensors() -> _Format:
    return _Format("safetensors", safetensors.DTYPES, safetensors.read_shard)


# The first that claims a file by its first bytes reads it, and no other is imported. Safetensors files begin with a
# length and have no magic, so that entry is last.
_FORMATS: Final[tuple[tuple[Callable[[bytes], bool], Callable[[], _Format]], ...]] = (
    (is_gguf, _gguf),
    (is_zip, _pytorch),
    (lambda _: True, _safetensors),
)


def describe(path: str | os.PathLike[str], *, header: HeaderRules = HeaderRules.REFERENCE) -> Description:
    """Read the headers of the checkpoint at a path.

    Args:
        path: a weight file, safetensors, GGUF or PyTorch, whatever its name; a folder with an index, or with shards and
            no index; an index file; or a model's entry in the Hugging Face cache. Links are followed.
        header: how headers are judged.

    Returns:
        Every tensor of every shard, also those an index does not list, as the usual loaders read them. A tensor that
        several shards hold is taken from the shard that the index names.

    Raises:
        CheckpointNotFoundError: there is nothing, or no checkpoint, at the path.
        AccessError: a file or folder may not be read.
        NotACheckpointError: the file is something else.
        IndexFileError: a shard is missing, or an index names a path it must not name; or it and the shards
            disagree; or two shards without an index hold a tensor of the same name; or a folder holds several
            checkpoints.
        HeaderError: a header breaks a rule.
        TruncatedFileError: a file is shorter than its header says.
        UnsupportedDtypeError: a tensor has an unknown data type.
        ReadError: the operating system failed a read.
    """
    path = Path(path)
    found: IndexFile | list[Path]
    note = ""
    if stat.S_ISDIR(file_status(path).st_mode):
        found, note = find_checkpoint(path)
    elif path.suffix == ".json":
        found = read_index(path)
    else:
        found = [path]
    notes = [note] if note else []
    if isinstance(found, IndexFile):
        found.require_shards()
        described = [_read(shard, header) for shard in found.shards]
        _require_listed(found, described)
        contents, known = _one_format(described)
        return join(_without_repeats(found, contents), known.dtypes, file_format=known.name, notes=notes)
    described = [_read(shard, header) for shard in found]
    if len(described) == 1:
        described = _with_other_parts(found[0], described[0], header)
    contents, known = _one_format(described)
    _refuse_repeats(contents)
    return join(contents, known.dtypes, file_format=known.name, notes=notes)


def _read(path: Path, rules: HeaderRules) -> tuple[_Format, ShardContents]:
    with open_file(path) as file:
        reader = next(known() for claims, known in _FORMATS if claims(file.head))
        contents = reader.read_shard(file, rules)
        return reader, replace(contents, shard=replace(contents.shard, brought_in=tuple(file.brought_in)))


def _with_other_parts(
    path: Path, first: tuple[_Format, ShardContents], rules: HeaderRules
) -> list[tuple[_Format, ShardContents]]:
    """All parts of the checkpoint of which one was named, where its format has parts that know of each other."""
    known, contents = first
    paths = known.other_parts(path, contents) if known.other_parts else [path]
    if known.check_parts is None or len(paths) == 1:
        return [first]
    _require_parts(paths)
    described = [first if part == path else _read(part, rules) for part in paths]
    known.check_parts(_one_format(described)[0])
    return described


def _require_parts(paths: Sequence[Path]) -> None:
    missing = [path for path in paths if not path.exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise IndexFileError(
            f"{shown_path(missing[0])}: this part{more} is missing; {len(paths) - len(missing)} of {len(paths)} parts "
            f"are there (incomplete download?)",
            hint="resume the download, or put the missing files beside the others",
            path=missing[0],
        )


def _one_format(described: Sequence[tuple[_Format, ShardContents]]) -> tuple[list[ShardContents], _Format]:
    first, contents = described[0]
    for other, shard in described:
        if other is not first:
            raise FormatError(
                f"{shown_path(shard.shard.path)}: a {other.name} file beside {contents.shard.path.name}, "
                f"which is {first.name}",
                hint="name the one file to read",
                path=shard.shard.path,
            )
    return [shard for _, shard in described], first


def _require_listed(index: IndexFile, described: Sequence[tuple[_Format, ShardContents]]) -> None:
    """Check that every tensor is in the shard in which the index lists it."""
    held = {shard.shard.path: set(shard.columns.names) for _, shard in described}
    for tensor, shard_name in index.shard_of.items():
        names = held[index.paths[shard_name]]
        if tensor not in names:
            raise IndexFileError(
                f"{shown_path(index.path)}: says that tensor '{printable(tensor)}' is in {printable(shard_name)}, "
                f"which holds {len(names):,} tensors and not this one",
                hint="index and shards are of different versions of the model: fetch all of them again",
                path=index.path,
                tensor=tensor,
            )


def _without_repeats(index: IndexFile, contents: Sequence[ShardContents]) -> list[ShardContents]:
    """Drop the copies of tensors from shards other than the one that the index names."""
    kept: list[ShardContents] = []
    for item in contents:
        columns = item.columns
        here = {None, *(name for name, path in index.paths.items() if path == item.shard.path)}
        rows = [row for row, name in enumerate(columns.names) if index.shard_of.get(name) in here]
        kept.append(item if len(rows) == len(columns) else ShardContents(item.shard, columns.select(rows)))
    _refuse_repeats(kept)
    return kept


def _refuse_repeats(contents: Sequence[ShardContents]) -> None:
    if len(contents) == 1:
        return
    holder: dict[str, Path] = {}
    for item in contents:
        path = item.shard.path
        for name in item.columns.names:
            if (other := holder.setdefault(name, path)) is not path:
                raise IndexFileError(
                    f"{shown_path(path)}: holds tensor '{printable(name)}', and so does {printable(other.name)}",
                    hint="these files are not shards of one checkpoint: name the one to read, or add an index",
                    path=path,
                    tensor=name,
                )
