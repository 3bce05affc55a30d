"""Gathering facts: what hangs, crashes or is not there becomes a gap, and nothing fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from weightlift.health import gathering
from weightlift.health.asking import Child, NoAnswerError, ask
from weightlift.health.child import permissions
from weightlift.health.gathering import gather
from weightlift.testing import make_checkpoint

STEPS = ["torch", "torch mapping", "gpus"]


def script(text: str) -> list[str]:
    """A child process that says what a test wants; it is given a folder and steps like the real one."""
    head = "import json, os, sys, time\nsay = lambda **said: print(json.dumps(said), flush=True)\n"
    return [sys.executable, "-c", head + text]


HANGS = """
say(step="torch", begins=True)
say(step="torch", backend="hip", backend_version="6.0")
say(step="torch mapping", begins=True)
say(step="torch mapping", mapping="rw-p")
say(step="gpus", begins=True)
time.sleep(1000)
"""


class TestChild:
    def test_what_was_said_before_it_hung_is_kept(self) -> None:
        child = Child(STEPS, script(HANGS))
        while "torch mapping" not in child.answers:
            time.sleep(0.01)
        child.wait(0.2)
        assert child.hung == "gpus"
        assert child._process.poll() is not None, "it was left running"
        assert child.answers["torch"] == {"backend": "hip", "backend_version": "6.0"}
        assert child.answers["torch mapping"] == {"mapping": "rw-p"}
        assert child.failure == ""

    def test_the_current_folder_is_not_on_its_import_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "json.py").write_text("open('imported', 'w').close()\n")
        monkeypatch.chdir(tmp_path)
        Child([]).wait(60)
        assert not (tmp_path / "imported").exists()

    def test_one_that_has_answered_everything_is_not_waited_for(self) -> None:
        text = "for step in sys.argv[2:]:\n say(step=step, begins=True)\n say(step=step, gpus=[])\ntime.sleep(1000)"
        child = Child(STEPS, script(text))
        child.wait(60)
        assert (child.hung, child.failure) == ("", "")
        assert list(child.answers) == STEPS
        assert child._process.poll() is not None, "it was left running"

    def test_a_crash_is_told_with_its_last_words(self) -> None:
        child = Child(STEPS, script("say(step='torch', backend='hip')\nsys.exit('the driver is gone')"))
        child.wait(60)
        assert child.failure == "the driver is gone"
        assert child.answers == {"torch": {"backend": "hip"}}
        killed = Child(STEPS, script("os.kill(os.getpid(), 9)"))
        killed.wait(60)
        assert "-9" in killed.failure

    def test_nonsense_on_the_way_is_passed_over(self) -> None:
        text = "print('warning: old driver'); print('[]'); print('{}')\nsay(step='torch', backend='cpu')"
        child = Child(["torch"], script(text))
        child.wait(60)
        assert child.answers == {"torch": {"backend": "cpu"}}

    def test_its_folder_is_removed(self, tmp_path: Path) -> None:
        note = tmp_path / "note"
        child = Child(["torch"], script(f"open({str(note)!r}, 'w').write(sys.argv[1])\nsay(step='torch')"))
        child.wait(60)
        assert not Path(note.read_text()).exists()

    def test_the_real_one_tells_how_libraries_map(self, tmp_path: Path) -> None:
        pytest.importorskip("torch", reason="torch is not installed")
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        steps = ["torch", "torch mapping", "safetensors mapping", "gpus"]
        done = subprocess.run(
            [sys.executable, "-m", "weightlift.health.child", str(tmp_path), *steps],
            capture_output=True,
            text=True,
            check=True,
        )
        said = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["step"] for line in said if line.get("begins")] == steps
        answers = {line["step"]: line for line in said if not line.get("begins")}
        assert [answer for answer in answers.values() if "error" in answer] == []
        assert answers["torch"]["backend"] in {"cpu", "cuda", "hip"}
        if sys.platform == "linux":
            for step in ("torch mapping", "safetensors mapping"):
                assert len(answers[step]["mapping"]) == 4, answers
        assert isinstance(answers["gpus"]["gpus"], list)

    def test_a_step_that_fails_does_not_end_the_others(self, tmp_path: Path) -> None:
        # The folder is not there, so that nothing can be written into it.
        done = subprocess.run(
            [sys.executable, "-m", "weightlift.health.child", str(tmp_path / "none"), "safetensors mapping", "torch"],
            capture_output=True,
            text=True,
            check=True,
        )
        answers = [json.loads(line) for line in done.stdout.splitlines()][1::2]
        assert (answers[0]["step"], "error" in answers[0]) == ("safetensors mapping", True)
        assert answers[1]["step"] == "torch"


def test_permissions_of_a_mapping() -> None:
    maps = (
        "7f00-7f10 r-xp 00000000 fe:00 12 /usr/lib/libc.so.6\n7f20-7f30 rw-p 00000000 00:00 0\n"
        "7f40-7f50 rw-p 00000000 fe:00 13 /tmp/a b.safetensors\n"
    )
    assert permissions("/tmp/a b.safetensors", maps) == "rw-p"  # noqa: S108 - a name in a recorded table
    assert permissions("/elsewhere", maps) == ""


class TestAsk:
    def test_answers_and_errors_come_through(self) -> None:
        assert ask("sums", lambda: 1 + 1, 60) == 2
        with pytest.raises(ZeroDivisionError):
            ask("sums", lambda: 1 // 0, 60)

    def test_what_hangs_is_left_behind(self) -> None:
        release = threading.Event()
        with pytest.raises(NoAnswerError, match="no answer"):
            ask("a dead file system", release.wait, 0.01)
        release.set()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_CHILD_SECONDS", 0.5)
    monkeypatch.setattr(gathering, "_CHILD_SECONDS_WITH_PLACE", 0.5)


class TestGather:
    def test_a_hanging_driver_is_a_gap_and_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Long enough for the script to start; it never ends by itself.
        monkeypatch.setattr(gathering, "_CHILD_SECONDS", 3.0)
        facts = gather(command=script(HANGS))
        assert facts.software.hung == "gpus"
        assert facts.software.backend == "hip"
        assert facts.software.gpus is None
        assert [gap.why for gap in facts.gaps if "torch" in gap.what and "'gpus'" in gap.why]

    def test_what_the_child_says_becomes_values(self) -> None:
        gpu: dict[str, Any] = {
            "name": "cuda:0",
            "model": "RX",
            "total_bytes": 24,
            "free_bytes": 23,
            "pci_address": "0000:03:00.0",
            "architecture": "gfx1100",
            "integrated": False,
        }
        answers: dict[str, dict[str, Any]] = {
            "torch": {"backend": "hip", "backend_version": "6.0"},
            "torch mapping": {"mapping": "rw-p"},
            "safetensors mapping": {"error": "OSError: no"},
            "gpus": {"gpus": [gpu]},
        }
        text = f"for step, said in {answers!r}.items():\n say(step=step, **said)"
        facts = gather(command=script(text))
        software = facts.software
        assert (software.backend, software.backend_version) == ("hip", "6.0")
        assert software.gpus is not None
        assert (software.gpus[0].model, software.gpus[0].architecture) == ("RX", "gfx1100")
        if software.library("torch").version:
            assert software.library("torch").maps_private_writable
        assert any("safetensors mapping" in gap.what for gap in facts.gaps)
        assert json.loads(json.dumps(facts.to_json()))["software"]["backend"] == "hip"

    @pytest.mark.usefixtures("quick")
    def test_a_program_that_cannot_be_started_is_a_gap(self) -> None:
        facts = gather(command=["/nowhere/at/all"])
        assert any("could not be started" in gap.why or "no process" in gap.why for gap in facts.gaps)

    @pytest.mark.usefixtures("quick")
    def test_a_probe_that_fails_is_a_gap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("no /sys here")

        monkeypatch.setattr(gathering, "graphics_cards", broken)
        facts = gather(command=script(""))
        assert facts.cards == ()
        assert [gap.why for gap in facts.gaps if gap.what == "the graphics cards"] == ["RuntimeError: no /sys here"]
        assert facts.machine is not None

    @pytest.mark.usefixtures("quick")
    def test_a_checkpoint_is_known_by_its_largest_shard(self, tmp_path: Path) -> None:
        path, _ = make_checkpoint(tmp_path / "model", shape=(512, 512), count=4, shards=2)
        facts = gather(path, command=script(""), measure=False)
        assert facts.place is not None
        assert facts.place.path == str(path)
        assert facts.place.file is not None
        assert facts.place.file.endswith(".safetensors")
        assert facts.place.model_bytes == sum(shard.stat().st_size for shard in path.glob("*.safetensors"))
        assert facts.speeds is None

    @pytest.mark.usefixtures("quick")
    def test_a_path_that_is_not_there(self, tmp_path: Path) -> None:
        facts = gather(tmp_path / "nothing", command=script(""))
        assert facts.place is not None
        assert "No such file" in facts.place.problem
        assert facts.speeds is not None
        assert facts.speeds.storage == {}

    @pytest.mark.usefixtures("quick")
    def test_variables_of_other_programs_are_only_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GPU_PINNED_MIN_XFER_SIZE", "4194304")
        before = dict(os.environ)
        facts = gather(command=script(""))
        assert facts.software.environment["GPU_PINNED_MIN_XFER_SIZE"] == "4194304"
        assert dict(os.environ) == before
