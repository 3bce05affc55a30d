"""Where the guard speaks: lines or a panel on stderr, and JSON lines.

Never fails: a full disk or a closed terminal must not end the watch.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

_PANEL_ROWS: Final = 4
_TERMINAL_ROWS_MIN: Final = 12


class Display(Protocol):
    """Where people look."""

    def say(self, lines: Sequence[str]) -> None:
        """Print lines that stay."""

    def show(self, lines: Sequence[str]) -> None:
        """Show how things stand now, instead of what was shown before."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Lines:
    """Prints what is said and shows nothing in between.

    Args:
        stream: where to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def say(self, lines: Sequence[str]) -> None:
        """See :class:`Display`."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()

    def show(self, lines: Sequence[str]) -> None:
        """See :class:`Display`."""

    def close(self) -> None:
        """See :class:`Display`."""


class Silence(Lines):
    """Says nothing; for ``--json``, whose lines say it all."""

    def say(self, lines: Sequence[str]) -> None:
        """See :class:`Display`."""


class Panel(Lines):
    """Keeps the last rows of a terminal for the guard; the command's output scrolls in the rows above.

    Every change is one write, which the terminal takes whole, so that it never mixes with the command's output.

    Args:
        stream: a terminal.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self._size = os.terminal_size((0, 0))

    def show(self, lines: Sequence[str]) -> None:
        """See :class:`Display`."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except OSError:
            return
        if size.lines < _TERMINAL_ROWS_MIN:
            self.close()
            return
        text = self._open(size) if size != self._size else ""
        first = size.lines - _PANEL_ROWS + 1
        rows = (f"\x1b[{first + index};1H\x1b[2K{line[: size.columns]}" for index, line in enumerate(lines))
        self._write(f"{text}\x1b7{''.join(rows)}\x1b8")

    def close(self) -> None:
        """See :class:`Display`."""
        if self._size.lines:
            rows = self._size.lines
            wiped = "".join(f"\x1b[{rows - index};1H\x1b[2K" for index in range(_PANEL_ROWS))
            self._write(f"\x1b7\x1b[r{wiped}\x1b8")
            self._size = os.terminal_size((0, 0))

    def _open(self, size: os.terminal_size) -> str:
        """Make room below the cursor and keep the output above the panel."""
        self._size = size
        room = "\n" * _PANEL_ROWS + f"\x1b[{_PANEL_ROWS}A"
        return f"{room}\x1b7\x1b[1;{size.lines - _PANEL_ROWS}r\x1b8"

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
            os.write(self._stream.fileno(), text.encode("utf-8", errors="replace"))


class JsonLines:
    """Writes events as JSON lines.

    Args:
        streams: where to; may be none.
    """

    def __init__(self, streams: Sequence[IO[str]]) -> None:
        self._streams = streams

    def write(self, event: str, **fields: Any) -> None:
        """One object on one line, with ``schema`` and ``event`` first."""
        if not self._streams:
            return
        line = json.dumps({"schema": 1, "event": event, **fields})
        for stream in self._streams:
            with contextlib.suppress(OSError, ValueError):
                stream.write(f"{line}\n")
                stream.flush()
