"""weightlift moves model weights from storage into memory at the speed of the slowest wire on the way.

>>> import weightlift as wl
>>> state = wl.load("path/to/model")            # doctest: +SKIP
>>> state.report.reason                         # doctest: +SKIP
"""

from weightlift import errors
from weightlift._version import __version__
from weightlift.api import Checkpoint, StateDict, load, load_into, open, stream
from weightlift.description import TensorInfo
from weightlift.errors import WeightliftError
from weightlift.options import LoadOptions
from weightlift.types import LoadReport

__all__ = [
    "Checkpoint",
    "LoadOptions",
    "LoadReport",
    "StateDict",
    "TensorInfo",
    "WeightliftError",
    "__version__",
    "errors",
    "load",
    "load_into",
    "open",
    "stream",
]
