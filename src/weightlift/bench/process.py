"""The measuring side's end of the talk with one worker process: starting, hearing, ending it.

Knows nothing of loaders, cache states, memory or rounds. A worker never outlives the ``with`` block it was started in.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Key = TypeVar("Key")

SAMPLE_SECONDS: Final = 0.005
_WAIT_SECONDS: Final = 0.1
START_SECONDS: Final = 300.0
CHECK_SECONDS: Final = 600.0
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


class Worker:
    """One worker process.

    Args:
        request: what it is to do.
        environment: environment variables on top of this process's.
        command: another program that talks like :mod:`weightlift.bench.worker`.
    """

    def __init__(
        self, request: Mapping[str, Any], environment: Mapping[str, str], command: Sequence[str] = COMMAND
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in _WITHHELD}
        # A file, because nobody empties a pipe while the worker runs.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, or what the caller names
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
        try:
            self._reader.start()
            self.say(dict(request))
        except BaseException:
            # Ctrl-C, before any `with` block knows of the process.
            self.__exit__()
            raise

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
        if self._reader.ident is not None:
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

    def hear(self, event: str, seconds: float, look: Callable[[], None] | None = None) -> dict[str, Any]:
        """Wait for an event and return what came with it.

        Args:
            event: its name.
            seconds: how long to wait.
            look: called again and again meanwhile, every :data:`SAMPLE_SECONDS`, and once more at the end.

        Raises:
            WorkerFailure: it failed, ended or took longer.
        """
        line = self._next_line(time.monotonic() + seconds, look)
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

    def _next_line(self, deadline: float, look: Callable[[], None] | None) -> str | None:
        """What it says next, an empty line if it has ended; ``None`` if it says nothing in time."""
        line: str | None = None
        while line is None:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=_WAIT_SECONDS if look is None else SAMPLE_SECONDS)
            if look is not None:
                look()
            if line is None and time.monotonic() > deadline:
                break
        return line

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


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Have Ctrl-C wait until the block is over: a process that is only being started nobody would know to end."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def start_together(
    makers: Mapping[Key, Callable[[], Worker]], stack: contextlib.ExitStack, failures: tuple[type[Exception], ...]
) -> dict[Key, Worker | Exception]:
    """Start workers side by side; they then wait for what they are to do.

    Args:
        makers: start one each, by what it is for.
        stack: ends them.
        failures: what a worker may fail with.

    Returns:
        By what it is for, a worker that is ready, or what went wrong with it.
    """
    started: dict[Key, Worker | Exception] = {}
    for key, make in makers.items():
        try:
            with _interrupts_held():
                started[key] = stack.enter_context(make())
        except failures as err:
            started[key] = err
    for key, worker in started.items():
        if isinstance(worker, Worker):
            try:
                worker.hear("ready", START_SECONDS)
            except failures as err:
                started[key] = err
    return started


def load_seconds(nbytes: int) -> float:
    """How long a load may take before it is given up."""
    return _LOAD_SECONDS + nbytes / _SLOWEST_BYTES_PER_SECOND
