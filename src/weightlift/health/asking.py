"""Asking what may never answer: the child process with the frameworks in it, and calls on file systems that hang.

Owns deadlines. Nothing here waits longer than it was told to: what does not answer is left behind and named.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
_LAST_WORDS: Final = 500
_ENDING_SECONDS: Final = 0.5


class NoAnswerError(Exception):
    """Something did not answer in time; the message says what and for how long."""


def ask(what: str, function: Callable[[], T], seconds: float) -> T:
    """Call a function that may hang, on a thread that is left behind if it does.

    Raises:
        NoAnswerError: it has not returned in time.
        Exception: whatever it raised.
    """
    answer: list[T] = []
    failure: list[Exception] = []

    def call() -> None:
        try:
            answer.append(function())
        except Exception as err:  # noqa: BLE001 - raised again by whoever waits
            failure.append(err)

    thread = threading.Thread(target=call, name=f"weightlift-{what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise NoAnswerError(f"no answer within {seconds:.0f} s")
    return answer[0]


class Child:
    """The child process, from its start to what it said.

    Args:
        steps: what to ask, see :mod:`weightlift.health.child`.
        command: what to run instead, for tests; it is given the same arguments.

    Attributes:
        answers: what it said, by step.
        hung: the step that it was given up at; empty if it answered everything or ended.
    """

    def __init__(self, steps: Sequence[str], command: Sequence[str] | None = None) -> None:
        # -P keeps the current folder, which may be a stranger's model, off the import path.
        words = command or [sys.executable, "-P", "-m", "weightlift.health.child"]
        self._steps = set(steps)
        self._folder = tempfile.TemporaryDirectory(prefix="weightlift-doctor-", ignore_cleanup_errors=True)
        self.answers: dict[str, dict[str, Any]] = {}
        self.hung = ""
        self._last_words = ""
        self._step = ""
        self._finished = threading.Event()
        self._started = time.monotonic()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, or what a test names
                [*words, self._folder.name, *steps], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError:
            self._folder.cleanup()
            raise
        self._readers = [
            threading.Thread(target=read, name="weightlift-doctor", daemon=True) for read in (self._hear, self._drain)
        ]
        for reader in self._readers:
            reader.start()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = json.loads(line)
                step = said.pop("step")
                if said.pop("begins", False):
                    self._step = step
                else:
                    self.answers[step] = said
                    self._step = ""
            if self._steps <= self.answers.keys():
                self._finished.set()
        self._finished.set()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last_words = (self._last_words + line)[-_LAST_WORDS:]

    def wait(self, seconds: float) -> None:
        """Wait until everything is answered, or that long since the start; then end the process either way."""
        self._finished.wait(max(0.0, self._started + seconds - time.monotonic()))
        if not self._finished.is_set():
            self.hung = self._step or "starting"
        if self.hung or not self._ends():
            self._process.kill()
            # A process that hangs inside a driver cannot be killed; it is left behind.
            self._ends()
        if self._process.returncode is not None:
            for reader in self._readers:
                reader.join(_ENDING_SECONDS)
            for stream in (self._process.stdout, self._process.stderr):
                assert stream is not None
                stream.close()
        self._folder.cleanup()

    def _ends(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS)
        return self._process.returncode is not None

    @property
    def failure(self) -> str:
        """Why it ended before it had answered everything; empty if it answered or hung."""
        if self.hung or not self._process.returncode or self._steps <= self.answers.keys():
            return ""
        last = self._last_words.strip().rsplit("\n", 1)[-1]
        return last or f"ended with code {self._process.returncode}"
