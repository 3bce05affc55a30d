"""What kind of model a checkpoint holds and how it is quantised, from headers and ``config.json``.

Owns the tensor names and metadata keys by which GGUF, EXL2 and EXL3 models are told and described. Numbers come from
the tensors wherever tensors tell them; what a file says about itself is shown as its own words.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from weightlift.dtypes import GGML_QUANTISED
from weightlift.formats.gguf_values import GGUFMetadata
from weightlift.formats.model_config import read_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightlift.description import Description

FILE_TYPES: Final = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
}
"""llama.cpp's ``llama_ftype``: the recipe that a file was quantised by."""

_TEXT_CHARACTERS: Final = 200
_GGUF_FACTS: Final = (
    ("context_length", "{}.context_length"),
    ("embedding_length", "{}.embedding_length"),
    ("layers", "{}.block_count"),
    ("heads", "{}.attention.head_count"),
    ("key_value_heads", "{}.attention.head_count_kv"),
    ("experts", "{}.expert_count"),
    ("experts_used", "{}.expert_used_count"),
    ("rope_base", "{}.rope.freq_base"),
)
_CONFIG_FACTS: Final = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("layers", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
    ("key_value_heads", "num_key_value_heads"),
    ("experts", "num_local_experts"),
    ("experts_used", "num_experts_per_tok"),
    ("rope_base", "rope_theta"),
    ("vocabulary", "vocab_size"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedShare:
    """The weights that are stored in the same number of bits.

    Attributes:
        bits: bits for each weight, scales and the like included.
        linears: how many matrices.
        weights: their elements.
        nbytes: their bytes as stored.
    """

    bits: float
    linears: int
    weights: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """What a model is.

    Attributes:
        kind: ``GGUF``, ``EXL2``, ``EXL3``, or the format's name where nothing is known of its quantisation.
        facts: architecture, context length and so on, by name; only what is known.
        weights: elements of the model's tensors; for EXL2 and EXL3 those of the matrices they stand for.
        bits_per_weight: bits of all tensors over ``weights``; ``None`` without any.
        mix: for EXL2 and EXL3, matrices by bits for each weight, the most bytes first.
    """

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    weights: int = 0
    bits_per_weight: float | None = None
    mix: tuple[QuantisedShare, ...] = ()

    @property
    def is_quantised(self) -> bool:
        """Whether this is a model of one of the kinds that are described in detail."""
        return self.kind in {"GGUF", "EXL2", "EXL3"}

    def to_json(self) -> dict[str, Any]:
        """The part about the model of what ``weightlift inspect --json`` prints."""
        return {
            "kind": self.kind,
            "facts": dict(self.facts),
            "weights": self.weights,
            "bits_per_weight": self.bits_per_weight,
            "mix": [
                {"bits": part.bits, "linears": part.linears, "weights": part.weights, "bytes": part.nbytes}
                for part in self.mix
            ],
        }


def summarise_model(description: Description) -> ModelSummary:
    """Find out what a checkpoint is, as a whole."""
    total = sum(description.lengths)
    if description.file_format == "GGUF":
        weights = sum(math.prod(description.shape(row)) for row in range(len(description)))
        facts = _gguf_facts(description, description.shards[0].metadata)
        return ModelSummary(kind="GGUF", facts=facts, weights=weights, bits_per_weight=_bits(total, weights))
    config = read_config(description.shards[0].path.parent) if description.shards else {}
    linears = _linears(description)
    kind = linears[0].kind if linears else description.file_format
    facts = _config_facts(config) | _quantisation_facts(config)
    stored = sum(linear.nbytes for linear in linears)
    members = {row for linear in linears for row in linear.rows}
    others = sum(math.prod(description.shape(row)) for row in range(len(description)) if row not in members)
    weights = others + sum(linear.weights for linear in linears)
    head = next((linear for linear in linears if linear.name.rpartition(".")[2] == "lm_head"), None)
    if linears:
        facts["bits_per_weight_of_linears"] = _bits(stored, sum(linear.weights for linear in linears))
    if head is not None:
        facts["bits_per_weight_of_head"] = _bits(head.nbytes, head.weights)
    return ModelSummary(
        kind=kind, facts=facts, weights=weights, bits_per_weight=_bits(total, weights), mix=_mix(linears)
    )


def _bits(nbytes: int, weights: int) -> float | None:
    return round(8 * nbytes / weights, 3) if weights else None


def _plain(value: Any) -> Any:
    """A value fit for a fact: a number or short text; ``None`` for anything else."""
    if isinstance(value, str):
        return value[:_TEXT_CHARACTERS]
    return value if isinstance(value, (bool, int, float)) else None


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _gguf_facts(description: Description, metadata: Mapping[str, Any]) -> dict[str, Any]:
    def one(key: str) -> Any:
        if isinstance(metadata, GGUFMetadata) and metadata.stored(key):
            # Some models have a number per layer here, as an array.
            return f"{metadata.stored(key)}"
        return _plain(metadata.get(key))

    architecture = one("general.architecture")
    facts = {"architecture": architecture, "name": one("general.name"), "size_label": one("general.size_label")}
    facts |= {name: one(key.format(architecture)) for name, key in _GGUF_FACTS}
    tokens = metadata.stored("tokenizer.ggml.tokens") if isinstance(metadata, GGUFMetadata) else None
    facts |= {"vocabulary": tokens.count if tokens else None, "tokenizer": one("tokenizer.ggml.model")}
    recipe = one("general.file_type")
    facts["file_type"] = FILE_TYPES.get(recipe, recipe) if isinstance(recipe, int) else recipe
    quantised = [row for row in range(len(description)) if description.dtype(row).name in GGML_QUANTISED]
    weights = sum(math.prod(description.shape(row)) for row in quantised)
    facts["bits_per_weight_of_quantised"] = _bits(sum(description.lengths[row] for row in quantised), weights)
    return _known(facts)


def _config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else config.get("model_type")
    text = config.get("text_config")
    # Models with several modalities describe the one that speaks in a part of its own.
    inner = text if isinstance(text, dict) else {}
    facts = {"architecture": _plain(architecture)}
    facts |= {name: _plain(config.get(key, inner.get(key))) for name, key in _CONFIG_FACTS}
    return _known(facts)


def _quantisation_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        return {}
    names = {"quantised_by": "quant_method", "version": "version", "bits_asked_for": "bits", "head_bits": "head_bits"}
    return _known({name: _plain(said.get(key)) for name, key in names.items()})


@dataclass(frozen=True, slots=True)
class _Linear:
    """One quantised matrix of an EXL2 or EXL3 model."""

    kind: str
    name: str
    rows: Sequence[int]
    weights: int
    nbytes: int


_EXL2_PARTS: Final[tuple[str, ...]] = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm")
_EXL3_PARTS: Final[tuple[str, ...]] = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1")
_TILE: Final = 16


def _linears(description: Description) -> list[_Linear]:
    """The quantised matrices: EXL2 by ``q_weight``, EXL3 by ``trellis``, each with what belongs to it."""
    found = []
    for row, name in enumerate(description.names):
        stem, _, last = name.rpartition(".")
        if last == "q_weight" and f"{stem}.q_invperm" in description:
            inputs = description.shape(description.row(f"{stem}.q_invperm"))
            kind, parts, weights = "EXL2", _EXL2_PARTS, math.prod(inputs) * description.shape(row)[-1]
        elif last == "trellis" and len(description.shape(row)) == 3:
            tiles = description.shape(row)[:2]
            kind, parts, weights = "EXL3", _EXL3_PARTS, math.prod(tiles) * _TILE**2
        else:
            continue
        rows = [description.row(f"{stem}.{part}") for part in parts if f"{stem}.{part}" in description]
        found.append(_Linear(kind, stem, rows, weights, sum(description.lengths[row] for row in rows)))
    return found


def _mix(linears: Sequence[_Linear]) -> tuple[QuantisedShare, ...]:
    """Matrices by bits for each weight, to a tenth of a bit."""
    counts: Counter[float] = Counter()
    weights: Counter[float] = Counter()
    sizes: Counter[float] = Counter()
    for linear in linears:
        bits = round(8 * linear.nbytes / linear.weights, 1) if linear.weights else 0.0
        counts[bits] += 1
        weights[bits] += linear.weights
        sizes[bits] += linear.nbytes
    return tuple(
        QuantisedShare(bits=bits, linears=counts[bits], weights=weights[bits], nbytes=size)
        for bits, size in sizes.most_common()
    )
