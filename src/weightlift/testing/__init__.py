"""Public test kit: checkpoints with known contents, for projects that build on weightlift and for its own tests.

Needs no framework and no device.
"""

from __future__ import annotations

from weightlift.testing.factory import (
    header_bytes,
    make_checkpoint,
    tensor_bytes,
    tensor_digest,
    write_checkpoint,
)
from weightlift.testing.gguf_factory import GGUFSpec, write_gguf, write_llama_gguf
from weightlift.testing.shapes import (
    TensorSpec,
    every_dtype_specs,
    exl2_specs,
    exl3_specs,
    llama_70b_specs,
    llama_specs,
    moe_specs,
)

__all__ = [
    "GGUFSpec",
    "TensorSpec",
    "every_dtype_specs",
    "exl2_specs",
    "exl3_specs",
    "header_bytes",
    "llama_70b_specs",
    "llama_specs",
    "make_checkpoint",
    "moe_specs",
    "tensor_bytes",
    "tensor_digest",
    "write_checkpoint",
    "write_gguf",
    "write_llama_gguf",
]
