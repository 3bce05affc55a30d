"""The public calls: open a checkpoint, load it, stream it, load it into a module.

Each resolves options once, picks a target, and lets a :class:`~weightlift.pipeline.Transfer` do the work.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack, cast

from weightlift.formats import describe
from weightlift.loading import fit_rows, load_rows
from weightlift.options import LoadOptions
from weightlift.selection import select_rows
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from weightlift.description import Description, TensorInfo
    from weightlift.fitting import FitReport
    from weightlift.integrity import Verification
    from weightlift.keywords import LoadKeywords
    from weightlift.manifest import Manifest
    from weightlift.modules import LoadIntoResult
    from weightlift.streaming import TensorStream
    from weightlift.types import LoadReport

T = TypeVar("T")


class StateDict(dict[str, T], Generic[T]):
    """Tensors by name, in file order, and the report of the load that made them.

    Attributes:
        report: what the load did.
    """

    report: LoadReport

    def __init__(self, tensors: Iterable[tuple[str, T]], report: LoadReport) -> None:
        super().__init__(tensors)
        self.report = report


class Checkpoint(Mapping[str, "TensorInfo"]):
    """A checkpoint whose headers have been read: a mapping from tensor names to their descriptions.

    Attributes:
        description: the columns behind it.
    """

    def __init__(self, description: Description) -> None:
        self.description = description

    def __getitem__(self, name: str) -> TensorInfo:
        return self.description.tensor(self.description.row(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.description.names)

    def __len__(self) -> int:
        return len(self.description)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the headers of all shards say beside their tensors; where shards disagree, the first one counts.

        Text for safetensors; numbers, text and lists for GGUF, whose lists are read when they are asked for; plain
        values for PyTorch.
        """
        parts = [shard.metadata for shard in self.description.shards]
        if all(isinstance(part, dict) for part in parts):
            return {key: value for part in reversed(parts) for key, value in part.items()}
        return ChainMap(*cast(list[MutableMapping[str, Any]], parts))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what was chosen when the checkpoint was found, such as one of several kinds of files."""
        return self.description.notes

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return self.description.total_bytes

    def __repr__(self) -> str:
        return (
            f"<Checkpoint of {len(self)} tensors, {self.total_bytes:,} bytes in {len(self.description.shards)} files>"
        )


def open(path: str | os.PathLike[str], *, header: HeaderRules | str = HeaderRules.REFERENCE) -> Checkpoint:
    """Read a checkpoint's headers, and nothing else.

    Args:
        path: a file, a folder of shards, an index file, or a model in the Hugging Face cache.
        header: ``reference`` judges headers as the reference parser does, ``strict`` refuses what it tolerates.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
        FormatError: what is there breaks the rules of its format.
        AccessError: it may not be read.
    """
    return Checkpoint(describe(path, header=LoadOptions(header=header).header))  # type: ignore[arg-type]


def _description(checkpoint: str | os.PathLike[str] | Checkpoint, options: LoadOptions) -> Description:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.description
    return describe(checkpoint, header=options.header)


def load(path: str | os.PathLike[str] | Checkpoint, **keywords: Unpack[LoadKeywords]) -> StateDict[Any]:
    """Load a checkpoint's tensors.

    Args:
        path: a path as for :func:`open`, or an opened checkpoint.
        **keywords: the fields of :class:`~weightlift.options.LoadOptions`.

    Returns:
        Tensors by name, in file order, with the load's report as ``.report``. With ``device="null"`` it is empty.

    Raises:
        WeightliftError: see :mod:`weightlift.errors`; nothing half-loaded is returned.
    """
    options = LoadOptions(**keywords)  # type: ignore[arg-type]
    description = _description(path, options)
    rows = select_rows(description, options.names)
    tensors, report = load_rows(description, rows, options)
    return StateDict(tensors, report)


def fit(path: str | os.PathLike[str] | Checkpoint, **keywords: Unpack[LoadKeywords]) -> FitReport:
    """Compare what :func:`load` would take with what the machine and its devices have; reads headers only.

    Args:
        path: a path as for :func:`open`, or an opened checkpoint.
        **keywords: the fields of :class:`~weightlift.options.LoadOptions`.

    Returns:
        The comparison. That something does not fit is its verdict, not an error.

    Raises:
        WeightliftError: see :mod:`weightlift.errors`.
    """
    options = LoadOptions(**keywords)  # type: ignore[arg-type]
    description = _description(path, options)
    return fit_rows(description, select_rows(description, options.names), options)


def stream(path: str | os.PathLike[str] | Checkpoint, **keywords: Unpack[LoadKeywords]) -> TensorStream:
    """Load tensors one after the other, in file order, while later ones are being read.

    Reading pauses while a finished tensor waits, so memory holds what the caller keeps and little more.

    Args:
        path: a path as for :func:`open`, or an opened checkpoint.
        **keywords: the fields of :class:`~weightlift.options.LoadOptions`.

    Returns:
        An iterator of ``(name, tensor)``; closing it (or leaving it as a context manager) stops the load.

    Raises:
        WeightliftError: see :mod:`weightlift.errors`, from here or from the iteration.
    """
    from weightlift.streaming import TensorStream

    options = LoadOptions(**keywords)  # type: ignore[arg-type]
    description = _description(path, options)
    return TensorStream(description, select_rows(description, options.names), options)


def load_into(
    module: Any, path: str | os.PathLike[str] | Checkpoint, *, strict: bool = True, **keywords: Unpack[LoadKeywords]
) -> LoadIntoResult:
    """Fill a torch module's parameters and persistent buffers in place, casting where data types differ.

    If reading fails midway the module's tensors are partly overwritten; names and shapes are checked before that.

    Args:
        module: a ``torch.nn.Module``, or a mapping from names to tensors.
        path: a path as for :func:`open`, or an opened checkpoint.
        strict: refuse missing and unexpected names, as ``Module.load_state_dict`` does; a tied tensor counts as there
            if the checkpoint has it under another of its names.
        **keywords: the fields of :class:`~weightlift.options.LoadOptions`; device and framework follow the module.

    Returns:
        Missing and unexpected names, and the load's report.

    Raises:
        StateMismatchError: names or shapes do not match; the module is unchanged.
        WeightliftError: see :mod:`weightlift.errors`.
    """
    from weightlift.modules import load_module

    options = LoadOptions(**keywords)  # type: ignore[arg-type]
    return load_module(module, _description(path, options), options, strict=strict)


def make_manifest(path: str | os.PathLike[str] | Checkpoint, **keywords: Unpack[LoadKeywords]) -> Manifest:
    """Read every byte of a checkpoint's files and take down what they hash to.

    Args:
        path: a path as for :func:`open`, or an opened checkpoint.
        **keywords: the fields of :class:`~weightlift.options.LoadOptions` that say how to read.

    Returns:
        sha256 of every file and xxh3-128 of every tensor; :func:`~weightlift.manifest.write_manifest` writes it.

    Raises:
        WeightliftError: see :mod:`weightlift.errors`.
    """
    from weightlift.integrity import hash_checkpoint

    options = LoadOptions(**keywords)  # type: ignore[arg-type]
    return hash_checkpoint(_description(path, options), options)[0]


def verify(
    path: str | os.PathLike[str] | Checkpoint,
    manifest: Manifest | str | os.PathLike[str],
    **keywords: Unpack[LoadKeywords],
) -> Verification:
    """Read every byte of a checkpoint's files and compare what they hash to with a manifest.

    To refuse changed tensors while loading, pass the manifest as ``verify=`` to :func:`load` instead.

    Args:
        path: a path as for :func:`open`, or an opened checkpoint.
        manifest: a manifest or the path of one.
        **keywords: the fields of :class:`~weightlift.options.LoadOptions` that say how to read.

    Returns:
        Everything that differs; ``.ok`` if nothing does.

    Raises:
        ManifestError: the manifest itself is no good.
        WeightliftError: see :mod:`weightlift.errors`.
    """
    from weightlift.integrity import verify_checkpoint
    from weightlift.manifest import as_manifest

    options = LoadOptions(**keywords)  # type: ignore[arg-type]
    known = as_manifest(manifest)
    return verify_checkpoint(_description(path, options), known, options)
