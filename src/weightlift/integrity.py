"""Making manifests, and checking whole checkpoints against them: one pass over every byte of every file.

The files are read along the usual paths and within the usual budget; nothing is kept but digests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlift.host.memory import available_processors
from weightlift.manifest import (
    FileEntry,
    Manifest,
    TensorEntry,
    described_differences,
    digest_differences,
    file_names,
    missing_tensors,
)
from weightlift.pipeline import Transfer
from weightlift.reach import Reach
from weightlift.summary import summarise
from weightlift.targets.whole_files import WholeFileTarget

if TYPE_CHECKING:
    from weightlift.description import Description
    from weightlift.options import LoadOptions
    from weightlift.types import LoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not as the manifest says.

    Attributes:
        kind: ``file`` or ``tensor``.
        name: which one.
        problem: what is wrong with it, as the end of a sentence about it.
    """

    kind: str
    name: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What came of checking a checkpoint against a manifest.

    Attributes:
        differences: what is not as it should be, files first; empty if all is well.
        files: how many files were hashed.
        tensors: how many tensors were hashed.
        report: how the files were read.
    """

    differences: tuple[Difference, ...]
    files: int
    tensors: int
    report: LoadReport

    @property
    def ok(self) -> bool:
        """Whether everything is as the manifest says."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """The one JSON object that ``weightlift verify --json`` prints."""
        return {
            "schema": 1,
            "ok": self.ok,
            "files": self.files,
            "tensors": self.tensors,
            "differences": [
                {"kind": difference.kind, "name": difference.name, "problem": difference.problem}
                for difference in self.differences
            ],
            "bytes": self.report.nbytes,
            "seconds": self.report.seconds,
            "gigabytes_per_second": self.report.gigabytes_per_second,
            "method": self.report.to_json()["method"],
        }


def hash_checkpoint(description: Description, options: LoadOptions) -> tuple[Manifest, LoadReport]:
    """Read every byte of a checkpoint and make its manifest.

    Args:
        description: the checkpoint.
        options: how to read; where tensors go and which of them are wanted plays no part.
    """
    target = WholeFileTarget(description, available_processors())
    rows = range(len(description))
    transfer = Transfer(description, Reach(range(len(description.shards)), {}), options, destination_bytes=0)
    with transfer.aborting():
        transfer.run(target)
        list(target.finish())
        finished = transfer.finish()
    report = summarise(transfer, description, rows, options, device="null", finished=finished, digests={})
    names = file_names(description)
    files = {
        name: FileEntry(shard.identity.size_bytes, digest)
        for name, shard, digest in zip(names, description.shards, target.files, strict=True)
    }
    tensors = {
        info.name: TensorEntry(names[shard], info.dtype.name, tuple(info.shape), info.nbytes, target.tensors[info.name])
        for info, shard in zip(description, description.shard_indexes, strict=True)
    }
    return Manifest(files=files, tensors=tensors), report


def verify_checkpoint(description: Description, manifest: Manifest, options: LoadOptions) -> Verification:
    """Read every byte of a checkpoint and compare it with a manifest.

    Args:
        description: the checkpoint.
        manifest: what it should be.
        options: how to read.
    """
    now, report = hash_checkpoint(description, options)
    tensors = described_differences(description, range(len(description)), manifest)
    alike = {name: entry.xxh3_128 for name, entry in now.tensors.items() if name not in tensors}
    tensors |= digest_differences(alike, manifest)
    tensors |= dict.fromkeys(missing_tensors(description, manifest), "is in the manifest and not in the checkpoint")
    found = [Difference(kind="file", name=name, problem=problem) for name, problem in _files(now, manifest).items()]
    found += [Difference(kind="tensor", name=name, problem=problem) for name, problem in sorted(tensors.items())]
    return Verification(differences=tuple(found), files=len(now.files), tensors=len(now.tensors), report=report)


def _files(now: Manifest, then: Manifest) -> dict[str, str]:
    found = {}
    for name in sorted(now.files.keys() | then.files.keys()):
        new, old = now.files.get(name), then.files.get(name)
        if old is None:
            found[name] = "is not in the manifest"
        elif new is None:
            found[name] = "is in the manifest and not in the checkpoint"
        elif new.bytes != old.bytes:
            found[name] = f"has {new.bytes:,} bytes, and {old.bytes:,} in the manifest"
        elif new.sha256 != old.sha256:
            found[name] = f"has other contents: their sha256 is {new.sha256}, and {old.sha256} in the manifest"
    return found
