"""The panel on a terminal, and lines elsewhere."""

from __future__ import annotations

import io
import json
import os
import pty
import struct
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.health.guard.facts import Sample
from weightlift.health.guard.judge import Action, Verdict
from weightlift.health.guard.voice import JsonLines, Lines, Panel, Silence
from weightlift.health.guard.words import ending, kernel_killed, opening, status_lines
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard needs Linux")


class Terminal:
    """A pseudo-terminal of a size: ``stream`` writes to it, ``read`` tells what it was sent."""

    def __init__(self, rows: int, columns: int) -> None:
        self._reader, self._writer = pty.openpty()
        self.stream: IO[str] = os.fdopen(self._writer, "w", encoding="utf-8")
        self.resize(rows, columns)

    def resize(self, rows: int, columns: int) -> None:
        import fcntl
        import termios

        fcntl.ioctl(self._writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self) -> str:
        return os.read(self._reader, 1 << 16).decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self._reader)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(24, 20)
    yield made
    made.close()


FOUR = ["one", "two", "three and much more than fits", "four"]


class TestPanel:
    def test_the_last_rows_are_kept_for_it(self, terminal: Terminal) -> None:
        Panel(terminal.stream).show(FOUR)
        sent = terminal.read()
        assert "\x1b[1;20r" in sent
        assert "\x1b[21;1H\x1b[2Kone\x1b[22;1H\x1b[2Ktwo\x1b[23;1H\x1b[2Kthree and much more " in sent
        assert sent.endswith("\x1b[24;1H\x1b[2Kfour\x1b8")

    def test_drawing_again_is_one_write_that_moves_nothing(self, terminal: Terminal) -> None:
        panel = Panel(terminal.stream)
        panel.show(FOUR)
        terminal.read()
        panel.show(FOUR)
        sent = terminal.read()
        assert (sent[:2], sent[-2:]) == ("\x1b7", "\x1b8")
        assert "\n" not in sent
        assert "r" not in sent.replace("three", "").replace("four", "").replace("more", "")

    def test_it_follows_the_terminals_size(self, terminal: Terminal) -> None:
        panel = Panel(terminal.stream)
        panel.show(FOUR)
        terminal.resize(30, 80)
        terminal.read()
        panel.show(FOUR)
        assert "\x1b[1;26r" in terminal.read()

    def test_closing_leaves_the_terminal_as_it_was(self, terminal: Terminal) -> None:
        panel = Panel(terminal.stream)
        panel.show(FOUR)
        terminal.read()
        panel.close()
        assert terminal.read().startswith("\x1b7\x1b[r")
        panel.say(["after"])
        assert terminal.read() == "after\r\n"

    def test_a_small_terminal_keeps_its_rows(self, terminal: Terminal) -> None:
        terminal.resize(8, 80)
        panel = Panel(terminal.stream)
        panel.show(FOUR)
        panel.say(["line"])
        assert terminal.read() == "line\r\n"


def test_lines_show_nothing_in_between() -> None:
    out = io.StringIO()
    lines = Lines(out)
    lines.show(FOUR)
    lines.say(["a", "b"])
    lines.close()
    assert out.getvalue() == "a\nb\n"
    Silence(out).say(["c"])
    assert out.getvalue() == "a\nb\n"


def test_a_stream_that_is_gone_ends_nothing() -> None:
    out = io.StringIO()
    out.close()
    Lines(out).say(["a"])
    JsonLines([out]).write("end")


def test_json_lines() -> None:
    first, second = io.StringIO(), io.StringIO()
    JsonLines([first, second]).write("end", code=3, name="\x1b")
    assert first.getvalue() == second.getvalue() != ""
    assert json.loads(first.getvalue()) == {"schema": 1, "event": "end", "code": 3, "name": "\x1b"}


class TestWords:
    sample = Sample(
        seconds=3.2,
        anonymous_bytes=6 * GIB,
        file_bytes=2 * GIB,
        shared_bytes=0,
        swapped_bytes=5 * MIB,
        ceiling_bytes=12 * GIB,
        charged_bytes=8 * GIB,
        available_bytes=20 * GIB,
        free_bytes=1 * GIB,
        swap_free_bytes=0,
    )
    verdict = Verdict(Action.NOTHING, "", 6 * GIB, 2.0 * GIB, None, tight=False)

    def test_how_things_stand(self) -> None:
        lines = status_lines(["load", "\x1b"], self.sample, self.verdict, "growing: x", phase="running", pressure=0.03)
        assert lines == [
            "── weightlift guard ── running ── 3 s ── load '\\x1b'",
            "anonymous 6.00 GiB +2.00 GiB/s  file 2.00 GiB  shared 0 B  swap 5.00 MiB  pressure 3%",
            "[████████████············] room for 6.00 GiB; the machine has 20.0 GiB",
            "growing: x",
        ]

    def test_bounds(self) -> None:
        assert opening(["a"], "process tree", None, GIB).endswith(
            "in a process tree; 1.00 GiB kept for everything else"
        )
        assert "at most 8.00 GiB, and 1.00 GiB kept" in opening(["a"], "group", 8 * GIB, GIB)

    @pytest.mark.parametrize(("code", "how"), [(0, "with code 0"), (137, "by SIGKILL"), (255, "with code 255")])
    def test_endings(self, code: int, how: str) -> None:
        (line,) = ending(1.0, code, GIB, [], readonly=False)
        assert how in line
        assert "at most 1.00 GiB" in line

    def test_the_kernel_was_faster(self) -> None:
        assert "killed 2 of the command's own processes at its limit of 1.00 GiB" in kernel_killed(2, GIB)
        assert "the limit of its group" in kernel_killed(1, None)
