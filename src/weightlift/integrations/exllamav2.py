"""ExLlamaV2: every weight goes through weightlift, a module's weights together.

All of its weights come through one method, ``STFile.get_tensor``, which reads one tensor at a time into a buffer as
large as the tensor. Here a request brings what is stored beside it, in the same module of the model and for the same
device; its companions wait until they are asked for, which is the next thing that happens. A request for another
device, as after running out of memory on one, drops what waits. Tensors are private and writable, since ExLlamaV2 edits
them in place.

``config.fasttensors``, ``-fst`` and ``EXLLAMA_FASTTENSORS``, which ExLlamaV2 0.3 no longer acts on, mean direct reads,
past the page cache.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from typing import TYPE_CHECKING, Any, Final, Unpack

from weightlift.compat.safetensors.arguments import CPU
from weightlift.compat.safetensors.opened import OpenedFile
from weightlift.integrations.installing import Installed
from weightlift.integrations.versions import missing, require_known
from weightlift.options import LoadOptions
from weightlift.standing import PartLoads
from weightlift.types import Framework

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.keywords import LoadKeywords
    from weightlift.types import LoadReport

PACKAGE: Final = "exllamav2"
KNOWN_VERSIONS: Final = ("0.3.2",)

_GROUP_BYTES: Final = 1 << 30
"""Most bytes that are brought along with a tensor."""

_CONVERTED_GROUP_BYTES: Final = 128 << 20
"""The same where ExLlamaV2 converts each tensor to another type, so that both are there at once."""

_QUANTISED: Final = (".q_weight", ".qweight")
"""How the weights of quantised linears end, EXL2's and GPTQ's."""


def install(*, allow_untested: bool = False, **keywords: Unpack[LoadKeywords]) -> Installed:
    """Have ExLlamaV2 load through weightlift from now on, models that are being loaded included.

    Args:
        allow_untested: go on with any version of ExLlamaV2.
        **keywords: how to load, as for :class:`~weightlift.options.LoadOptions`; ``method`` beats its own settings.

    Returns:
        What was replaced; ``undo`` takes it back.

    Raises:
        UnsupportedError: ExLlamaV2 is of a version that this was not tried with.
        MissingExtraError: it is not installed.
        OptionError: an option is not possible.
    """
    require_known(PACKAGE, KNOWN_VERSIONS, allow_untested=allow_untested)
    LoadOptions(**keywords)  # type: ignore[arg-type] # judged now, not in the middle of a model
    try:
        stloader = importlib.import_module("exllamav2.stloader")
        model_init = importlib.import_module("exllamav2.model_init")
        module = importlib.import_module("exllamav2.module")
    except ImportError as err:
        raise missing(PACKAGE, PACKAGE) from err
    installed = Installed()
    reader = _Reader(keywords, installed.note)
    installed.on_undo = reader.close
    _replace(installed, reader, stloader, module)
    _follow_the_command_line(installed, reader, model_init)
    return installed


def _replace(installed: Installed, reader: _Reader, stloader: Any, module: Any) -> None:
    convert_dtype, cleanup = stloader.convert_dtype, stloader.cleanup_stfiles
    load_multi = module.ExLlamaV2Module.load_multi

    def get_tensor(self: Any, key: str, device: Any, out_dtype: Any = None) -> Any:
        entry = self.header[key]
        convert_dtype(entry["dtype"])  # refuses what ExLlamaV2 does not know
        name = self.tensor_remap[key] if self.tensor_remap else key
        tensor = reader.tensor(self.filename, name, str(device))
        return tensor.to(out_dtype) if out_dtype else tensor

    @functools.wraps(load_multi)
    def load_multi_as_configured(self: Any, *arguments: Any, **named: Any) -> Any:
        reader.configured = bool(getattr(self.model.config, "fasttensors", False))
        return load_multi(self, *arguments, **named)

    @functools.wraps(cleanup)
    def cleanup_stfiles() -> None:
        reader.close()
        cleanup()

    installed.replacements.set(stloader.STFile, "get_tensor", get_tensor)
    installed.replacements.set(module.ExLlamaV2Module, "load_multi", load_multi_as_configured)
    installed.replacements.replace(cleanup, cleanup_stfiles)


def _follow_the_command_line(installed: Installed, reader: _Reader, model_init: Any) -> None:
    init = model_init.init

    @functools.wraps(init)
    def init_as_told(args: Any, *arguments: Any, **named: Any) -> Any:
        reader.told = bool(getattr(args, "fast_safetensors", False))
        return init(args, *arguments, **named)

    installed.replacements.replace(init, init_as_told)


class _Reader:
    """Files that are open, and what was read along with the latest request.

    Args:
        keywords: how to load.
        note: told of every load.

    Attributes:
        configured: the model being loaded has ``fasttensors`` set.
        told: ``-fst`` was given.
    """

    def __init__(self, keywords: LoadKeywords, note: Callable[[LoadReport], None]) -> None:
        self._keywords = keywords
        self._loads = PartLoads(note)
        self._lock = threading.RLock()
        self._files: dict[str, OpenedFile] = {}
        self._groups: dict[str, dict[str, list[int]]] = {}
        self._waiting: dict[tuple[str, str, str], Any] = {}
        self._rearranged: set[str] = set()
        self.configured = self.told = False

    def _options(self, device: str) -> LoadOptions:
        keywords: LoadKeywords = {**self._keywords, "device": device, "framework": Framework.TORCH}
        # Its own variable, so it is not in the table of ours.
        fast = self.configured or self.told or bool(os.environ.get("EXLLAMA_FASTTENSORS"))
        if fast and "method" not in self._keywords:
            keywords["method"] = "direct"
        return LoadOptions(**keywords)  # type: ignore[arg-type]

    def tensor(self, filename: str, name: str, device: str) -> Any:
        """A tensor on its device, and its companions on the way.

        Raises:
            WeightliftError: see :mod:`weightlift.errors`.
            torch.OutOfMemoryError: the device has no room for it.
        """
        with self._lock:
            found = self._waiting.pop((filename, name, device), None)
            if found is not None:
                return found
            self._waiting.clear()
            file = self._open(filename)
            rows = self._companions(filename, file, file.description.row(name), device)
            loaded = self._loads.rows(file.description, rows, self._options(device))
            self._waiting.update(((filename, other, device), tensor) for other, tensor in loaded)
            return self._waiting.pop((filename, name, device))

    def _open(self, filename: str) -> OpenedFile:
        file = self._files.get(filename)
        if file is None:
            file = self._files[filename] = OpenedFile(filename, Framework.TORCH, CPU, strict=False, keywords={})
            groups: dict[str, list[int]] = {}
            for row, name in enumerate(file.description.names):
                groups.setdefault(_group(name), []).append(row)
            self._groups[filename] = groups
        return file

    def _companions(self, filename: str, file: OpenedFile, row: int, device: str) -> list[int]:
        description = file.description
        group = self._groups[filename][_group(description.names[row])]
        if device == "cpu":
            # Quantised linears are rearranged there; fused weights are cut up there, read anew for each part.
            linear = _linear(description.names[row])
            group = [other for other in group if _linear(description.names[other]) == linear]
            if not any(description.names[other].endswith(_QUANTISED) for other in group):
                return [row]
            self._rearranged.add(_in_every_layer(linear))
        elif self._rearranged:
            # What went to the CPU in one layer will in the next, and is not read for the device as well.
            names, apart = description.names, self._rearranged
            group = [other for other in group if other == row or _in_every_layer(_linear(names[other])) not in apart]
        room = _GROUP_BYTES
        if any(description.dtype(other).name in {"BF16", "F32"} for other in group):
            room = _CONVERTED_GROUP_BYTES
        room -= description.lengths[row]
        rows = [row]
        # Those that follow first: what came before has most likely been asked for already.
        place = group.index(row)
        for other in (*group[place + 1 :], *group[:place]):
            room -= description.lengths[other]
            if room < 0:
                break
            rows.append(other)
        return sorted(rows)

    def close(self) -> None:
        """Drop what waits and close the files."""
        with self._lock:
            self._loads.close()
            self._waiting.clear()
            self._files.clear()
            self._groups.clear()
            self._rearranged.clear()


def _group(name: str) -> str:
    """The module of the model that a tensor belongs to: its linear's parent, such as ``model.layers.3.mlp``."""
    return name.rsplit(".", 2)[0]


def _linear(name: str) -> str:
    """The linear that a tensor belongs to, such as ``model.layers.3.mlp.up_proj``."""
    return name.rpartition(".")[0]


def _in_every_layer(linear: str) -> str:
    """What a linear is called in every layer, such as ``model.layers.*.mlp.up_proj``."""
    return ".".join("*" if part.isdigit() else part for part in linear.split("."))
