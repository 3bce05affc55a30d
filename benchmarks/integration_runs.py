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
from typing import TYPE_CHECKING, Any

from peak import PeakMemory

from weightlift.bench.cache_states import ModelFiles
from weightlift.health.cache.files import find_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

COMPILED = ("exllamav2", "exllamav3")
"""Packages that are of no use without their extensions."""


def digest(logits: Any) -> str:
    """A digest of logits, bit by bit."""
    return hashlib.sha256(logits.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def checksum(tensors: Mapping[str, Any]) -> str:
    """A digest of tensors of two bytes an element, added up where they are: of names, values and where those stand."""
    import torch

    sums = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.flatten().view(torch.int16).to(torch.int64)
        places = torch.arange(len(values), device=values.device)
        sums.update(f"{name} {int(values.sum())} {int((values * places).sum())};".encode())
    return sums.hexdigest()


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
    with patched(request) as patch, PeakMemory() as sampler, timed(record, "seconds", device):
        model = llama.from_pretrained(folder, device_map=device, dtype="auto")
    record["anonymous_growth_bytes"] = sampler.growth
    if patch is not None:
        record["report"] = patch.reports[-1].to_json() | {"digest": {}}
        record["replaced"] = list(patch.replaced)
    model.eval()
    with torch.no_grad():
        tokens = torch.arange(3, 67, device=device)[None]
        record["outcome"] = digest(model(tokens).logits)
    record["device_peak_bytes"] = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return record


def patched(request: dict[str, Any]) -> Any:
    """weightlift under the safetensors library where that is what is measured, and the library alone where not."""
    if request["subject"] == "stock":
        return contextlib.nullcontext()
    import weightlift

    return weightlift.patch(**request["options"])


def run_diffusers(request: dict[str, Any]) -> dict[str, Any]:
    """``from_pretrained`` of a diffusion model onto the device, and what it makes of a little noise."""
    import diffusers
    import torch

    device, folder = request["device"], request["folder"]
    record: dict[str, Any] = {}
    # What diffusers imports once it makes a model has been imported, and the device used, before anything is measured.
    with torch.device("meta"):
        diffusers.UNet2DConditionModel()
    torch.ones(1024, 1024, device=device).sum().item()
    with patched(request) as patch, PeakMemory() as sampler, timed(record, "seconds", device):
        model = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16, device_map=device)
    record["anonymous_growth_bytes"] = sampler.growth
    if patch is not None:
        record["reports"] = [report.to_json() for report in patch.reports]
    torch.manual_seed(0)
    noise, context = torch.randn(1, 4, 32, 32), torch.randn(1, 77, model.config.cross_attention_dim)
    with torch.no_grad():
        made = model(*(one.to(device, torch.float16) for one in (noise, torch.tensor(7.0), context)))
    record["outcome"] = digest(made.sample)
    # Where what it makes differs, this tells whether its weights do.
    record["weights"] = checksum(model.state_dict())
    return record


def run_safetensors(request: dict[str, Any]) -> dict[str, Any]:
    """``load_file`` of every shard onto the device."""
    import safetensors.torch
    import torch

    device = request["device"]
    record: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    torch.ones(1024, 1024, device=device).sum().item()
    with patched(request), PeakMemory() as sampler, timed(record, "seconds", device):
        for file in sorted(Path(request["folder"]).glob("*.safetensors")):
            tensors |= safetensors.torch.load_file(file, device=device)
    record["anonymous_growth_bytes"] = sampler.growth
    record["outcome"] = checksum(tensors)
    return record


