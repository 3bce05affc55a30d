"""The version, in the one place where it is written down."""

from typing import Final

__version__: Final = "0.1.0"
