"""``weightlift guard`` as users run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.cli.main import main
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weightlift.testing.cgroup import MemoryCgroup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard needs Linux")

PYTHON = sys.executable

# Maps a file of 700 MiB privately and takes a copy of every page, by writing or as a GPU driver does it.
COPY_ON_WRITE = """
import mmap, sys
size = 700 << 20
with open(sys.argv[1], "r+b") as file:
    file.truncate(size)
    mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
if sys.argv[2] == "write":
    for page in range(0, size, mmap.PAGESIZE):
        mapping[page] = 1
else:
    mapping.madvise(23)  # MADV_POPULATE_WRITE
print("survived")
"""


@pytest.fixture
def catastrophe(tmp_path: Path) -> Callable[[str], list[str]]:
    path = tmp_path / "weights \x1b[31m.safetensors"
    path.touch()
    return lambda how: [PYTHON, "-c", COPY_ON_WRITE, str(path), how]


@pytest.mark.parametrize("scope", ["auto", "tree"])
class TestPassingThrough:
    def test_output_and_exit_code_are_the_commands(self, guard: Any, tmp_path: Path, scope: str) -> None:
        command = ["/bin/sh", "-c", "cat; echo talk >&2; exit 7"]
        ran = guard(tmp_path / "log", "--scope", scope, "--", *command, input="data\n")
        assert (ran.code, ran.out) == (7, "data\n")
        assert "talk\n" in ran.err
        start, *_, end = ran.events
        assert (start["event"], start["command"], end["event"]) == ("start", command, "end")
        assert (end["exit_code"], end["stopped"], end["kills"]) == (7, False, 0)
        assert {event["schema"] for event in ran.events} == {1}
        if start["folder"]:
            assert not os.path.exists(start["folder"])

    def test_a_signal_that_ended_it_shows_as_shells_do(self, guard: Any, tmp_path: Path, scope: str) -> None:
        ran = guard(tmp_path / "log", "--scope", scope, "--", "/bin/sh", "-c", "kill -ABRT $$")
        assert ran.code == 128 + signal.SIGABRT
        assert "by SIGABRT" in ran.err

    def test_signals_are_passed_on(self, scope: str) -> None:
        code = (
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {15}); print('ready', flush=True);"
            "print('got', signal.sigwait({15})); raise SystemExit(9)"
        )
        words = ["guard", "--scope", scope, "--", PYTHON, "-c", code]
        with subprocess.Popen(
            [PYTHON, "-m", "weightlift", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (9, "got 15\n")

    def test_descendants_that_live_on_are_told_of(self, guard: Any, tmp_path: Path, scope: str) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        ran = guard(tmp_path / "log", "--scope", scope, "--", "/bin/sh", "-c", f"cat '{fifo}' >/dev/null 2>&1 & exit 3")
        assert ran.code == 3
        if ran.events[0]["folder"]:
            assert "1 processes of the command live on" in ran.err
            assert not os.path.exists(ran.events[0]["folder"])
        # Opening its other end lets the one that lives on end too.
        os.close(os.open(fifo, os.O_WRONLY))


@pytest.mark.root
@pytest.mark.parametrize("scope", ["auto", "tree"])
@pytest.mark.parametrize("how", ["write", "populate"])
def test_a_command_that_wants_more_than_there_is_ends_alone(
    guard: Any,
    machine: MemoryCgroup,
    catastrophe: Callable[[str], list[str]],
    tmp_path: Path,
    scope: str,
    how: str,
) -> None:
    with subprocess.Popen(machine.command(["cat"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        ran = guard(tmp_path / "log", "--scope", scope, "--", *catastrophe(how), group=machine)
        out, _ = other.communicate(b"still here\n", timeout=60)
    assert (out, other.returncode) == (b"still here\n", 0)
    assert machine.oom_kills() == 0
    assert ran.out == ""
    assert ran.code in {128 + signal.SIGTERM, 128 + signal.SIGKILL}
    assert [action for action in ran.actions() if not action.startswith("drop")][:2] == ["freeze", "stop"]
    frozen = next(event for event in ran.events if event.get("action") == "freeze")
    culprit = frozen["growths"][0]
    assert culprit["name"].endswith(".safetensors")
    assert (culprit["kind"], culprit["private"], culprit["writable"]) == ("file", True, True)
    assert culprit["grown_bytes"] > 128 * MIB
    assert "weights \\x1b[31m.safetensors, mapped private and writable: " in ran.err
    assert "turned into anonymous memory" in ran.err
    assert "hint: " in ran.err
    assert "\x1b" not in ran.err
    assert ran.events[-1]["stopped"]
    assert ran.events[-1]["peak_lasting_bytes"] < 512 * MIB


@pytest.mark.root
@pytest.mark.parametrize("scope", ["auto", "tree"])
def test_a_frozen_command_waits_and_an_interrupt_ends_it(
    machine: MemoryCgroup, catastrophe: Callable[[str], list[str]], tmp_path: Path, scope: str
) -> None:
    words = ["guard", "--when-full", "freeze", "--scope", scope, "--", *catastrophe("write")]
    command = machine.command([PYTHON, "-m", "weightlift", *words])
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: Iterator[str] = iter(process.stderr.readline, "")
        frozen = next(line for line in lines if "froze" in line)
        process.send_signal(signal.SIGINT)
        rest = "".join(lines)
        assert process.wait(timeout=60) == 128 + signal.SIGKILL
    assert "that cannot be dropped" in frozen
    assert "by SIGKILL" in rest
    assert machine.oom_kills() == 0


READ_TO_THE_END = """
import sys
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.read(1 << 20):
        pass
    print("read", flush=True)
    sys.stdin.read()
"""


@pytest.mark.root
def test_page_cache_of_a_file_done_with_is_dropped(machine: MemoryCgroup, tmp_path: Path) -> None:
    path, log = tmp_path / "weights", tmp_path / "log"
    path.write_bytes(bytes(1 << 20) * 300)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    os.mkfifo(log)
    words = ["guard", "--limit", "256MiB", "--log", str(log), "--", PYTHON, "-c", READ_TO_THE_END, str(path)]
    command = machine.command([PYTHON, "-m", "weightlift", *words])
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
        log.open(encoding="utf-8") as lines,
    ):
        events = (json.loads(line) for line in lines)
        dropped = next(event for event in events if event["event"] == "action")
        out, _ = process.communicate(timeout=60)
        end = list(events)[-1]
    assert dropped["action"] == "drop consumed"
    assert dropped["dropped_bytes"] > 128 * MIB
    assert "page cache fills the 256 MiB allowed" in dropped["reason"]
    assert (process.returncode, out) == (0, b"read\n")
    assert (end["event"], end["stopped"]) == ("end", False)


def test_json_lines_take_the_place_of_what_is_shown(guard: Any, tmp_path: Path) -> None:
    ran = guard(tmp_path / "log", "--json", "--", "echo", "--json")
    assert (ran.code, ran.out) == (0, "--json\n")
    assert [json.loads(line) for line in ran.err.splitlines()] == ran.events


def test_a_command_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guard", "--", "/nowhere/program", "--json"]) == 127
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "/nowhere/program: no such program" in captured.err


@pytest.mark.parametrize(
    "words", [["guard"], ["guard", "--"], ["guard", "--grace", "-1", "--", "true"], ["guard", "--limit", "x", "true"]]
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "error: " in capsys.readouterr().err


def test_what_follows_the_dashes_is_not_for_the_guard(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guard", "--limit", "x", "--", "true", "--json"]) == 2
    assert capsys.readouterr().out == ""
