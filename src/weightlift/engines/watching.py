"""A thread that says on a descriptor when a load stands still; the Python engine's watchdog."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from weightlift.errors import printable
from weightlift.operations import STAGE_WORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightlift.operations import Activity

_LINE_BYTES: Final = 4096
_TICKS: Final = 8


class Standing(NamedTuple):
    """How an engine stands at one moment.

    Attributes:
        landed_bytes: bytes that have landed.
        outstanding_bytes: bytes submitted that have not.
        running: workers alive.
        busy: what each busy worker is doing, by its number.
        silence_seconds: how long ago the program last asked for news.
    """

    landed_bytes: int
    outstanding_bytes: int
    running: int
    busy: dict[int, Activity]
    silence_seconds: float


class Watchdog:
    """Looks at an engine now and then until it is ended.

    Args:
        look: how the engine stands.
        seconds: how long nothing may land.
        names: what to call each shard.
        fd: where to say it.
    """

    def __init__(self, look: Callable[[], Standing], seconds: float, names: Sequence[str], fd: int) -> None:
        self._look = look
        self._seconds = seconds
        self._names = [printable(name) for name in names]
        self._fd = fd
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weightlift-watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop looking."""
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        since, landed, due = time.monotonic(), 0, self._seconds
        while not self._ending.wait(self._seconds / _TICKS):
            standing, now = self._look(), time.monotonic()
            if landed != standing.landed_bytes or not standing.outstanding_bytes or not standing.running:
                since, landed, due = now, standing.landed_bytes, self._seconds
            elif now - since >= due and (standing.busy or standing.silence_seconds >= self._seconds):
                self._say(standing, now - since)
                due = 2 * (now - since)

    def _say(self, standing: Standing, seconds: float) -> None:
        text = f"nothing has landed for {seconds:.1f} s and {standing.outstanding_bytes} bytes are outstanding"
        workers = "; ".join(self._describe(index, doing) for index, doing in standing.busy.items())
        if workers:
            text += f": {workers}"
        if standing.silence_seconds >= self._seconds:
            text += f"; the program has not asked for news for {standing.silence_seconds:.1f} s"
        line = f"weightlift: {text}".encode()[: _LINE_BYTES - 1] + b"\n"
        with contextlib.suppress(OSError):
            if _takes_a_line(self._fd):
                os.write(self._fd, line)

    def _describe(self, index: int, doing: Activity) -> str:
        return (
            f"worker {index} {STAGE_WORDS[doing.stage]} {self._names[doing.shard]} at byte {doing.offset} "
            f"({doing.length} bytes) for {doing.seconds:.1f} s"
        )


def _takes_a_line(fd: int) -> bool:
    """Whether writing will not wait for a reader who has gone to sleep, where the system can tell."""
    if not hasattr(select, "poll"):
        return True
    writable = select.poll()
    writable.register(fd, select.POLLOUT)
    return any(event & select.POLLOUT for _, event in writable.poll(0))
