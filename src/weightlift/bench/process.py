"""The measuring side's end of the talk with one worker process: starting, hearing, ending it, watching its memory.

Knows nothing of loaders, cache states or rounds. A worker never outlives the ``with`` block it was started in.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from weightlift.host.processes import ProcessUse, process_use

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SAMPLE_SECONDS: Final = 0.005
_WAIT_SECONDS: Final = 0.1
START_SECONDS: Final = 300.0
_LOAD_SECONDS: Final = 600.0
_SLOWEST_BYTES_PER_SECOND: Final = 20e6
_ENDING_SECONDS: Final = 5.0
_LAST_WORDS: Final = 500
_WITHHELD: Final = ("WEIGHTLIFT_PATCH", "WEIGHTLIFT_METHOD", "WEIGHTLIFT_CACHE")
"""Variables that a measured process must not see: peers are to be themselves, and paths are given as options."""

COMMAND: Final = (sys.executable, "-P", "-m", "weightlift.bench.worker")
"""``-P`` keeps the current folder, which may be a stranger's model, off the import path."""


class WorkerFailure(Exception):  # noqa: N818 - an outcome of a run, not always an error of ours
    """A worker failed, ended or did not answer.

    Attributes:
        kind: the class of the exception it raised; empty if it ended or did not answer.
        hint: what came with it.
        ours: it is one of :mod:`weightlift.errors`.
    """

    def __init__(self, message: str, *, kind: str = "", hint: str = "", ours: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.hint = hint
        self.ours = ours


class Peaks(NamedTuple):
    """Growth of a process's memory at its peak, by kind, in bytes; ``None`` where the system does not tell."""

    anonymous_bytes: int | None = None
    file_bytes: int | None = None
    shared_bytes: int | None = None


class Worker:
    """One worker process.

    Args:
        request: what it is to do.
        environment: environment variables on top of this process's.
        command: what to run instead, for tests.
    """

    def __init__(
        self, request: Mapping[str, Any], environment: Mapping[str, str], command: Sequence[str] = COMMAND
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in _WITHHELD}
        # A file, because nobody empties a pipe while the worker runs.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, or what a test names
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=kept | dict(environment),
            # Its own session: what is typed at the terminal is for this process, which ends its workers.
            start_new_session=os.name == "posix",
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="weightlift-bench", daemon=True)
        self._reader.start()
        self._base: ProcessUse | None = None
        self._peak = ProcessUse()
        self.say(dict(request))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._errors.close()
        self._process.kill()
        try:
            self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            # One that hangs inside a driver or a dead file system cannot be killed; it is left behind.
            return
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    @property
    def process_id(self) -> int:
        """The worker's process."""
        return self._process.pid

    def say(self, value: Any) -> None:
        """One JSON value to the worker; where it has ended already, its last words are heard next."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def hear(self, event: str, seconds: float, *, watch: bool = False) -> dict[str, Any]:
        """Wait for an event and return what came with it.

        Args:
            event: its name.
            seconds: how long to wait.
            watch: look at the worker's memory meanwhile.

        Raises:
            WorkerFailure: it failed, ended or took longer.
        """
        line = self._next_line(time.monotonic() + seconds, watch=watch)
        if line is None:
            raise WorkerFailure(f"no answer within {seconds:.0f} s")
        if not line:
            raise WorkerFailure(self._last_words())
        values: dict[str, Any] = json.loads(line)
        if values["event"] == "failed":
            raise WorkerFailure(
                values["message"], kind=values["type"], hint=values["hint"] or "", ours=bool(values["ours"])
            )
        if values.pop("event") != event:
            raise WorkerFailure(f"it said {line.strip()[:80]!r} where {event!r} was due")
        return values

    def _next_line(self, deadline: float, *, watch: bool) -> str | None:
        """What it says next, an empty line if it has ended; ``None`` if it says nothing in time."""
        line: str | None = None
        while line is None:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=SAMPLE_SECONDS if watch else _WAIT_SECONDS)
            if watch:
                self._look()
            if line is None and time.monotonic() > deadline:
                break
        return line

    def watch(self) -> None:
        """Peaks count from here."""
        self._base = process_use(self.process_id)
        self._peak = self._base or ProcessUse()

    def peaks(self) -> Peaks:
        """Growth of every kind of memory since :meth:`watch`, as sampled."""
        base, peak = self._base, self._peak
        if base is None:
            return Peaks()
        return Peaks(
            peak.anonymous_bytes - base.anonymous_bytes,
            peak.file_bytes - base.file_bytes,
            peak.shared_bytes - base.shared_bytes,
        )

    def _look(self) -> None:
        seen, peak = process_use(self.process_id), self._peak
        if seen is not None:
            self._peak = ProcessUse(
                max(peak.anonymous_bytes, seen.anonymous_bytes),
                max(peak.file_bytes, seen.file_bytes),
                max(peak.shared_bytes, seen.shared_bytes),
            )

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed while it was waiting
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put("")

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS)
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().rsplit("\n", 1)[-1][-_LAST_WORDS:]
        code = self._process.returncode
        killed = " (ended by the kernel for want of memory?)" if code == -9 else ""
        return f"it ended with code {code}{killed}" + (f": {words}" if words else "")


def load_seconds(nbytes: int) -> float:
    """How long a load may take before it is given up."""
    return _LOAD_SECONDS + nbytes / _SLOWEST_BYTES_PER_SECOND
