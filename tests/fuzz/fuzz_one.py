"""Fuzz one target with atheris until libFuzzer's limits are reached; started by ``run.py``.

``python fuzz_one.py TARGET [libFuzzer's arguments]``. Besides what the target asserts, an input may take no more than a
few seconds of the processor and some memory; libFuzzer itself ends a process that hangs or grows.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["weightlift"]):
    import fuzz_targets

SECONDS_MAX: Final = 3.0
GROWTH_BYTES_MAX: Final = 128 << 20


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Fuzz until a finding or a limit; does not return."""
    target = fuzz_targets.TARGETS[sys.argv.pop(1)]
    folder = Path(tempfile.mkdtemp(prefix="weightlift-fuzz-", dir=tempfile.gettempdir()))
    # The reference parser and others import what they need on the first call.
    target.examine(b"", folder)

    def examine(content: bytes) -> None:
        begun, peak = time.process_time(), _peak_bytes()
        target.examine(content, folder)
        seconds, growth = time.process_time() - begun, _peak_bytes() - peak
        assert seconds < SECONDS_MAX, f"took {seconds:.1f} s"
        assert growth < GROWTH_BYTES_MAX, f"took {growth:,} bytes"

    atheris.Setup(sys.argv, examine)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
