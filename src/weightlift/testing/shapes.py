"""The tensors of real models, in name, data type, shape and proportion, at any size.

Owns lists of :class:`TensorSpec`; writes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weightlift.dtypes import SAFETENSORS
from weightlift.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

_STEP: Final = 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor to be written.

    Attributes:
        name: its name.
        dtype: a data type of the safetensors format, by its name there.
        shape: its logical shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in SAFETENSORS or SAFETENSORS[self.dtype].storage_bytes(math.prod(self.shape)) is None:
            raise OptionError(
                f"no tensor can be {self.dtype} of shape {list(self.shape)}",
                hint=f"known data types: {', '.join(SAFETENSORS)}; packed ones must fill whole bytes",
            )

    @property
    def nbytes(self) -> int:
        """Bytes it takes in a file."""
        nbytes = SAFETENSORS[self.dtype].storage_bytes(math.prod(self.shape))
        assert nbytes is not None, "checked at construction"
        return nbytes


def llama_specs(total_bytes: int, *, layers: int = 24, dtype: str = "BF16") -> list[TensorSpec]:
    """A Llama-like model of about ``total_bytes``: nine tensors a layer and three more.

    The size is met within 4 hidden vectors where ``total_bytes`` is 10 MB or more.
    """
    width = TensorSpec("", dtype, (8,)).nbytes / 8
    # Parameters of a layer are about 13 hidden², of the embedding and the head together 16 hidden².
    hidden = max(_STEP, int(math.sqrt(total_bytes / width / (13 * layers + 16))) // _STEP * _STEP)
    inner = hidden * 7 // 2
    body = _llama_body(layers, hidden, hidden // 4, inner, dtype)
    left = total_bytes - sum(spec.nbytes for spec in body)
    vocabulary = max(_STEP, int(left / (2 * hidden * width)))
    return _with_ends(body, vocabulary, hidden, dtype)


def llama_70b_specs() -> list[TensorSpec]:
    """Llama 3 70B as published: 723 tensors, 141 GB in BF16."""
    return _with_ends(_llama_body(80, 8192, 1024, 28672, "BF16"), 128256, 8192, "BF16")


def _llama_body(layers: int, hidden: int, keys: int, inner: int, dtype: str) -> list[TensorSpec]:
    shapes = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (keys, hidden),
    }
    return [
        TensorSpec(f"model.layers.{layer}.{name}.weight", dtype, shape)
        for layer in range(layers)
        for name, shape in shapes.items()
    ]


def _with_ends(body: list[TensorSpec], vocabulary: int, hidden: int, dtype: str) -> list[TensorSpec]:
    embedding = TensorSpec("model.embed_tokens.weight", dtype, (vocabulary, hidden))
    norm = TensorSpec("model.norm.weight", dtype, (hidden,))
    return [embedding, *body, norm, TensorSpec("lm_head.weight", dtype, (vocabulary, hidden))]


def moe_specs(
    experts: int = 512, *, layers: int = 71, hidden: int = 16, inner: int = 8, vocabulary: int = 256
) -> list[TensorSpec]:
    """A mixture of experts in FP8 with scales, one small tensor per expert matrix; by default about 219,000 of them."""
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (vocabulary, hidden))]
    for layer in range(layers):
        start = f"model.layers.{layer}"
        specs += [TensorSpec(f"{start}.{name}.weight", "BF16", (hidden,)) for name in ("input_norm", "mlp_norm")]
        specs += [
            TensorSpec(f"{start}.self_attn.{name}_proj.weight", "BF16", (hidden, hidden))
            for name in ("q", "k", "v", "o")
        ]
        specs.append(TensorSpec(f"{start}.mlp.gate.weight", "F32", (experts, hidden)))
        for expert in range(experts):
            for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
                linear = f"{start}.mlp.experts.{expert}.{name}_proj"
                specs.append(TensorSpec(f"{linear}.weight", "F8_E4M3", shape))
                specs.append(TensorSpec(f"{linear}.weight_scale", "F32", (1,)))
    return [*specs, TensorSpec("model.norm.weight", "BF16", (hidden,))]


def exl2_specs(
    *,
    layers: int = 80,
    hidden: int = 8192,
    keys: int = 1024,
    inner: int = 28672,
    vocabulary: int = 32000,
    bits: int = 4,
) -> list[TensorSpec]:
    """A model quantised for ExLlamaV2: five tensors per linear; by default a 70B, 2967 tensors, 33 GiB."""

    def linear(name: str, inputs: int, outputs: int) -> list[TensorSpec]:
        groups = max(1, inputs // 128)
        return [
            TensorSpec(f"{name}.q_groups", "I16", (2 * groups,)),
            TensorSpec(f"{name}.q_invperm", "I32", (inputs,)),
            TensorSpec(f"{name}.q_scale", "I32", (groups, max(1, outputs // 8))),
            TensorSpec(f"{name}.q_scale_max", "F16", (groups,)),
            TensorSpec(f"{name}.q_weight", "I32", (max(1, inputs * bits // 32), outputs)),
        ]

    return _quantised(linear, layers=layers, hidden=hidden, keys=keys, inner=inner, vocabulary=vocabulary)


def exl3_specs(
    *,
    layers: int = 80,
    hidden: int = 8192,
    keys: int = 1024,
    inner: int = 28672,
    vocabulary: int = 32000,
    bits: int = 4,
) -> list[TensorSpec]:
    """A model quantised for ExLlamaV3: four tensors per linear, one of them 4 bytes; by default 2406 tensors."""

    def linear(name: str, inputs: int, outputs: int) -> list[TensorSpec]:
        return [
            TensorSpec(f"{name}.mcg", "I32", ()),
            TensorSpec(f"{name}.suh", "F16", (inputs,)),
            TensorSpec(f"{name}.svh", "F16", (outputs,)),
            TensorSpec(f"{name}.trellis", "I16", (max(1, inputs // 16), max(1, outputs // 16), 16 * bits)),
        ]

    return _quantised(linear, layers=layers, hidden=hidden, keys=keys, inner=inner, vocabulary=vocabulary)


def _quantised(
    linear: Callable[[str, int, int], list[TensorSpec]],
    *,
    layers: int,
    hidden: int,
    keys: int,
    inner: int,
    vocabulary: int,
) -> list[TensorSpec]:
    linears = {
        "mlp.down_proj": (inner, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, keys),
    }
    specs = [TensorSpec("model.embed_tokens.weight", "F16", (vocabulary, hidden))]
    for layer in range(layers):
        start = f"model.layers.{layer}"
        specs += [
            TensorSpec(f"{start}.{name}_layernorm.weight", "F16", (hidden,)) for name in ("input", "post_attention")
        ]
        for name, (inputs, outputs) in linears.items():
            specs += linear(f"{start}.{name}", inputs, outputs)
    specs.append(TensorSpec("model.norm.weight", "F16", (hidden,)))
    return specs + linear("lm_head", hidden, vocabulary)


def every_dtype_specs() -> list[TensorSpec]:
    """Every data type of the format as a matrix, an odd-sized vector, a scalar and an empty tensor.

    Packed types have no scalar and the shortest vector that fills whole bytes.
    """
    specs = []
    for name, dtype in SAFETENSORS.items():
        specs.append(TensorSpec(f"{name}.matrix", name, (5, 8)))
        specs.append(TensorSpec(f"{name}.empty", name, (3, 0, 2)))
        specs.append(TensorSpec(f"{name}.vector", name, (7 if dtype.block_elements == 1 else dtype.block_elements,)))
        if dtype.block_elements == 1:
            specs.append(TensorSpec(f"{name}.scalar", name, ()))
    return specs
