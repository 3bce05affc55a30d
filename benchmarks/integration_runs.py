"""One load of a framework in a process of its own, with its own loader or with weightlift underneath.

Knows how each framework is asked to load and what is measured meanwhile; nothing of checkpoints, repeats or results.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from peak import PeakMemory

from weightlift.bench.cache_states import ModelFiles
from weightlift.health.cache.files import find_files

if TYPE_CHECKING:
    from collections.abc import Iterator


def digest(logits: Any) -> str:
    """A digest of logits, bit by bit."""
    return hashlib.sha256(logits.float().cpu().contiguous().numpy().tobytes()).hexdigest()


@contextlib.contextmanager
def timed(record: dict[str, Any], name: str, device: str) -> Iterator[None]:
    """Seconds until everything that was started has ended."""
    import torch

    synchronise: Any = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronise()
    begin = time.perf_counter()
    yield
    synchronise()
    record[name] = time.perf_counter() - begin


def run_transformers(request: dict[str, Any]) -> dict[str, Any]:
    """``from_pretrained`` onto the device, and the logits of a few tokens."""
    import torch
    import transformers
    from transformers import modeling_utils

    device, folder = request["device"], request["folder"]
    record: dict[str, Any] = {}
    llama: Any = transformers.LlamaForCausalLM
    config = transformers.AutoConfig.from_pretrained(folder)
    # A model without weights has been made once, and the device used, before anything is measured.
    with torch.device("meta"):
        llama(config)
    torch.ones(1024, 1024, device=device).sum().item()
    owner, method = modeling_utils.PreTrainedModel, "_load_pretrained_model"
    inner = getattr(owner, method)

    def load_weights(*arguments: Any, **named: Any) -> Any:
        with timed(record, "weights_seconds", device):
            return inner(*arguments, **named)

    setattr(owner, method, staticmethod(load_weights))
    patch: Any = contextlib.nullcontext()
    if request["subject"] == "weightlift":
        import weightlift

        patch = weightlift.patch(**request["options"])
    with patch, PeakMemory() as sampler, timed(record, "seconds", device):
        model = llama.from_pretrained(folder, device_map=device, dtype="auto")
    record["anonymous_growth_bytes"] = sampler.growth
    if request["subject"] == "weightlift":
        report = patch.reports[-1]
        record["report"] = report.to_json() | {"digest": {}}
        record["replaced"] = list(patch.replaced)
    model.eval()
    with torch.no_grad():
        tokens = torch.arange(3, 67, device=device)[None]
        record["logits"] = digest(model(tokens).logits)
    record["device_peak_bytes"] = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return record


def run_exllamav2(request: dict[str, Any]) -> dict[str, Any]:
    """ExLlamaV2's own load with its own loader or ours, and the logits of a few tokens."""
    import torch
    from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config

    record: dict[str, Any] = {}
    config = ExLlamaV2Config(request["folder"])
    config.max_seq_len = config.max_input_len = 256
    if request["options"].get("fasttensors"):
        config.fasttensors = True
    installed: Any = contextlib.nullcontext()
    if request["subject"] == "weightlift":
        from weightlift.integrations import exllamav2

        installed = exllamav2.install()
    torch.ones(1024, 1024, device="cuda:0").sum().item()
    model = ExLlamaV2(config)
    with installed as found, PeakMemory() as sampler, timed(record, "seconds", "cuda:0"):
        model.load()
    record["anonymous_growth_bytes"] = sampler.growth
    if found is not None:
        record["loads"] = found.loads
        record["report"] = found.report.to_json()
    cache = ExLlamaV2Cache(model, max_seq_len=256)
    with torch.inference_mode():
        record["logits"] = digest(model.forward(torch.arange(3, 67)[None], cache))
    return record


class Reading:
    """Seconds that ExLlamaV3's extension, or what stands in for it, spends on reading inside the block.

    Args:
        loader: the module that calls the extension.
    """

    FUNCTIONS = ("stloader_read", "stloader_deferred_batch")

    def __init__(self, loader: Any) -> None:
        self.seconds = 0.0
        self._loader, self._extension = loader, loader.ext

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._extension, name)
        if name not in self.FUNCTIONS:
            return function

        def timed_function(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed_function

    def __enter__(self) -> Self:
        self._loader.ext = self
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.ext = self._extension


def run_exllamav3(request: dict[str, Any]) -> dict[str, Any]:
    """ExLlamaV3's own load with its own reader or ours, and the logits of a few tokens."""
    import torch
    from exllamav3 import Config, Model

    record: dict[str, Any] = {}
    installed: Any = contextlib.nullcontext()
    if request["subject"] == "weightlift":
        from weightlift.integrations import exllamav3

        installed = exllamav3.install()
    torch.ones(1024, 1024, device="cuda:0").sum().item()
    # Files are opened with the configuration, so the reader has to be in place by then.
    with installed as found:
        model = Model.from_config(Config.from_directory(request["folder"]))
        reading = Reading(importlib.import_module("exllamav3.loader.safetensors"))
        with reading, PeakMemory() as sampler, timed(record, "seconds", "cuda:0"):
            model.load(device="cuda:0")
    record["weights_seconds"] = reading.seconds
    record["anonymous_growth_bytes"] = sampler.growth
    if found is not None:
        record["loads"] = found.loads
        record["report"] = found.report.to_json()
    with torch.inference_mode():
        record["logits"] = digest(model.forward(torch.arange(3, 67)[None], {"attn_mode": "flash_attn_nc"}))
    return record


def try_extension(request: dict[str, Any]) -> dict[str, Any]:
    """Whether a framework's compiled extension can be had here; building it may take minutes, once."""
    name = request["framework"].removeprefix("try ")
    extension = getattr(importlib.import_module(f"{name}.ext"), f"{name}_ext")
    return {"extension": Path(getattr(extension, "__file__", "built in")).name}


RUNS = {
    "transformers": run_transformers,
    "exllamav2": run_exllamav2,
    "exllamav3": run_exllamav3,
    "try exllamav2": try_extension,
    "try exllamav3": try_extension,
}


def worker(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request; a failure is a result too."""
    folder = Path(request["folder"])
    try:
        record = RUNS[request["framework"]](request)
    except BaseException as err:  # noqa: BLE001 - recorded, so that the other runs go on
        return {"error": f"{type(err).__name__}: {err}"[:2000], "traceback": traceback.format_exc()[-3000:]}
    record["cached_after_bytes"] = ModelFiles(find_files(sorted(folder.glob("*.safetensors")))).cached_bytes()
    return record
