"""The checkpoints of the GPU benchmark: written in parallel, every tensor's digest taken from the bytes as written.

Each lies in a folder of its own, as some loaders take folders. Sizes are wanted sizes; shapes keep their proportions.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from digests import digest_of
from harness import MIB, Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from weightlift.testing import TensorSpec

PART_BYTES = 8 * MIB
WRITERS = 8
SMALL_TENSORS = 220_000
MANY_TENSORS = 60_000
MANY_BYTES = 100 * 1024
FULL_EXL2_BYTES = 4 << 30
"""From this size on layers of an EXL2 model are those of a 70B, only fewer; below, they shrink too."""


def write(folder: Path, scratch: Path, specs: Sequence[TensorSpec], name: str) -> Checkpoint:
    """Write one safetensors file ``folder/name/model.safetensors``, laid out as the reference writer does.

    Args:
        folder: where the checkpoint's own folder goes.
        scratch: folder for the file of digests.
        specs: the tensors.
        name: what to call it.
    """
    from weightlift.testing import header_bytes

    ordered = sorted(specs, key=lambda spec: (-spec.nbytes / max(1, math.prod(spec.shape)), spec.name))
    path = folder / name / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = header_bytes(ordered)
    digests: dict[str, str] = {}
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.pwrite(descriptor, header, 0)
        with ThreadPoolExecutor(WRITERS) as pool:
            starts = itertools.accumulate((spec.nbytes for spec in ordered), initial=len(header))
            jobs = _groups(list(zip(ordered, starts, strict=False)))
            for found in pool.map(lambda job: _write_group(descriptor, job), jobs):
                digests.update(found)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    target = scratch / f"{name}.digests.json"
    target.write_text(json.dumps(digests))
    total = sum(spec.nbytes for spec in ordered)
    return Checkpoint(path=str(path), files=(str(path),), tensor_bytes=total, tensors=len(ordered), digests=str(target))


Placed = tuple["TensorSpec", int]


def _groups(placed: Sequence[Placed]) -> Iterator[list[Placed]]:
    """Neighbours that are written in one go: one large tensor, or small ones of :data:`PART_BYTES` together."""
    group: list[Placed] = []
    size = 0
    for item in placed:
        if group and size + item[0].nbytes > PART_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += item[0].nbytes
    yield group


def _write_group(descriptor: int, group: Sequence[Placed]) -> dict[str, str]:
    import xxhash

    from weightlift.testing import tensor_bytes

    if len(group) == 1:
        (spec, start), digest = group[0], xxhash.xxh3_128()
        for first in range(0, spec.nbytes, PART_BYTES):
            part = tensor_bytes(spec, start=first, stop=first + PART_BYTES)
            digest.update(part)
            os.pwrite(descriptor, part, start + first)
        return {spec.name: digest.hexdigest()}
    parts = {spec.name: tensor_bytes(spec) for spec, _ in group}
    os.pwrite(descriptor, b"".join(parts.values()), group[0][1])
    return {name: digest_of(part) for name, part in parts.items()}


def llama(nbytes: int) -> list[TensorSpec]:
    """A Llama-shaped model of about that size."""
    from weightlift.testing import llama_specs

    return llama_specs(nbytes)


def exl2(nbytes: int) -> list[TensorSpec]:
    """The shape of a 70B quantised for ExLlamaV2, in as many layers as fit."""
    from weightlift.testing import exl2_specs

    scale = 1 if nbytes >= FULL_EXL2_BYTES else max(0.02, math.sqrt(nbytes / FULL_EXL2_BYTES))
    sizes = {"hidden": 8192, "keys": 1024, "inner": 28672, "vocabulary": 32000}
    chosen = {key: max(128, int(size * scale) // 128 * 128) for key, size in sizes.items()}
    one, two = (sum(spec.nbytes for spec in exl2_specs(layers=layers, **chosen)) for layers in (1, 2))
    return exl2_specs(layers=max(1, 1 + round((nbytes - one) / (two - one))), **chosen)


def small(tensors: int) -> list[TensorSpec]:
    """At least so many tensors of a few KiB at most, as in models with hundreds of experts."""
    from weightlift.testing import moe_specs

    per_layer = len(moe_specs(layers=2)) - len(moe_specs(layers=1))
    return moe_specs(layers=-(-tensors // per_layer), hidden=64, inner=32)


def many(nbytes: int) -> list[TensorSpec]:
    """60,000 tensors of 100 KiB, or as many as the size allows."""
    from weightlift.testing import TensorSpec

    count = max(1, min(MANY_TENSORS, nbytes // MANY_BYTES))
    shape = (200, MANY_BYTES // 400)
    return [TensorSpec(f"model.layers.{n // 1000}.experts.{n % 1000}.weight", "BF16", shape) for n in range(count)]
