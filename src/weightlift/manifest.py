"""Manifests: what the files and tensors of a checkpoint hashed to when they were known to be good.

Owns the JSON form (schema 1) and the comparison with what is there now; knows nothing of reading tensors. File names in
a manifest are keys that are compared and never opened, and yet none may lead out of the checkpoint's folder: other
programs will take them for paths.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from weightlift._version import __version__
from weightlift.errors import IntegrityError, ManifestError, printable
from weightlift.formats.files import open_file, shown_path
from weightlift.formats.index_file import reason_to_refuse
from weightlift.writing import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weightlift.description import Description

MANIFEST_NAME: Final = "weightlift-manifest.json"
"""The manifest's file name in the folder of a checkpoint."""

MANIFEST_BYTES_MAX: Final = 512 << 20

_DAMAGED: Final = "the manifest is damaged, or no manifest: make it again with `weightlift manifest`"
_NAMES_SHOWN: Final = 3

_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Xxh3 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class FileEntry(msgspec.Struct, frozen=True, gc=False):
    """What one file was.

    Attributes:
        bytes: its length.
        sha256: of its contents, in hexadecimal.
    """

    bytes: _Count
    sha256: _Sha256


class TensorEntry(msgspec.Struct, frozen=True, gc=False):
    """What one tensor was.

    Attributes:
        file: the name of the file that held it, as in ``files``.
        dtype: its data type as stored.
        shape: its shape.
        bytes: how many bytes it took.
        xxh3_128: of these bytes, in hexadecimal.
    """

    file: str
    dtype: str
    shape: tuple[_Count, ...]
    bytes: _Count
    xxh3_128: _Xxh3


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The digests of a checkpoint.

    Attributes:
        files: by name relative to the checkpoint's folder, with ``/`` between parts.
        tensors: by name.
        schema: 1, the form that is described here.
        made_by: the program that wrote it.
    """

    schema: int = 1
    made_by: str = f"weightlift {__version__}"
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    def to_bytes(self) -> bytes:
        """The manifest as JSON text, with a line for each file and tensor."""
        encode = msgspec.json.encode
        parts = [b'{"schema": %d, "made_by": %b' % (self.schema, encode(self.made_by))]
        for title, entries in (("files", self.files), ("tensors", self.tensors)):
            lines = b",\n".join(b"  %b: %b" % (encode(name), encode(entry)) for name, entry in entries.items())
            parts.append(b' "%b": {\n%b\n }' % (title.encode(), lines))
        return b",\n".join(parts) + b"}\n"


class _Schema(msgspec.Struct):
    schema: int


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest.

    Raises:
        ManifestError: it is none, is damaged, or names a path that leads out of the checkpoint's folder.
        CheckpointNotFoundError: nothing is at the path.
        AccessError: it may not be read.
    """
    place = Path(path)
    with open_file(place) as file:
        size = file.identity.size_bytes
        if size > MANIFEST_BYTES_MAX:
            raise _refusal(place, f"{size:,} bytes, above the limit of {MANIFEST_BYTES_MAX:,} for a manifest")
        text = file.read(0, size)
    try:
        schema = msgspec.json.decode(text, type=_Schema).schema
        if schema != 1:
            raise ManifestError(
                f"{shown_path(place)}: a manifest of schema {schema}, of which only 1 is known here",
                hint="use the version of weightlift that wrote it, or make it again",
                path=place,
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
        raise _refusal(place, f"not a manifest: {printable(str(err))}") from err
    _check_names(place, manifest)
    return manifest


def _refusal(path: Path, message: str) -> ManifestError:
    return ManifestError(f"{shown_path(path)}: {message}", hint=_DAMAGED, path=path)


def _check_names(path: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if reason := reason_to_refuse(name):
            raise ManifestError(
                f"{shown_path(path)}: names the file '{printable(name)}', {reason}",
                hint="a manifest may only name files beside it: do not trust this download",
                path=path,
            )
    for name, entry in manifest.tensors.items():
        if entry.file not in manifest.files:
            raise _refusal(
                path, f"tensor '{printable(name)}' is in '{printable(entry.file)}', a file that it does not list"
            )


def as_manifest(given: Manifest | str | os.PathLike[str]) -> Manifest:
    """A manifest given as such or by its path.

    Raises:
        ManifestError: see :func:`read_manifest`.
    """
    return given if isinstance(given, Manifest) else read_manifest(given)


def file_names(description: Description) -> list[str]:
    """How a manifest calls each shard: its path below the folder that holds them all."""
    parents = [str(shard.path.absolute().parent) for shard in description.shards]
    root = os.path.commonpath(parents) if parents else ""
    return [shard.path.absolute().relative_to(root).as_posix() for shard in description.shards]


def manifest_path(path: Path, description: Description) -> Path:
    """Where the manifest of a checkpoint is kept, unless another place is named.

    Args:
        path: the checkpoint as it was named.
        description: the checkpoint.
    """
    if path.is_file() and len(description.shards) == 1 and path.suffix != ".json":
        return path.with_name(f"{path.name}.manifest.json")
    return Path(os.path.commonpath([shard.path.absolute().parent for shard in description.shards])) / MANIFEST_NAME


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest; it appears whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    with whole_file(path, binary=True) as file:
        file.write(manifest.to_bytes())


def described_differences(description: Description, rows: Sequence[int], manifest: Manifest) -> dict[str, str]:
    """What is wrong with each tensor that the manifest knows differently or not at all, before any of it is read."""
    names = file_names(description)
    found = {}
    for row in rows:
        name = description.names[row]
        entry = manifest.tensors.get(name)
        if entry is None:
            found[name] = "is not in the manifest"
            continue
        now = (description.dtype(row).name, list(description.shape(row)), names[description.shard_indexes[row]])
        then = (entry.dtype, list(entry.shape), entry.file)
        for what, new, old in zip(("data type", "shape", "file"), now, then, strict=True):
            if new != old:
                found[name] = f"has {what} {printable(str(new))}, and {printable(str(old))} in the manifest"
                break
    return found


def missing_tensors(description: Description, manifest: Manifest) -> list[str]:
    """Tensors of the manifest that the checkpoint does not have."""
    return sorted(name for name in manifest.tensors if name not in description)


def digest_differences(digests: Mapping[str, str], manifest: Manifest) -> dict[str, str]:
    """What is wrong with each tensor whose bytes are not those of the manifest.

    Args:
        digests: xxh3-128 by name, of tensors that the manifest has.
        manifest: what they should be.
    """
    return {
        name: f"has other bytes: their digest is {digest}, and {manifest.tensors[name].xxh3_128} in the manifest"
        for name, digest in digests.items()
        if digest != manifest.tensors[name].xxh3_128
    }


def refuse(description: Description, differences: Mapping[str, str]) -> None:
    """Raise for the first of some differences, if there is one.

    Raises:
        IntegrityError: names the tensor, its file, and how many more there are.
    """
    for name, problem in differences.items():
        row = description.row(name) if name in description else None
        path = None if row is None else description.shards[description.shard_indexes[row]].path
        where = "the checkpoint" if path is None else shown_path(path)
        error = IntegrityError(
            f"{where}: tensor '{printable(name)}' {problem}{_more(list(differences)[1:])}",
            hint="the file was changed or damaged since the manifest was made: `weightlift verify` lists everything; "
            "fetch it again from where you trust it",
            path=path,
            tensor=name,
        )
        error.tensors = tuple(differences)
        raise error


def _more(names: Iterable[str]) -> str:
    rest = list(names)
    if not rest:
        return ""
    shown = ", ".join(f"'{printable(name)}'" for name in rest[:_NAMES_SHOWN])
    return f"; so with {len(rest)} more: {shown}{', …' if len(rest) > _NAMES_SHOWN else ''}"
