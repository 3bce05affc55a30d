"""Checkpoints for tests: any size, the shapes of real models, known contents, no framework.

Owns what goes into a generated file and can say it again without reading the file: the bytes of a tensor follow from
``(seed, name)``. Random contents are one block whose length is a prime number of bytes, repeated from a start that
differs per tensor, so a chunk that lands at the wrong place, in the wrong tensor or twice always shows.

Floating-point contents are random bits and may be NaN: compare bytes, not values.
"""

from __future__ import annotations

import json
import random
import zlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from weightlift.dtypes import SAFETENSORS
from weightlift.errors import OptionError
from weightlift.testing.shapes import TensorSpec
from weightlift.units import PAGE_BYTES

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

Fill = Literal["random", "zeros"]
Padding = Literal["reference", "none"] | int

BLOCK_BYTES: Final = 1_048_573
"""Length of the repeated block: the largest prime number below 2^20."""

_PART_BYTES: Final = 8 << 20
_DTYPE_RANK: Final = {name: rank for rank, name in enumerate(SAFETENSORS)}


def write_checkpoint(
    path: str | os.PathLike[str],
    specs: Sequence[TensorSpec],
    *,
    shards: int = 1,
    seed: int = 0,
    sparse: bool = False,
    padding: Padding = "reference",
    metadata: Mapping[str, str] | None = None,
    fill: Fill = "random",
    index: bool = True,
    sort: bool = True,
) -> Path:
    """Write a safetensors checkpoint.

    Args:
        path: a file if it ends in ``.safetensors``, else a folder, made if it is not there.
        specs: the tensors.
        shards: how many files to spread them over, by size; more than one needs a folder.
        seed: selects the contents.
        sparse: write headers only and leave the data a hole that reads as zeros: any size in an instant.
        padding: ``"reference"`` fills the header with blanks to a multiple of 8 bytes; ``"none"`` adds none, so that
            data may begin at an odd position; a number makes the data's position leave that remainder when divided
            by 4096.
        metadata: free-form text entries of every header.
        fill: ``"random"`` or ``"zeros"``.
        index: whether several shards get an index.
        sort: lay tensors out as the reference writer does, widest data type first and then by name; otherwise as given.

    Returns:
        The file or folder written.
    """
    target = Path(path)
    is_file = target.suffix == ".safetensors"
    if is_file and shards > 1:
        raise OptionError(f"path={target} is one file, but shards={shards}", hint="name a folder")
    if not is_file:
        target.mkdir(parents=True, exist_ok=True)
    shard_of: dict[str, str] = {}
    parts = _spread(specs, shards)
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        file = target if is_file else target / name
        ordered = sorted(part, key=lambda spec: (-_DTYPE_RANK[spec.dtype], spec.name)) if sort else list(part)
        _write_shard(
            file, ordered, header_bytes(ordered, padding=padding, metadata=metadata), seed, None if sparse else fill
        )
        shard_of.update(dict.fromkeys((spec.name for spec in part), name))
    if index and len(parts) > 1:
        total = sum(spec.nbytes for spec in specs)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
        (target / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def header_bytes(
    specs: Sequence[TensorSpec], *, padding: Padding = "reference", metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a file with these tensors in this order: length, JSON text and padding."""
    content: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        content[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    if padding == "reference":
        text += b" " * (-len(text) % 8)
    elif padding != "none":
        text += b" " * ((int(padding) - 8 - len(text)) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(
    spec: TensorSpec, *, seed: int = 0, start: int = 0, stop: int | None = None, fill: Fill = "random"
) -> bytes:
    """The bytes ``start`` to ``stop`` of a tensor as :func:`write_checkpoint` writes them."""
    last = spec.nbytes if stop is None else min(stop, spec.nbytes)
    if fill == "zeros":
        return bytes(max(last - start, 0))
    return b"".join(_random_parts(spec, seed, start, last))


def tensor_digest(spec: TensorSpec, *, seed: int = 0, fill: Fill = "random") -> str:
    """The xxh3-128 digest of a tensor's bytes in hexadecimal, as ``weightlift load --digest`` prints it."""
    import xxhash

    digest = xxhash.xxh3_128()
    for start in range(0, spec.nbytes, _PART_BYTES):
        digest.update(tensor_bytes(spec, seed=seed, start=start, stop=start + _PART_BYTES, fill=fill))
    return digest.hexdigest()


def _spread(specs: Sequence[TensorSpec], shards: int) -> list[list[TensorSpec]]:
    """Cut the list into runs of about equal size; no run is empty while there are tensors left."""
    if not 1 <= shards <= max(len(specs), 1):
        raise OptionError(f"shards={shards} for {len(specs)} tensors", hint="use between 1 and one per tensor")
    total = sum(spec.nbytes for spec in specs)
    parts: list[list[TensorSpec]] = [[]]
    written = 0
    for position, spec in enumerate(specs):
        due = written * shards >= total * len(parts)
        must = len(specs) - position <= shards - len(parts)
        if parts[-1] and len(parts) < shards and (due or must):
            parts.append([])
        parts[-1].append(spec)
        written += spec.nbytes
    return parts


def _write_shard(path: Path, specs: Sequence[TensorSpec], header: bytes, seed: int, fill: Fill | None) -> None:
    """Write one file; without ``fill`` its data is a hole."""
    with path.open("wb") as file:
        file.write(header)
        if fill == "random":
            for spec in specs:
                file.writelines(_random_parts(spec, seed, 0, spec.nbytes))
        elif fill == "zeros":
            zeros = bytes(1 << 20)
            for spec in specs:
                for start in range(0, spec.nbytes, len(zeros)):
                    file.write(zeros[: spec.nbytes - start])
        file.truncate(len(header) + sum(spec.nbytes for spec in specs))


def _random_parts(spec: TensorSpec, seed: int, start: int, stop: int) -> Iterator[memoryview]:
    block = memoryview(_boolean_block(seed) if spec.dtype == "BOOL" else _block(seed))
    phase = zlib.crc32(spec.name.encode("utf-8", "surrogatepass"), seed & 0xFFFFFFFF) % BLOCK_BYTES
    position = start
    while position < stop:
        first = (phase + position) % BLOCK_BYTES
        part = block[first : min(first + stop - position, len(block))]
        yield part
        position += len(part)


@lru_cache(maxsize=2)
def _block(seed: int) -> bytes:
    """The block repeated a few times, so that long tensors are written in few calls."""
    return random.Random(seed).randbytes(BLOCK_BYTES) * 4  # noqa: S311 - contents have to be the same every time


@lru_cache(maxsize=2)
def _boolean_block(seed: int) -> bytes:
    """The same for booleans: frameworks take any byte but 0 and 1 in them for undefined behaviour."""
    return _block(seed).translate(bytes(value & 1 for value in range(256)))


def make_checkpoint(
    path: str | os.PathLike[str],
    specs: Sequence[TensorSpec] | None = None,
    *,
    dtype: str = "BF16",
    shape: Sequence[int] = (1024, 1024),
    count: int = 4,
    shards: int = 1,
    seed: int = 0,
) -> tuple[Path, list[TensorSpec]]:
    """Write a small checkpoint for a test that does not care what is in it.

    Args:
        path: a file if it ends in ``.safetensors``, else a folder.
        specs: the tensors; without them, ``count`` equal ones of ``dtype`` and ``shape``.
        dtype: data type of the tensors.
        shape: shape of the tensors.
        count: how many.
        shards: how many files.
        seed: selects the contents.

    Returns:
        What was written, and the tensors in it.
    """
    chosen = [TensorSpec(f"tensor_{n:03}", dtype, tuple(shape)) for n in range(count)] if specs is None else list(specs)
    return write_checkpoint(path, chosen, shards=shards, seed=seed), chosen
