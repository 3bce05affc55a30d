"""GGUF files for tests and benchmarks, written by the package ``gguf``: single tensors of any type, and whole models.

Owns the smallest set of metadata and tensors that llama.cpp takes for a complete Llama. Needs the packages ``gguf`` and
numpy; contents follow from the seed alone.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from weightlift.errors import MissingExtraError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

_PART_ELEMENTS: Final = 1 << 20
_SPREAD: Final = 0.02
_SPECIAL_TOKENS: Final = (("<unk>", 2), ("<s>", 3), ("</s>", 3))
_BYTE_TOKEN: Final = 6
_NORMAL_TOKEN: Final = 1


class GGUFSpec(NamedTuple):
    """One tensor of a generated file.

    Attributes:
        name: its name.
        kind: the ggml type's name, such as ``Q4_K``.
        shape: its logical shape, outermost dimension first; rows hold whole blocks.
    """

    name: str
    kind: str
    shape: tuple[int, ...]


def _packages() -> tuple[Any, Any]:
    try:
        return importlib.import_module("gguf"), importlib.import_module("numpy")
    except ImportError as err:
        raise MissingExtraError(
            "writing GGUF files needs the package gguf", hint="pip install 'weightlift[gguf]'"
        ) from err


def write_gguf(
    path: str | os.PathLike[str],
    specs: Sequence[GGUFSpec],
    *,
    metadata: Mapping[str, Any] | None = None,
    architecture: str = "llama",
    alignment: int | None = None,
    split_tensors: int = 0,
    seed: int = 0,
) -> Path:
    """Write tensors of random bytes, of any ggml type.

    Floating point contents are random bits and may be no numbers: compare bytes.

    Args:
        path: the file; with ``split_tensors``, the parts lie beside it and are called ``STEM-00001-of-0000N.gguf``.
        specs: the tensors.
        metadata: further entries: numbers, booleans, text, and lists of them.
        architecture: what ``general.architecture`` says.
        alignment: alignment of the tensors' bytes; ``None`` leaves it to the format, which has 32.
        split_tensors: most tensors in a part; 0 for one file.
        seed: selects the contents.

    Returns:
        The file, or the first part.
    """
    gguf, numpy = _packages()
    target = Path(path)
    writer = gguf.GGUFWriter(target, architecture, split_max_tensors=split_tensors)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    random = numpy.random.default_rng(seed)
    for spec in specs:
        kind = gguf.GGMLQuantizationType[spec.kind]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        row = spec.shape[-1] // elements * size if spec.shape else size
        raw = random.integers(0, 256, (*spec.shape[:-1], row), dtype="uint8")
        writer.add_tensor(spec.name, raw, raw_dtype=kind)
    _write(writer)
    parts = -(-len(specs) // split_tensors) if split_tensors else 1
    return target.with_name(f"{target.stem}-00001-of-{parts:05}.gguf") if parts > 1 else target


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if 0 <= value < 1 << 32 else writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def write_llama_gguf(
    path: str | os.PathLike[str],
    *,
    kind: str = "Q8_0",
    layers: int = 2,
    hidden: int = 256,
    inner: int = 512,
    heads: int = 4,
    key_heads: int = 2,
    vocabulary: int = 512,
    context: int = 256,
    seed: int = 0,
) -> Path:
    """Write a complete Llama with random weights and a vocabulary of bytes, which llama.cpp loads and runs.

    Memory stays small whatever the size: matrices are written one by one, and large ones repeat a random part.

    Args:
        path: the file.
        kind: ggml type of the matrices, one that the package ``gguf`` quantises to; norms are F32, embeddings F16.
        layers: how many layers.
        hidden: width of the model, a multiple of the type's block and of ``heads``.
        inner: width between the two halves of a layer.
        heads: attention heads.
        key_heads: heads of keys and values.
        vocabulary: tokens, at least 259.
        context: context length.
        seed: selects the contents.

    Returns:
        The file.
    """
    gguf, numpy = _packages()
    writer = gguf.GGUFWriter(Path(path), "llama")
    _describe_llama(writer, layers=layers, hidden=hidden, inner=inner, context=context)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    _add_vocabulary(writer, vocabulary)
    keys = hidden // heads * key_heads
    matrices: dict[str, tuple[str, tuple[int, ...]]] = {"token_embd.weight": ("F16", (vocabulary, hidden))}
    for layer in range(layers):
        shapes = {
            "attn_q": (hidden, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        matrices |= {f"blk.{layer}.{name}_norm.weight": ("F32", (hidden,)) for name in ("attn", "ffn")}
        matrices |= {f"blk.{layer}.{name}.weight": (kind, shape) for name, shape in shapes.items()}
    matrices |= {"output_norm.weight": ("F32", (hidden,)), "output.weight": (kind, (vocabulary, hidden))}
    random = numpy.random.default_rng(seed)
    for name, (stored, shape) in matrices.items():
        _announce(writer, name, stored, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stored, shape in matrices.values():
        writer.write_tensor_data(_weights(random, stored, shape))
    writer.close()
    return Path(path)


def _describe_llama(writer: Any, *, layers: int, hidden: int, inner: int, context: int) -> None:
    writer.add_name("a Llama of random weights")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)


def _add_vocabulary(writer: Any, size: int) -> None:
    """The SentencePiece kind of vocabulary: three special tokens, the 256 bytes, and words for the rest."""
    bytes_ = [(f"<0x{value:02X}>", _BYTE_TOKEN) for value in range(256)]
    words = [(f"▁w{number}", _NORMAL_TOKEN) for number in range(size - len(_SPECIAL_TOKENS) - len(bytes_))]
    tokens = [*_SPECIAL_TOKENS, *bytes_, *words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types([kind for _, kind in tokens])
    for add, number in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(number)


def _announce(writer: Any, name: str, kind: str, shape: tuple[int, ...]) -> None:
    gguf, numpy = _packages()
    stored = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[stored]
    rows = (*shape[:-1], shape[-1] // elements * size)
    nbytes = int(numpy.prod(rows))
    if kind in {"F16", "F32"}:
        writer.add_tensor_info(name, shape, numpy.dtype("float16" if kind == "F16" else "float32"), nbytes)
    else:
        writer.add_tensor_info(name, rows, numpy.dtype("uint8"), nbytes, raw_dtype=stored)


def _weights(random: Any, kind: str, shape: tuple[int, ...]) -> Any:
    """Small random weights in a ggml type; norms near 1. Past a size they repeat."""
    gguf, numpy = _packages()
    if len(shape) == 1:
        return (1 + _SPREAD * random.standard_normal(shape)).astype("float32")
    rows = min(shape[0], max(1, _PART_ELEMENTS // shape[1]))
    part = (_SPREAD * random.standard_normal((rows, shape[1]))).astype("float32")
    stored = gguf.quants.quantize(part, gguf.GGMLQuantizationType[kind])
    return numpy.resize(stored, (shape[0], *stored.shape[1:]))