def run_vllm(request: dict[str, Any]) -> dict[str, Any]:
    """vLLM's default loader, and ours out of its registry, filling parameters that are on the device already."""
    import safetensors
    import torch
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    from weightlift.integrations import vllm

    vllm.register()
    device, folder = request["device"], Path(request["folder"])
    record: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                like = opened.get_slice(name)
                parameters[name] = torch.empty(like.get_shape(), dtype=torch.float16, device=device)

    class Model(torch.nn.Module):
        """What vLLM asks of a model: to take its weights one by one, which it copies into its parameters."""

        def load_weights(self, weights: Any) -> None:
            for name, tensor in weights:
                parameters[name].copy_(tensor)

    class Asked:
        """The part of vLLM's model configuration that loading looks at."""

        model, revision, quantization, multimodal_config, is_moe = str(folder), None, None, None, False

    load_format = "safetensors" if request["subject"] == "stock" else "weightlift"
    loader: Any = get_model_loader(LoadConfig(load_format=load_format, use_tqdm_on_load=False))
    engine = VllmConfig(device_config=DeviceConfig("cpu"))  # no kernels are asked for
    with (
        set_current_vllm_config(engine),
        torch.device(device),
        PeakMemory() as sampler,
        timed(record, "seconds", device),
    ):
        loader.load_weights(Model(), Asked())
    record["anonymous_growth_bytes"] = sampler.growth
    record["outcome"] = checksum(parameters)
    return record


@contextlib.contextmanager
def timed_calls(record: dict[str, Any], name: str, owner: Any, *attributes: str) -> Iterator[None]:
    """Seconds spent in some functions inside the block; what they leave under way on a device is not waited for."""
    functions = {attribute: getattr(owner, attribute) for attribute in attributes}
    record[name] = 0.0

    def timing(function: Any) -> Any:
        def timed_function(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                record[name] += time.perf_counter() - begin

        return timed_function

    for attribute, function in functions.items():
        setattr(owner, attribute, timing(function))
    try:
        yield
    finally:
        for attribute, function in functions.items():
            setattr(owner, attribute, function)


def run_exllamav2(request: dict[str, Any]) -> dict[str, Any]:
    """ExLlamaV2's own load with its own loader or ours, and the logits of a few tokens."""
    import torch
    from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config
    from exllamav2.stloader import STFile

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
    with (
        installed as found,
        timed_calls(record, "weights_seconds", STFile, "get_tensor"),
        PeakMemory() as sampler,
        timed(record, "seconds", "cuda:0"),
    ):
        model.load()
    record["anonymous_growth_bytes"] = sampler.growth
    if found is not None:
        record["loads"] = found.loads
        record["report"] = found.report.to_json()
    cache = ExLlamaV2Cache(model, max_seq_len=256)
    with torch.inference_mode():
        record["outcome"] = digest(model.forward(torch.arange(3, 67)[None], cache))
    return record


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
        reader = importlib.import_module("exllamav3.loader.safetensors").ext
        reading = timed_calls(record, "weights_seconds", reader, "stloader_read", "stloader_deferred_batch")
        with reading, PeakMemory() as sampler, timed(record, "seconds", "cuda:0"):
            model.load(device="cuda:0")
    record["anonymous_growth_bytes"] = sampler.growth
    if found is not None:
        record["loads"] = found.loads
        record["report"] = found.report.to_json()
    with torch.inference_mode():
        record["outcome"] = digest(model.forward(torch.arange(3, 67)[None], {"attn_mode": "flash_attn_nc"}))
    return record


def try_package(request: dict[str, Any]) -> dict[str, Any]:
    """Whether a framework can be had here, with its compiled extension; building that may take minutes, once."""
    name = request["framework"].removeprefix("try ").split()[0]
    if name not in COMPILED:
        return {"package": getattr(importlib.import_module(name), "__version__", "unknown")}
    extension = getattr(importlib.import_module(f"{name}.ext"), f"{name}_ext")
    return {"extension": Path(getattr(extension, "__file__", "built in")).name}


RUNS = {
    "transformers": run_transformers,
    "diffusers": run_diffusers,
    "safetensors": run_safetensors,
    "vllm": run_vllm,
    "exllamav2": run_exllamav2,
    "exllamav2 exl2": run_exllamav2,
    "exllamav3": run_exllamav3,
}


def worker(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request; a failure is a result too."""
    folder = Path(request["folder"])
    try:
        framework = request["framework"]
        record = (try_package if framework.startswith("try ") else RUNS[framework])(request)
    except BaseException as err:  # noqa: BLE001 - recorded, so that the other runs go on
        return {"error": f"{type(err).__name__}: {err}"[:2000], "traceback": traceback.format_exc()[-3000:]}
    record["cached_after_bytes"] = ModelFiles(find_files(sorted(folder.glob("*.safetensors")))).cached_bytes()
    return record
