"""weightlift moves model weights from storage into memory at the speed of the slowest wire on the way.

>>> import weightlift as wl
>>> state = wl.load("path/to/model")            # doctest: +SKIP
>>> state.report.reason                         # doctest: +SKIP

Names are imported when first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weightlift._version import __version__

if TYPE_CHECKING:
    from weightlift import errors
    from weightlift.api import Checkpoint, StateDict, fit, load, load_into, make_manifest, open, stream, verify
    from weightlift.description import TensorInfo
    from weightlift.device_staging import release_pinned_memory
    from weightlift.errors import WeightliftError
    from weightlift.fitting import FitReport
    from weightlift.integrations.patching import patch
    from weightlift.integrity import Verification
    from weightlift.manifest import Manifest
    from weightlift.modules import LoadIntoResult
    from weightlift.options import LoadOptions
    from weightlift.recording import Recording
    from weightlift.streaming import TensorStream
    from weightlift.types import LoadReport

_HOMES = {
    "Checkpoint": "weightlift.api",
    "FitReport": "weightlift.fitting",
    "LoadIntoResult": "weightlift.modules",
    "LoadOptions": "weightlift.options",
    "LoadReport": "weightlift.types",
    "Manifest": "weightlift.manifest",
    "Recording": "weightlift.recording",
    "StateDict": "weightlift.api",
    "TensorInfo": "weightlift.description",
    "TensorStream": "weightlift.streaming",
    "Verification": "weightlift.integrity",
    "WeightliftError": "weightlift.errors",
    "fit": "weightlift.api",
    "load": "weightlift.api",
    "load_into": "weightlift.api",
    "make_manifest": "weightlift.api",
    "open": "weightlift.api",
    "patch": "weightlift.integrations.patching",
    "release_pinned_memory": "weightlift.device_staging",
    "stream": "weightlift.api",
    "verify": "weightlift.api",
}

__all__ = [
    "Checkpoint",
    "FitReport",
    "LoadIntoResult",
    "LoadOptions",
    "LoadReport",
    "Manifest",
    "Recording",
    "StateDict",
    "TensorInfo",
    "TensorStream",
    "Verification",
    "WeightliftError",
    "__version__",
    "errors",
    "fit",
    "load",
    "load_into",
    "make_manifest",
    "open",
    "patch",
    "release_pinned_memory",
    "stream",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("weightlift.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'weightlift' has no attribute {name!r}")
    from weightlift.collector import MANY, collector_resting

    # A hundred modules are many new objects, which would have the collector go through all that torch has made.
    with collector_resting(MANY):
        value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
