"""vLLM: ``--load-format weightlift``, a loader of its own registry that streams weights to the device.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` in each of its processes. The loader
is a subclass of vLLM's default one and takes nothing from it but the reading: which files, which experts, which shards
of an encoder and which weights a model does not use are still vLLM's to say. Files that are not safetensors, and
loading strategies other than the lazy one, are left to vLLM altogether.
"""

from __future__ import annotations

import copy
import importlib
import re
from typing import TYPE_CHECKING, Any, Final

from weightlift.compat.safetensors.arguments import CPU
from weightlift.compat.safetensors.opened import OpenedFile
from weightlift.compat.safetensors.refusals import refusing
from weightlift.errors import UnsupportedError
from weightlift.integrations.sessions import join_tensors
from weightlift.integrations.versions import OVERRIDE, untested
from weightlift.options import LoadOptions
from weightlift.streaming import TensorStream
from weightlift.types import Framework

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightlift.keywords import LoadKeywords

PACKAGE: Final = "vllm"
KNOWN_VERSIONS: Final = ("0.33.",)
LOAD_FORMAT: Final = "weightlift"

OPTIONS: Final = ("method", "cache", "host_memory", "staging", "engine", "header", "workers", "chunk_bytes")
"""What ``model_loader_extra_config`` may hold besides vLLM's own keys."""


def register() -> None:
    """Register the load format with vLLM; may be called any number of times.

    vLLM calls this whenever it starts, whatever format is asked for, so it never fails: with a version of vLLM that
    this was not tried with, the format is there and refuses to be used.
    """
    registry: Any = importlib.import_module("vllm.model_executor.model_loader")
    if LOAD_FORMAT in getattr(registry, "_LOAD_FORMAT_TO_MODEL_LOADER", {}):
        return
    sentence = untested(PACKAGE, KNOWN_VERSIONS)
    made = make_loader_class() if sentence is None else _refusing_class(registry.BaseModelLoader, sentence)
    registry.register_model_loader(LOAD_FORMAT)(made)


def _refusing_class(base: Any, sentence: str) -> Any:
    class WeightliftModelLoader(base):  # type: ignore[misc] # a class of unknown type
        """Stands for the loader where it cannot be vouched for."""

        def __init__(self, load_config: Any) -> None:
            super().__init__(load_config)
            raise UnsupportedError(sentence, hint=f"set {OVERRIDE}=1 to try it with this version all the same")

        def download_model(self, model_config: Any) -> None:
            """See vLLM's ``BaseModelLoader``; never called."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            """See vLLM's ``BaseModelLoader``; never called."""

    return WeightliftModelLoader


def make_loader_class() -> Any:
    """The loader: a class made when vLLM is there to derive it from."""
    default: Any = importlib.import_module("vllm.model_executor.model_loader.default_loader")
    filters: Any = importlib.import_module("vllm.model_executor.model_loader.ep_weight_filter")

    class WeightliftModelLoader(default.DefaultModelLoader):  # type: ignore[misc] # a class of unknown type
        """vLLM's default loader over weightlift; see the module."""

        def __init__(self, load_config: Any) -> None:
            extra = load_config.model_loader_extra_config
            given = extra if isinstance(extra, dict) else {}
            self.keywords: LoadKeywords = {name: given[name] for name in OPTIONS if name in given}  # type: ignore[assignment]
            LoadOptions(**self.keywords)  # type: ignore[arg-type] # judged now, not when the weights are read
            # To the default loader these are files like any others, and its own options the only ones.
            own = copy.copy(load_config)
            own.load_format = "safetensors"
            if isinstance(extra, dict):
                own.model_loader_extra_config = {key: value for key, value in extra.items() if key not in OPTIONS}
            super().__init__(own)

        def _get_weights_iterator(self, source: Any) -> Any:
            if self.load_config.safetensors_load_strategy not in {None, "lazy"}:
                return super()._get_weights_iterator(source)
            read = default.safetensors_weights_iterator
            try:
                # Everything that the default loader decides, it decides in there.
                default.safetensors_weights_iterator = self._read
                return super()._get_weights_iterator(source)
            finally:
                default.safetensors_weights_iterator = read

        def _read(self, files: Sequence[str], use_tqdm: Any, *_: Any, local_expert_ids: Any = None, **__: Any) -> Any:
            del use_tqdm
            device = str(importlib.import_module("torch").get_default_device())

            def wanted(name: str) -> bool:
                return not filters.should_skip_weight(name, local_expert_ids)

            return stream_files(files, wanted, device, self.keywords)

    return WeightliftModelLoader


def stream_files(
    files: Sequence[str], wanted: Callable[[str], bool], device: str, keywords: LoadKeywords
) -> Iterator[tuple[str, Any]]:
    """The tensors of several files one after the other, in the order of the files' numbers.

    Args:
        files: safetensors files.
        wanted: which tensors, by name; the others are not read.
        device: where they go.
        keywords: how to load, as for :class:`~weightlift.options.LoadOptions`.

    Raises:
        SafetensorError: a file breaks a rule of the format.
    """
    opened = [OpenedFile(path, Framework.TORCH, CPU, strict=False, keywords={}) for path in sorted(files, key=_natural)]
    chosen = [(file, row) for file in opened for row, name in enumerate(file.description.names) if wanted(name)]
    if not chosen:
        return
    description, _ = join_tensors(chosen)
    names = [file.description.names[row] for file, row in chosen]
    options = LoadOptions(**{**keywords, "device": device, "framework": Framework.TORCH})  # type: ignore[arg-type]
    with refusing(), TensorStream(description, range(len(description)), options) as stream:
        # The same order, but the names as they are in the files, should two of them hold the same.
        for name, (_, tensor) in zip(names, stream, strict=True):
            yield name, tensor


def _natural(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]
