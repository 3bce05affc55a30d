"""The checkpoints under measurement: generated ones of a wanted size, or one that is there already.

Checksums are taken from the files by a reader of its own, so that no loader vouches for itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING

from digests import digest_of
from harness import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from weightlift.testing import TensorSpec


def existing(path: Path, scratch: Path, *, digests: bool = True) -> Checkpoint:
    """Describe the checkpoint at ``path`` (a file, or a folder of ``*.safetensors``) and take its checksums.

    Args:
        path: where it is.
        scratch: folder for the file of checksums.
        digests: without them only names and sizes are checked, by the loader itself.

    Raises:
        FileNotFoundError: there is no safetensors file.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"{path}: no safetensors file there")
    sums: dict[str, str] = {}
    total = count = 0
    for file in files:
        with file.open("rb") as stream:
            for name, start, length in _ranges(file):
                total, count = total + length, count + 1
                if digests:
                    sums[name] = digest_of(os.pread(stream.fileno(), length, start))
    target = scratch / f"{path.stem}.digests.json"
    if digests:
        target.write_text(json.dumps(sums))
    return Checkpoint(
        path=str(path),
        files=tuple(map(str, files)),
        tensor_bytes=total,
        tensors=count,
        digests=str(target) if digests else "",
    )


def llama(folder: Path, scratch: Path, nbytes: int) -> Checkpoint:
    """Write one file of a Llama-shaped checkpoint with random data of about ``nbytes`` bytes."""
    from weightlift.testing import llama_specs, write_checkpoint

    return existing(write_checkpoint(folder / f"llama-{nbytes >> 20}MiB.safetensors", llama_specs(nbytes)), scratch)


def many_small(folder: Path, scratch: Path, tensors: int) -> Checkpoint:
    """Write one file with at least ``tensors`` tensors of a few KiB at most, as in models with hundreds of experts."""
    from weightlift.testing import moe_specs, write_checkpoint

    per_layer = len(moe_specs(layers=2)) - len(moe_specs(layers=1))
    specs = moe_specs(layers=-(-tensors // per_layer), hidden=64, inner=32)
    return existing(write_checkpoint(folder / f"small-{len(specs)}.safetensors", specs), scratch)


def sparse(folder: Path, scratch: Path, specs: Sequence[TensorSpec], name: str) -> Checkpoint:
    """Write a header over a file without data, whose tensors are all zero; takes a few KiB of disk."""
    from weightlift.testing import write_checkpoint

    path = write_checkpoint(folder / f"{name}.safetensors", specs, sparse=True)
    return existing(path, scratch, digests=False)


def sharded(
    folder: Path, scratch: Path, counts: Sequence[int], shard_bytes: int, *, sparse: bool
) -> dict[int, Checkpoint]:
    """Llama-shaped checkpoints by the number of their shards; the first shards of a larger one are a smaller one.

    The shards are hard links, so that all sizes together take no more room than the largest.
    """
    from weightlift.testing import llama_specs, write_checkpoint

    kind = "sparse" if sparse else "written"
    pool = folder / f"{kind}-shards"
    pool.mkdir()
    for number in range(max(counts)):
        specs = [dataclasses.replace(spec, name=f"part.{number}.{spec.name}") for spec in llama_specs(shard_bytes)]
        write_checkpoint(pool / f"part-{number:03}.safetensors", specs, seed=number, sparse=sparse)
    shards = sorted(pool.iterdir())
    made = {}
    for count in counts:
        part = folder / f"{kind}-{count}"
        part.mkdir()
        for shard in shards[:count]:
            os.link(shard, part / shard.name)
        made[count] = existing(part, scratch, digests=not sparse)
    return made


def divided(folder: Path, scratch: Path, nbytes: int, count: int) -> Checkpoint:
    """Write one file with so many bytes in so many tensors of the same size, give or take one element."""
    from weightlift.testing import TensorSpec, write_checkpoint

    elements, more = divmod(nbytes // 2, count)
    specs = [
        TensorSpec(f"model.layers.{number // 100}.experts.{number % 100}.weight", "BF16", (elements + (number < more),))
        for number in range(count)
    ]
    return existing(write_checkpoint(folder / f"divided-{count}.safetensors", specs), scratch)


def _ranges(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, position and length of every tensor of one file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        yield name, 8 + length + start, end - start
