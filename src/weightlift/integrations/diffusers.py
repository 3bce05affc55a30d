"""diffusers: the weights of a model straight onto the devices of its ``device_map``.

diffusers loads a whole shard into host memory and moves it on tensor by tensor. Where a ``device_map`` says where they
go, the adapter loads the shard there and hands diffusers the finished dictionary, which it takes in place of a path.

A model in one file, as most are, is loaded before diffusers knows where its tensors go. It gets a dictionary whose
tensors are still in the file then, which is all it needs to rename and compare them, and they are loaded once their
devices are known.

Of a quantised checkpoint the same is true where its quantizer takes tensors as they are. One that quantises on the way,
or takes every tensor to the CPU first, gets views of the mapped file instead, and goes through them one by one: devices
need no room for a shard that is yet to be quantised, and no copy is made in host memory.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import os
from typing import TYPE_CHECKING, Any, Final, Unpack

from weightlift.api import load
from weightlift.api import open as open_checkpoint
from weightlift.compat.safetensors.refusals import refusing
from weightlift.errors import UnsupportedError, WeightliftError, printable
from weightlift.targets.frameworks import pick_framework, stored_shape
from weightlift.types import Framework, HeaderRules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from weightlift.api import Checkpoint
    from weightlift.description import TensorInfo
    from weightlift.integrations.replacing import Replacements
    from weightlift.keywords import LoadKeywords
    from weightlift.types import LoadReport

    Read = Callable[[str | os.PathLike[str] | Checkpoint, Mapping[str, str]], dict[str, Any]]

PACKAGE: Final = "diffusers"
MODULE: Final = "diffusers.models.modeling_utils"
KNOWN_VERSIONS: Final = ("0.42.",)

_PACKED: Final = ".quant_state.bitsandbytes__"
"""In the names of what bitsandbytes says about a matrix of 4 bits, which it unpacks on the CPU."""

_waits: contextvars.ContextVar[Callable[[Checkpoint], bool] | None]
_waits = contextvars.ContextVar("weightlift_diffusers", default=None)
"""Inside ``from_pretrained``: whether the tensors of a file can wait for their devices."""


class _InFile(dict[str, Any]):
    """What a file holds, as tensors without contents.

    Args:
        path: the file.
        checkpoint: what its header says.

    Attributes:
        path: the file.
        checkpoint: what its header says.
    """

    def __init__(self, path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
        maker = pick_framework(Framework.TORCH)
        super().__init__(
            (info.name, maker.empty(maker.stored_dtype(info.dtype), stored_shape(info.dtype, info.shape), "meta"))
            for info in checkpoint.description
        )
        self.path, self.checkpoint = path, checkpoint
        self._names = {id(tensor): name for name, tensor in self.items()}
        self._tensors = tuple(self.values())  # none may go, or another could come to have its number

    def names(self) -> dict[str, str]:
        """Of each of the file's tensors that is still here, its name there and what it is called by now.

        Raises:
            UnsupportedError: another was computed from them, which has no contents then.
        """
        for name, tensor in self.items():
            if tensor.device.type == "meta" and id(tensor) not in self._names:
                raise UnsupportedError(
                    f"{printable(str(self.path), 400)}: the model computes {printable(name)} from tensors of the file "
                    "before they are read",
                    hint="load it without a device_map and move it then, or outside weightlift.patch()",
                )
        return {self._names[id(tensor)]: name for name, tensor in self.items() if id(tensor) in self._names}


class _Adapter:
    """What takes the place of diffusers' functions.

    Args:
        module: diffusers' ``modeling_utils``.
        keywords: how to load.
        note: told of every load.
    """

    def __init__(self, module: ModuleType, keywords: LoadKeywords, note: Callable[[LoadReport], None]) -> None:
        self.from_pretrained = module.ModelMixin.__dict__["from_pretrained"].__func__
        self.load_state_dict, self.load_shard_file = module.load_state_dict, module._load_shard_file  # noqa: SLF001 - its seam
        loading = importlib.import_module(module.load_state_dict.__module__)
        self._device_of_parameter = loading._determine_param_device  # noqa: SLF001
        self._keywords, self._note = keywords, note

    def load(
        self, file: str | os.PathLike[str] | Checkpoint, called: Mapping[str, str], *, device_map: Any
    ) -> dict[str, Any]:
        """Load tensors of a file to where they go.

        Args:
            file: the file, or what its header says.
            called: which tensors, and what they are called in the model; all, and as in the file, if empty.
            device_map: devices by names of modules.

        Returns:
            Tensors by their names in the model.
        """

        def device_of(info: TensorInfo) -> str:
            if _PACKED in info.name:
                return "cpu"
            try:
                device = self._device_of_parameter(called.get(info.name, info.name), device_map)
            except ValueError:
                # Not one of the model's: diffusers says so itself.
                return "cpu"
            if device == "disk":
                return "cpu"
            return f"cuda:{device}" if isinstance(device, int) else str(device)

        return self._load(file, called, device=device_of)

    def map(self, file: str | os.PathLike[str] | Checkpoint, called: Mapping[str, str]) -> dict[str, Any]:
        """Tensors of a file as views of it, by their names in the model; arguments as for :meth:`load`."""
        return self._load(file, called, device="cpu", method="mmap")

    def _load(
        self, file: str | os.PathLike[str] | Checkpoint, called: Mapping[str, str], **chosen: Unpack[LoadKeywords]
    ) -> dict[str, Any]:
        names: LoadKeywords = {"names": list(called)} if called else {}
        options: LoadKeywords = {**self._keywords, **names, **chosen, "framework": "torch"}
        with refusing():
            loaded = load(file, **options)
        self._note(loaded.report)
        return {called.get(name, name): tensor for name, tensor in loaded.items()}

    @staticmethod
    def contents(state: _InFile, read: Read) -> dict[str, Any]:
        """What is left of a file with its contents, read in one of the ways above."""
        called = state.names()
        return dict(state) | (read(state.checkpoint, called) if called else {})

    def filled(self, state: _InFile) -> dict[str, Any]:
        """What is left of a file with its contents in host memory, as diffusers would have it."""
        contents, called = self.load_state_dict(state.path), state.names()
        return dict(state) | {name: contents[in_file] for in_file, name in called.items()}

    def in_file(self, path: Any, waits: Callable[[Checkpoint], bool]) -> _InFile | None:
        """What a file holds, if its tensors can wait and it can be read; if not, diffusers has sentences of its own."""
        try:
            checkpoint = open_checkpoint(path, header=self._keywords.get("header", HeaderRules.REFERENCE))
            return _InFile(path, checkpoint) if waits(checkpoint) else None
        except (WeightliftError, OSError):
            return None


def install(
    module: ModuleType,
    replacements: Replacements,
    keywords: LoadKeywords,
    note: Callable[[LoadReport], None],
) -> None:
    """Put the adapter in place.

    Args:
        module: diffusers' ``modeling_utils``.
        replacements: remembers what was replaced.
        keywords: how to load, as for :class:`~weightlift.options.LoadOptions`.
        note: told of every load that was made.
    """
    adapter = _Adapter(module, keywords, note)

    @functools.wraps(adapter.from_pretrained)
    def from_pretrained(cls: Any, *arguments: Any, **named: Any) -> Any:
        token = _waits.set(_always if named.get("device_map") is not None else _is_placed_by_bitsandbytes)
        try:
            return adapter.from_pretrained(cls, *arguments, **named)
        finally:
            _waits.reset(token)

    @functools.wraps(adapter.load_state_dict)
    def load_state_dict(checkpoint_file: Any, disable_mmap: bool = False, **named: Any) -> Any:  # noqa: FBT001, FBT002 - diffusers'
        waits = _waits.get()
        if waits is not None and not named and not disable_mmap and _is_safetensors(checkpoint_file):
            found = adapter.in_file(checkpoint_file, waits)
            if found is not None:
                return found
        return adapter.load_state_dict(checkpoint_file, disable_mmap, **named)

    @functools.wraps(adapter.load_shard_file)
    def _load_shard_file(shard_file: Any, *arguments: Any, device_map: Any = None, **named: Any) -> Any:
        quantizer = named.get("hf_quantizer")
        one_by_one = not arguments and named.get("low_cpu_mem_usage")
        read: Read | None = None
        if one_by_one and device_map and (quantizer is None or _takes_them_as_they_are(quantizer)):
            read = functools.partial(adapter.load, device_map=device_map)
        elif one_by_one and quantizer is not None and _can_be_mapped():
            read = adapter.map
        if isinstance(shard_file, _InFile):
            shard_file = adapter.filled(shard_file) if read is None else adapter.contents(shard_file, read)
        elif read is not None and _is_safetensors(shard_file) and not named.get("disable_mmap"):
            shard_file = read(shard_file, {})
        token = _waits.set(None)  # what is read from here on is needed at once
        try:
            return adapter.load_shard_file(shard_file, *arguments, device_map=device_map, **named)
        finally:
            _waits.reset(token)

    replacements.set(module.ModelMixin, "from_pretrained", classmethod(from_pretrained))
    replacements.replace(adapter.load_state_dict, load_state_dict)
    replacements.replace(adapter.load_shard_file, _load_shard_file)


def _is_safetensors(path: Any) -> bool:
    return isinstance(path, str | os.PathLike) and str(path).endswith(".safetensors")


def _always(_: Checkpoint) -> bool:
    return True


def _is_placed_by_bitsandbytes(checkpoint: Checkpoint) -> bool:
    """Whether a file was quantised by bitsandbytes, which chooses a device where none is given."""
    return any(_PACKED in name for name in checkpoint)


def _takes_them_as_they_are(quantizer: Any) -> bool:
    """Whether a quantizer leaves tensors on the device that they are on and does not change them.

    Not known of the others, and not so with 8 bits of bitsandbytes, of which every matrix goes to the CPU and back.
    """
    config: Any = getattr(quantizer, "quantization_config", None)
    method = getattr(getattr(config, "quant_method", None), "value", None)
    as_they_are = method in {"quanto", "torchao"} or (method == "bitsandbytes" and config.load_in_4bit)
    return bool(as_they_are and quantizer.pre_quantized)


def _can_be_mapped() -> bool:
    """Whether copies to devices may come out of mapped files; ROCm pins what it copies, and so a copy of the file."""
    torch = importlib.import_module("torch")
    return torch.version.hip is None
