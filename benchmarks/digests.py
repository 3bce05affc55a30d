"""Whether tensors hold the bytes of their file: compared by digest, those on devices after they were copied back."""

from __future__ import annotations

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.bench.contents import flat_bytes, with_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

BATCH_BYTES = 128 << 20
"""Most bytes brought back at once; small tensors go together up to it, since every copy and every task costs some
microseconds."""

THREADS = 8
"""Batches that are compared at once."""


def digest_of(data: Any) -> str:
    """The digest that files of digests hold."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(data)


def compare(tensors: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, int]:
    """Compare the digest of some tensors, and the names of all.

    Args:
        tensors: what was loaded.
        wanted: ``digests``, a JSON file with the digest of every tensor, and ``every``: one in so many is compared.

    Raises:
        RuntimeError: a tensor is missing, unknown or differs.
    """
    expected: dict[str, str] = json.loads(Path(wanted["digests"]).read_text(encoding="utf-8"))
    if set(tensors) != set(expected):
        raise RuntimeError(f"{len(tensors)} tensors where {len(expected)} were expected, or other names")
    names = sorted(expected)[:: wanted["every"]]
    for name, digest in zip(names, _digests(tensors[name] for name in names), strict=True):
        if digest != expected[name]:
            raise RuntimeError(f"tensor {name!r} has other bytes than the file")
    return {"tensors_checked": len(names), "tensors": len(expected)}


def _digests(tensors: Iterable[Any]) -> Iterator[str]:
    """The digest of every tensor's bytes, in order; several batches at a time, since one thread takes many seconds."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        yield from itertools.chain.from_iterable(pool.map(_of_batch, _batches(tensors)))


def _batches(tensors: Iterable[Any]) -> Iterator[Sequence[Any]]:
    """The tensors' bytes: large ones alone, small ones together."""
    batch: list[Any] = []
    size = 0
    for flat in map(flat_bytes, tensors):
        if batch and (size + len(flat) > BATCH_BYTES or _device(batch[0]) != _device(flat)):
            yield batch
            batch, size = [], 0
        batch.append(flat)
        size += len(flat)
    yield batch


def _device(flat: Any) -> Any:
    return getattr(flat, "device", None)


def _of_batch(batch: Sequence[Any]) -> list[str]:
    import xxhash

    if len(batch) > 1 and getattr(batch[0], "is_cuda", False):
        import torch

        joined, ends = torch.cat(list(batch)).cpu(), itertools.accumulate(map(len, batch))
        return [with_bytes(joined[end - len(flat) : end], digest_of) for flat, end in zip(batch, ends, strict=True)]
    digests = []
    for flat in batch:
        digest = xxhash.xxh3_128()
        for first in range(0, len(flat), BATCH_BYTES):
            with_bytes(flat[first : first + BATCH_BYTES], digest.update)
        digests.append(digest.hexdigest())
    return digests
