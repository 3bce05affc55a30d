"""The index of a sharded checkpoint: which shard holds which tensor.

Owns the rules for ``*.index.json``. What it names is judged by name here, before any of it is opened: an index comes
with the download and must not lead a loader out of its folder. Whether a shard really holds what the index says is
judged by whoever has read the shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from msgspec import Struct

from weightlift.errors import CheckpointNotFoundError, IndexFileError, printable
from weightlift.formats.files import file_status, open_file, recognise_other_kind, shown_path

SUFFIX: Final = ".index.json"
INDEX_BYTES_MAX: Final = 256 << 20

_DAMAGED: Final = "the index is damaged or was written by a faulty tool: fetch it again"


class IndexFile(Struct, frozen=True):
    """An index that was read and whose shard names were judged.

    Attributes:
        path: the index file as it was named.
        shard_of: name of the shard per tensor name, as the index writes it.
        paths: path of the shard per such name.
    """

    path: Path
    shard_of: Mapping[str, str]
    paths: Mapping[str, Path]

    @property
    def shards(self) -> list[Path]:
        """The shards' paths, each once, sorted by name."""
        return sorted(set(self.paths.values()))

    def require_shards(self) -> None:
        """Check that every shard is there.

        Raises:
            IndexFileError: a shard is missing.
        """
        shards = self.shards
        missing = []
        for shard in shards:
            try:
                file_status(shard)
            except CheckpointNotFoundError as err:
                missing.append((shard, err))
        if not missing:
            return
        shard, cause = missing[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise IndexFileError(
            f"{shown_path(self.path)}: its shard {printable(shard.name)}{more} is missing; "
            f"{len(shards) - len(missing)} of {len(shards)} shards are there (incomplete download?)",
            hint="resume the download, or copy the missing files beside the index",
            path=self.path,
        ) from cause


def read_index(path: Path) -> IndexFile:
    """Read an index file.

    Raises:
        IndexFileError: it is no index, or names a path outside its folder.
        CheckpointNotFoundError: nothing is at the path.
        AccessError: the user may not read it.
        NotACheckpointError: it is a folder, pipe, device, git-lfs pointer or web page.
        ReadError: the operating system failed the read.
    """
    with open_file(path) as file:
        size = file.identity.size_bytes
        if not file.head.lstrip().startswith(b"{") and (other := recognise_other_kind(path, file.head)):
            raise other
        if size > INDEX_BYTES_MAX:
            raise IndexFileError(
                f"{shown_path(path)}: {size:,} bytes, above the limit of {INDEX_BYTES_MAX:,} for an index",
                hint="name a weight file or the folder",
                path=path,
            )
        shard_of = _decode(path, file.read(0, size))
    # Swapped, a dictionary keeps one tensor per shard: each name is judged once, and there is a tensor to blame.
    for shard, tensor in {shard: tensor for tensor, shard in shard_of.items()}.items():
        _require_inside(path, tensor, shard)
    return IndexFile(path, shard_of, {shard: path.parent / shard for shard in set(shard_of.values())})


def _decode(path: Path, text: bytes) -> dict[str, str]:
    import msgspec

    try:
        content = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        if "weight_map" not in content:
            raise IndexFileError(f"{shown_path(path)}: not an index: it has no weight_map", hint=_DAMAGED, path=path)
        shard_of = msgspec.json.decode(content["weight_map"], type=dict[str, str])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
        raise IndexFileError(
            f"{shown_path(path)}: not an index: {printable(str(err))}", hint=_DAMAGED, path=path
        ) from err
    if not shard_of:
        raise IndexFileError(f"{shown_path(path)}: the index lists no tensor", hint=_DAMAGED, path=path)
    return shard_of


def _require_inside(path: Path, tensor: str, shard: str) -> None:
    if reason := reason_to_refuse(shard):
        raise IndexFileError(
            f"{shown_path(path)}: tensor '{printable(tensor)}' is said to be in '{printable(shard)}', {reason}",
            hint="an index may only name files beside it: do not trust this download",
            path=path,
            tensor=tensor,
        )


def reason_to_refuse(name: str) -> str:
    """Why a file name out of a downloaded file must not be followed, or nothing if it may be."""
    windows = PureWindowsPath(name)
    if not name:
        return "an empty name"
    if "\0" in name:
        return "a name with a NUL character"
    if "\\" in name:
        return "a name with a backslash"
    if name.startswith("/") or windows.drive or windows.root:
        return "an absolute path"
    if ".." in PurePosixPath(name).parts:
        return "a path that leads out of its folder"
    return "" if PurePosixPath(name).parts else "a folder"
