"""diffusers: the weights of a model straight onto the devices of its ``device_map``.

diffusers loads a whole shard into host memory and moves it on tensor by tensor. Where a ``device_map`` says where they
go, the adapter loads the shard there and hands diffusers the finished dictionary, which it takes in place of a path.
Quantised models, which diffusers moves itself, keep its own way.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, Final

from weightlift.api import load
from weightlift.compat.safetensors.refusals import refusing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from weightlift.api import StateDict
    from weightlift.description import TensorInfo
    from weightlift.integrations.replacing import Replacements
    from weightlift.keywords import LoadKeywords
    from weightlift.types import LoadReport

PACKAGE: Final = "diffusers"
MODULE: Final = "diffusers.models.model_loading_utils"
KNOWN_VERSIONS: Final = ("0.42.",)


def install(
    module: ModuleType,
    replacements: Replacements,
    keywords: LoadKeywords,
    note: Callable[[LoadReport], None],
) -> None:
    """Put the adapter in place.

    Args:
        module: diffusers' ``model_loading_utils``.
        replacements: remembers what was replaced.
        keywords: how to load, as for :class:`~weightlift.options.LoadOptions`.
        note: told of every load that was made.
    """
    original, determine_device = module._load_shard_file, module._determine_param_device  # noqa: SLF001 - its seam

    @functools.wraps(original)
    def _load_shard_file(shard_file: Any, *arguments: Any, device_map: Any = None, **named: Any) -> Any:
        if device_map and not arguments and named.get("low_cpu_mem_usage") and _is_ours(shard_file, named):
            state = _load(shard_file, device_map, determine_device, keywords)
            note(state.report)
            shard_file = dict(state)
        return original(shard_file, *arguments, device_map=device_map, **named)

    replacements.replace(original, _load_shard_file)


def _is_ours(shard_file: Any, named: Mapping[str, Any]) -> bool:
    return (
        isinstance(shard_file, str | os.PathLike)
        and str(shard_file).endswith(".safetensors")
        and named.get("hf_quantizer") is None
        and not named.get("disable_mmap")
    )


def _load(shard_file: Any, device_map: Any, determine_device: Any, keywords: LoadKeywords) -> StateDict[Any]:
    def device_of(info: TensorInfo) -> str:
        try:
            device = determine_device(info.name, device_map)
        except ValueError:
            # Not one of the model's: diffusers says so itself.
            return "cpu"
        if device == "disk":
            return "cpu"
        return f"cuda:{device}" if isinstance(device, int) else str(device)

    with refusing():
        options: LoadKeywords = {**keywords, "device": device_of, "framework": "torch"}
        return load(shard_file, **options)
