"""The peak of a process's anonymous memory, sampled from outside.

A thread of the process itself would look less often the busier the process is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

SAMPLE_SECONDS = 0.002

SAMPLER = """
import sys, time
path, most = f"/proc/{sys.argv[1]}/status", 0
print("ready", flush=True)
while True:
    try:
        with open(path) as file:
            for line in file:
                if line.startswith("RssAnon"):
                    most = max(most, int(line.split()[1]) * 1024)
    except OSError:
        break
    sys.stderr.write(f"{most}\\n")
    time.sleep(float(sys.argv[2]))
"""


class PeakMemory:
    """The growth of this process's anonymous memory inside a ``with`` block, looked at from another process.

    Attributes:
        before: bytes when the block began.
        growth: most bytes above that; known when the block has ended.
    """

    def __enter__(self) -> Self:
        command = [sys.executable, "-c", SAMPLER, str(os.getpid()), str(SAMPLE_SECONDS)]
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self.before = anonymous_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(2 * SAMPLE_SECONDS)
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        numbers = [int(line) for line in self._log if line.strip().isdigit()]
        self.growth = max(numbers, default=self.before) - self.before
        self._log.close()


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0
