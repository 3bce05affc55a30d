"""Whether tensors hold the bytes of their file: copied back to the host and compared by digest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BATCH_BYTES = 128 << 20
"""Most bytes brought back at once; small tensors are joined up to it, since every copy costs some microseconds."""


def digests(torch: Any, tensors: Sequence[Any]) -> Iterator[str]:
    """The xxh3-128 digest of every tensor's bytes, in order."""
    batch: list[Any] = []
    size = 0
    for tensor in tensors:
        flat = tensor.reshape(-1).view(torch.uint8)
        if size + len(flat) > BATCH_BYTES or (batch and batch[0].device != flat.device):
            yield from _of_batch(torch, batch)
            batch, size = [], 0
        batch.append(flat)
        size += len(flat)
    yield from _of_batch(torch, batch)


def _of_batch(torch: Any, batch: Sequence[Any]) -> Iterator[str]:
    import xxhash

    if len(batch) == 1:
        digest = xxhash.xxh3_128()
        for first in range(0, len(batch[0]), BATCH_BYTES):
            digest.update(batch[0][first : first + BATCH_BYTES].cpu().numpy())
        yield digest.hexdigest()
    elif batch:
        joined = torch.cat(list(batch)).cpu().numpy()
        first = 0
        for flat in batch:
            yield xxhash.xxh3_128_hexdigest(joined[first : first + len(flat)])
            first += len(flat)


def check(torch: Any, tensors: Mapping[str, Any], expected: Mapping[str, str], every: int) -> dict[str, int]:
    """Compare the digest of every ``every``-th tensor, and the names of all.

    Raises:
        RuntimeError: a tensor is missing, unknown or differs.
    """
    if set(tensors) != set(expected):
        raise RuntimeError(f"{len(tensors)} tensors where {len(expected)} were expected, or other names")
    names = sorted(expected)[::every]
    for name, digest in zip(names, digests(torch, [tensors[name] for name in names]), strict=True):
        if digest != expected[name]:
            raise RuntimeError(f"tensor {name!r} has other bytes than the file")
    return {"tensors_checked": len(names), "tensors": len(expected)}
