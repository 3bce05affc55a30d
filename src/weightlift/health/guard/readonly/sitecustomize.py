"""Run by Python at its start: takes the right to write from checkpoints that torch maps privately.

Python imports a module of this name from ``PYTHONPATH`` before the program. This one waits for torch to be imported and
then wraps the calls that map a file: ``UntypedStorage.from_file``, by which safetensors and ``torch.load(mmap=True)``
map checkpoints, and ``torch.from_file``. After a private mapping was made, ``mprotect`` makes it read-only. GPU drivers
take the intent to write from that right, so their copies leave the pages of the file alone.

Needs the standard library alone, since it runs in other programs' environments. Another ``sitecustomize`` further down
the path still runs.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any

_PROT_READ = 1


def _make_readonly(address: int, nbytes: int) -> None:
    if address and nbytes:
        # A refusal leaves the mapping as the program made it.
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _PROT_READ)


def _is_shared(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    return bool(keywords.get("shared", arguments[1] if len(arguments) > 1 else False))


def _wrap(torch: Any) -> None:
    map_storage, map_tensor = torch.UntypedStorage.from_file, torch.from_file

    def from_file(*arguments: Any, **keywords: Any) -> Any:
        storage = map_storage(*arguments, **keywords)
        if not _is_shared(arguments, keywords):
            _make_readonly(storage.data_ptr(), storage.nbytes())
        return storage

    def tensor_from_file(*arguments: Any, **keywords: Any) -> Any:
        tensor = map_tensor(*arguments, **keywords)
        if not _is_shared(arguments, keywords):
            storage = tensor.untyped_storage()
            _make_readonly(storage.data_ptr(), storage.nbytes())
        return tensor

    torch.UntypedStorage.from_file = staticmethod(from_file)
    torch.from_file = tensor_from_file


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Lets the other finders find torch, and wraps its calls once it has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002 - the protocol's
        if name != "torch" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader = spec.loader if spec is not None else None
        if spec is None or loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _wrap(module)

        loader.exec_module = exec_module  # type: ignore[method-assign] # this one loader, for this one module
        return spec


def _run_the_next() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _AfterTorch())
_run_the_next()
