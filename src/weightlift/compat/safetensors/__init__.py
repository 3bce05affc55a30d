"""The safetensors library's face: its names, its results and its refusals, with weightlift reading the bytes.

``from weightlift.compat.safetensors import safe_open`` in the place of ``from safetensors import safe_open`` is all a
program changes. What does not read files (saving, bytes in memory) is the library's own and needs it installed.
"""

from __future__ import annotations

import importlib
from typing import Any

from weightlift.compat.safetensors.handle import safe_open
from weightlift.compat.safetensors.prefetching import PrefetchLoader
from weightlift.compat.safetensors.refusals import SafetensorError, reference
from weightlift.compat.safetensors.slices import PySafeSlice, TensorMeta

_PASSED_THROUGH = ("TensorSpec", "deserialize", "serialize", "serialize_file")
_SUBMODULES = ("numpy", "torch")

__all__ = ["PrefetchLoader", "PySafeSlice", "SafetensorError", "TensorMeta", "safe_open"]


def __getattr__(name: str) -> Any:
    if name in _PASSED_THROUGH:
        return getattr(reference(""), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
