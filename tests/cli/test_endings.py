"""How the command line ends: exit codes, errors on both streams, signals, closed pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from weightlift._version import __version__
from weightlift.cli import main as main_module
from weightlift.cli.main import COMMANDS, main
from weightlift.errors import EngineError, InsufficientMemoryError, TruncatedFileError
from weightlift.options import ENVIRONMENT
from weightlift.testing import TensorSpec, make_checkpoint, write_checkpoint

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

GIB = 1 << 30


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(make_checkpoint(tmp_path / "model.safetensors", shape=(8, 8))[0])


class Raising:
    """A command that fails as it is told to."""

    SUMMARY = "fails"

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Take no arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        assert arguments.command == "fail"
        raise self.error


def ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, *words: str
) -> tuple[int, dict[str, Any], str]:
    monkeypatch.setitem(COMMANDS, "fail", Raising(error))
    code = main(["fail", "--json", *words])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["load", "{path}.missing"], 1, "CheckpointNotFoundError"),
        (["load", "{path}", "--device", "null", "--names", "nothing"], 1, "SelectionError"),
        (["load", "{path}", "--device", "null", "--host-memory", "1MiB"], 4, "BudgetError"),
        (["load", "{path}", "--host-memory", "many"], 2, "OptionError"),
        (["load", "{path}", "--workers", "1000"], 2, "OptionError"),
        (["load", "{path}", "--chunk", "5"], 2, "OptionError"),
        (["load", "{path}", "--method", "fast"], 2, "UsageError"),
        (["load", "{path}", "--workers", "two"], 2, "UsageError"),
        (["load", "{path}", "--unheard-of"], 2, "UsageError"),
        (["load"], 2, "UsageError"),
        (["inspect", "{path}", "--sort", "age"], 2, "UsageError"),
        (["fly"], 2, "UsageError"),
    ],
)
def test_errors_in_both_forms(
    path: str, capsys: pytest.CaptureFixture[str], words: list[str], code: int, kind: str
) -> None:
    words = [word.format(path=path) for word in words]
    assert main(words) == code
    text = capsys.readouterr()
    assert text.out == ""
    assert "Traceback" not in text.err
    lines = text.err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert lines[-1].startswith("hint: ") or kind == "OptionError"
    assert main([*words, "--json"]) == code
    both = capsys.readouterr()
    assert both.err == text.err
    answer = json.loads(both.out)
    assert answer.keys() == {"schema", "error"}
    assert answer["error"].keys() == {"type", "message", "hint", "path", "tensor", "offset"}
    assert answer["error"]["type"] == kind


def test_an_error_says_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = TruncatedFileError("short", hint="fetch it again", path="/m.safetensors", tensor="a\x1b[2J", offset=8)
    code, answer, err = ended(monkeypatch, capsys, error)
    assert code == 1
    assert answer["error"] == {
        "type": "TruncatedFileError",
        "message": "short",
        "hint": "fetch it again",
        "path": "/m.safetensors",
        "tensor": "a\x1b[2J",
        "offset": 8,
    }
    assert err == "error: short\nhint: fetch it again\n"


def test_control_characters_of_a_message_are_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = TruncatedFileError("bad \x1b[31mname", hint="\x07")
    error.add_note("3 reads have not returned\x1b")
    err = ended(monkeypatch, capsys, error)[2]
    assert err == "error: bad \\x1b[31mname\nnote: 3 reads have not returned\\x1b\nhint: \\x07\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InsufficientMemoryError("too big"), 4),
        (MemoryError(), 4),
        (EngineError("broken promise"), 1),
        (RuntimeError("surprise"), 1),
        (OSError(5, "Input/output error"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_by_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    ending, answer, err = ended(monkeypatch, capsys, error)
    assert (ending, answer["error"]["type"]) == (code, type(error).__name__)
    assert "Traceback" not in err
    assert err.splitlines()[0].startswith("interrupted" if code == 130 else "error: ")


def test_a_defect_asks_to_be_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--debug" in ended(monkeypatch, capsys, RuntimeError("surprise"))[2]


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Traceback" in ended(monkeypatch, capsys, RuntimeError("surprise"), "--debug")[2]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"weightlift {__version__}\n"
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(name in captured.err for name in COMMANDS)


def test_help_names_defaults_and_variables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert main(["load", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 128MiB; environment: WEIGHTLIFT_HOST_MEMORY)" in shown
    assert "(default: auto; environment: WEIGHTLIFT_METHOD)" in shown
    assert [name for name in ENVIRONMENT if name not in shown] == [
        "WEIGHTLIFT_ENGINE_LIBRARY",
        "WEIGHTLIFT_PATCH",
        "WEIGHTLIFT_UNTESTED_VERSIONS",
        "WEIGHTLIFT_GPU_RUNTIME",
    ]


def test_help_works_under_a_bad_environment(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLIFT_METHOD", "fast")
    assert main(["load", "--help"]) == 0
    assert main(["load", path, "--device", "null"]) == 2
    assert "'fast'" in capsys.readouterr().err


def command(*words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "weightlift", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("engine", ["auto", "python"])
def test_an_interrupt_ends_a_load_at_once(tmp_path: Path, engine: str) -> None:
    specs = [TensorSpec(f"t{number}", "U8", (64 * GIB,)) for number in range(16)]
    giant = write_checkpoint(tmp_path / "giant.safetensors", specs, sparse=True)
    words = ["--device", "null", "--method", "buffered", "--cache", "drop", "--engine", engine, "--progress", "--json"]
    with command("load", str(giant), *words) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert first.startswith("loading: ")
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert json.loads(out)["error"]["message"] == "interrupted"


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_an_interrupt_while_modules_are_imported_ends_in_a_line(tmp_path: Path, path: str, words: list[str]) -> None:
    (tmp_path / "msgspec.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    with command("load", path, *words, PYTHONPATH=str(tmp_path)) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert (json.loads(out)["error"]["message"] if words else out) == ("interrupted" if words else "")


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ('use method="auto", "direct" or "buffered"', "use --method auto, direct or buffered"),
        ("set host_memory=8388608 or more; any tensor", "set --host-memory 8388608 or more; any tensor"),
        ('load part (names=…), use method="mmap", or', "load part (--names …), use --method mmap, or"),
        ('pass {"*": "cpu"} as device=…, x.method="a"', 'pass {"*": "cpu"} as --device …, x.method="a"'),
        ("with chunk_bytes=4096, digest=True, unheard_of=1", "with --chunk 4096, --digest, unheard_of=1"),
    ],
)
def test_hints_are_spelt_as_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hint: str, shown: str
) -> None:
    _, answer, err = ended(monkeypatch, capsys, InsufficientMemoryError('cache="keep"', hint=hint))
    assert err == f'error: cache="keep"\nhint: {shown}\n'
    assert answer["error"]["hint"] == shown


def test_a_wrong_value_is_named_by_its_option(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", path, "--workers", "1000"]) == 2
    assert capsys.readouterr().err.startswith("error: --workers 1000 is out of range")


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    specs = [TensorSpec(f"tensor.{number}", "U8", (1,)) for number in range(20_000)]
    many = write_checkpoint(tmp_path / "many.safetensors", specs)
    with command("inspect", str(many), "--limit", "0") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=30) == 0
    assert err == ""


def test_output_that_cannot_be_written_is_a_failure(path: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w", encoding="utf-8") as full:
        finished = subprocess.run(
            [sys.executable, "-m", "weightlift", "inspect", path],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert "Traceback" not in finished.stderr


def test_a_terminal_without_the_characters_gets_escapes(path: str) -> None:
    with command("load", path, "--device", "null", PYTHONIOENCODING="ascii") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert r"auto \u2192" in out


def test_the_command_line_starts_light() -> None:
    code = (
        "import sys, weightlift.cli.main; print([name for name in ('rich', 'torch', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_commands_hold_what_the_table_needs() -> None:
    assert set(COMMANDS) >= {"load", "inspect"}
    assert all(command.SUMMARY for command in COMMANDS.values())
    assert main_module.EXIT_CODES.startswith("exit codes:")
