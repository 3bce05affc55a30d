"""``weightlift doctor`` and ``weightlift load --dry-run``: output, JSON and exit codes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.cli.main import main
from weightlift.health import gathering
from weightlift.testing import TensorSpec, machines, make_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from weightlift.health.facts import Facts

GIB = 1 << 30


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Facts], list[Any]]:
    """Put made-up facts in the place of this machine's; returns what gathering was asked for."""

    def put(facts: Facts) -> list[Any]:
        asked: list[Any] = []

        def gather(path: str | None, *, measure: bool) -> Facts:
            asked.append((path, measure))
            return facts

        monkeypatch.setattr(gathering, "gather", gather)
        return asked

    return put


class TestDoctor:
    @pytest.mark.parametrize(("make", "code"), [(machines.two_7900_xtx, 3), (machines.workstation, 0)])
    def test_a_degraded_machine_is_exit_code_3(
        self,
        capsys: pytest.CaptureFixture[str],
        made_up: Callable[[Facts], list[Any]],
        make: Callable[[], Facts],
        code: int,
    ) -> None:
        made_up(make())
        ending, out, err = run(capsys, "doctor")
        assert (ending, err) == (code, "")
        assert "recommended" in out
        ending, out, err = run(capsys, "doctor", "--json")
        assert (ending, err) == (code, "")
        answer = json.loads(out)
        assert answer.keys() == {
            "schema", "degraded", "seconds", "facts", "findings", "not_checked", "recommendation",
        }  # fmt: skip
        assert (answer["schema"], answer["degraded"]) == (1, code == 3)
        for finding in answer["findings"]:
            assert finding.keys() == {"id", "level", "text", "why", "mend"}
        assert answer["facts"]["machine"]["room"]["rooms"][0]["limit_bytes"] > 0
        assert answer["recommendation"]["tools"][0]["tool"] == "llama.cpp"

    def test_what_is_asked_for(self, capsys: pytest.CaptureFixture[str], made_up: Callable[[Facts], list[Any]]) -> None:
        asked = made_up(machines.workstation())
        run(capsys, "doctor")
        run(capsys, "doctor", "/models")
        run(capsys, "doctor", "/models", "--no-speed")
        assert asked == [(None, True), ("/models", True), ("/models", False)]

    def test_options_of_the_self_test_need_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "doctor", "--device", "cuda:1")
        assert (code, out) == (2, "")
        assert "--self-test" in err

    def test_this_machine(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path, _ = make_checkpoint(tmp_path / "model", shape=(2048, 2048), count=4)
        code, out, err = run(capsys, "doctor", str(path), "--json")
        assert code in {0, 3}
        assert err == ""
        answer = json.loads(out)
        assert answer["facts"]["place"]["file"] == str(path / "model.safetensors")
        assert answer["facts"]["place"]["model_bytes"] > 32 << 20
        if sys.platform == "linux":
            assert answer["facts"]["machine"]["system"] == "Linux"
            assert answer["facts"]["place"]["mount"]["kind"]
        code, out, _ = run(capsys, "doctor", str(tmp_path / "nothing"))
        assert code == 3
        assert "[place-unreadable]" in out


class TestDryRun:
    def test_it_says_what_would_be_needed(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path, _ = make_checkpoint(tmp_path / "model", shape=(512, 512), count=4, shards=2)
        code, out, err = run(capsys, "load", str(path), "--framework", "numpy", "--dry-run")
        assert (code, err) == (0, "")
        assert out.startswith(f"dry run of  {path}\nverdict     fits\n")
        (needed,) = (line for line in out.splitlines() if line.startswith("tensors in host memory"))
        assert needed.split()[-2:] in (["2.00", "MiB"], ["2.01", "MiB"])
        assert "the machine" in out
        code, out, _ = run(capsys, "load", str(path), "--device", "null", "--dry-run", "--json")
        answer = json.loads(out)
        assert (answer["schema"], answer["verdict"], answer["missing_bytes"]) == (1, "fits", 0)
        assert answer["host_memory"]["tensor_bytes"] == 0
        assert answer["host_memory"]["staging_bytes"] > 0
        assert answer["limits"][0]["control_group"] is None

    def test_what_the_host_cannot_hold_is_exit_code_4(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "giant.safetensors", [TensorSpec("t", "U8", (1 << 43,))], sparse=True)
        code, out, err = run(capsys, "load", str(path), "--framework", "numpy", "--dry-run")
        assert (code, err) == (4, "")
        assert "does not fit" in out
        assert "too little" in out
        code, out, _ = run(capsys, "load", str(path), "--framework", "numpy", "--dry-run", "--json")
        assert (code, json.loads(out)["verdict"]) == (4, "lacks")
        assert run(capsys, "load", str(path), "--method", "mmap", "--dry-run")[0] == 0

    def test_wrong_options_are_errors_as_ever(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path, _ = make_checkpoint(tmp_path / "m.safetensors", shape=(8, 8))
        assert run(capsys, "load", str(path), "--staging", "pinned", "--device", "null", "--dry-run")[0] == 1
        assert run(capsys, "load", str(path), "--host-memory", "1MiB", "--dry-run")[0] == 4


def test_the_page_of_the_documentation_is_what_the_code_says(tool: Callable[[str], ModuleType]) -> None:
    module = tool("doctor_docs")
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.filled(page) == page, "run tools/doctor_docs.py"
