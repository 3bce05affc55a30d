"""Finding the checkpoint in a folder: an index, shards without one, or a Hugging Face cache entry.

Owns which file names mean what, and which kind of weights is taken where a folder holds several: safetensors, else
GGUF, else PyTorch. Opens no weight file and follows links as the file system does; shard paths are kept as they are
named, so that messages show what the user knows.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

from weightlift.errors import CheckpointNotFoundError, IndexFileError, printable
from weightlift.formats.files import access_failure, shown_path
from weightlift.formats.index_file import SUFFIX, IndexFile, read_index

MAIN_INDEX: Final = "model.safetensors.index.json"
MAIN_PYTORCH_INDEX: Final = "pytorch_model.bin.index.json"

SPLIT_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
"""How the parts of a split GGUF checkpoint are called."""

_INDEX_SUFFIX: Final = f".safetensors{SUFFIX}"
_SHARD_SUFFIX: Final = ".safetensors"
_PYTORCH_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")
_PYTORCH_SHARD: Final = re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin")
_TRAINING_STATE: Final = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
"""What trainers put beside a model's weights."""

_CACHE_PREFIX: Final = "models--"
_REVISION_BYTES_MAX: Final = 1024
_OTHER_WEIGHTS: Final = {
    ".bin": "PyTorch",
    ".pt": "PyTorch",
    ".h5": "HDF5",
    ".msgpack": "Flax",
    ".npz": "NumPy",
    ".onnx": "ONNX",
    ".incomplete": "unfinished download",
}


class Found(NamedTuple):
    """The checkpoint in a folder.

    Attributes:
        checkpoint: its index, or its files sorted by name where there is none; one part of a split GGUF checkpoint
            stands for all.
        note: a sentence about what else is there and was not taken; may be empty.
    """

    checkpoint: IndexFile | list[Path]
    note: str


def find_checkpoint(folder: Path) -> Found:
    """The checkpoint in a folder.

    Raises:
        CheckpointNotFoundError: the folder holds no checkpoint.
        IndexFileError: several indexes or checkpoints are there and none has the usual name, or the index is wrong.
        AccessError: the user may not list the folder.
    """
    names = _listing(folder)
    if folder.name.startswith(_CACHE_PREFIX) and "snapshots" in names:
        folder = _snapshot(folder)
        names = _listing(folder)
    # Hidden files are what a shell's `*` leaves out too, such as the `._` companions that macOS makes on USB disks.
    visible = [name for name in names if not name.startswith(".")]
    kinds = {
        "safetensors": [name for name in visible if name.endswith((_SHARD_SUFFIX, _INDEX_SUFFIX))],
        "GGUF": [name for name in visible if name.lower().endswith(".gguf")],
        "PyTorch": [
            name
            for name in visible
            if name == MAIN_PYTORCH_INDEX or (name.endswith(_PYTORCH_SUFFIXES) and not _TRAINING_STATE.fullmatch(name))
        ],
    }
    finders = {"safetensors": _safetensors, "GGUF": _gguf, "PyTorch": _pytorch}
    present = [kind for kind, some in kinds.items() if some]
    if not present:
        raise _no_checkpoint(folder, names)
    taken, *others = present
    left = ", ".join(f"{len(kinds[kind])} of {kind}" for kind in others)
    note = f"the folder also holds weight files of another kind ({left}): {taken} was taken" if others else ""
    return Found(finders[taken](folder, kinds[taken]), note)


def _safetensors(folder: Path, found: list[str]) -> IndexFile | list[Path]:
    indexes = [name for name in found if name.endswith(_INDEX_SUFFIX)]
    if MAIN_INDEX in indexes:
        return read_index(folder / MAIN_INDEX)
    if len(indexes) == 1:
        return read_index(folder / indexes[0])
    if indexes:
        raise _several(folder, indexes, "indexes")
    return [folder / name for name in found]


def _gguf(folder: Path, found: list[str]) -> IndexFile | list[Path]:
    split = {name: SPLIT_NAME.fullmatch(name) for name in found}
    checkpoints = {(match["stem"], match["count"]) if match else (name, "") for name, match in split.items()}
    if len(checkpoints) > 1:
        raise _several(folder, found, "GGUF files that do not belong together")
    return [folder / found[0]]


def _pytorch(folder: Path, found: list[str]) -> IndexFile | list[Path]:
    if MAIN_PYTORCH_INDEX in found:
        return read_index(folder / MAIN_PYTORCH_INDEX)
    shards = [name for name in found if _PYTORCH_SHARD.fullmatch(name)]
    if "pytorch_model.bin" in found:
        return [folder / "pytorch_model.bin"]
    if len(found) > 1 and len(shards) != len(found):
        raise _several(folder, found, "PyTorch files")
    return [folder / name for name in found]


def _several(folder: Path, names: list[str], what: str) -> IndexFileError:
    return IndexFileError(
        f"{shown_path(folder)}: holds {len(names)} {what}: {_shown_names(names)}",
        hint=f"name the one to read, for example {shown_path(folder / names[0])}",
        path=folder,
    )


def _snapshot(entry: Path) -> Path:
    """The folder of the revision that a Hugging Face cache entry stands for."""
    snapshots = _listing(entry / "snapshots")
    main = entry / "refs" / "main"
    try:
        revision = main.read_bytes()[:_REVISION_BYTES_MAX].decode("utf-8", "replace").strip() if main.is_file() else ""
    except OSError as err:
        raise access_failure(main, err) from err
    if revision in snapshots:
        return entry / "snapshots" / revision
    if len(snapshots) == 1:
        return entry / "snapshots" / snapshots[0]
    if snapshots:
        message = f"a cache entry with {len(snapshots)} snapshots, none of which refs/main names"
        hint = f"name one of the folders in {shown_path(entry / 'snapshots')}: {_shown_names(snapshots)}"
    else:
        message, hint = "a cache entry without a snapshot", "download the model"
    raise CheckpointNotFoundError(f"{shown_path(entry)}: {message}", hint=hint, path=entry)


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as err:
        raise access_failure(folder, err) from err


def _no_checkpoint(folder: Path, names: list[str]) -> CheckpointNotFoundError:
    counts = Counter(Path(name).suffix.lower() for name in names)
    others = [f"{counts[suffix]} {suffix} ({kind})" for suffix, kind in _OTHER_WEIGHTS.items() if counts[suffix]]
    if others:
        hint = f"it holds files of another kind: {', '.join(others)}; convert them, or fetch the safetensors files"
    elif "snapshots" in names or any(name.startswith(_CACHE_PREFIX) for name in names):
        hint = "this is a cache with models in it: name one of them"
    elif names:
        kinds = [f"{count} {printable(suffix, 20) or 'without suffix'}" for suffix, count in counts.most_common(5)]
        hint = f"it holds {len(names):,} entries ({', '.join(kinds)}): name the folder that has the weights"
    else:
        hint = "the folder is empty: download the model into it"
    return CheckpointNotFoundError(
        f"{shown_path(folder)}: no safetensors, GGUF or PyTorch file in this folder", hint=hint, path=folder
    )


def _shown_names(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:5])
    return f"{shown}, …" if len(names) > 5 else shown
