"""The self-test for owners of cards: its steps on the fake GPU, its runner, and all of it on a real card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from weightlift.cli.main import main
from weightlift.health.self_test import run_self_test
from weightlift.health.self_test_steps import CHECKPOINT, DIGESTS, STEPS, StepError, write_checkpoint
from weightlift.testing.fake_devices import FakeDevices
from weightlift.testing.fake_gpu import FakeGpu, FakeGpuUnavailable, build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOADS = [step for step in STEPS if step.startswith("load ") and "native" not in step] + ["stream"]


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[FakeDevices]:
    try:
        library = build(tmp_path)
    except FakeGpuUnavailable as err:
        pytest.skip(str(err))
    with FakeGpu(library, "cuda", seed=1, memory_bytes=512 << 20) as session, FakeDevices(session) as fakes:
        yield fakes


@pytest.mark.parametrize("step", LOADS)
def test_steps_pass_where_every_byte_arrives_and_fail_where_one_is_wrong(
    step: str, tmp_path: Path, devices: FakeDevices
) -> None:
    write_checkpoint(tmp_path)
    digests = json.loads((tmp_path / DIGESTS).read_text(encoding="utf-8"))
    STEPS[step]("cuda:0", tmp_path / CHECKPOINT, digests)
    digests["small.0007"] = "0" * 64
    with pytest.raises(StepError, match=r"small\.0007|1 tensors|1 of"):
        STEPS[step]("cuda:0", tmp_path / CHECKPOINT, digests)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_card_the_first_step_says_so_and_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.json"
    assert main(["doctor", "--self-test", "--folder", str(tmp_path), "--output", str(output), "--json"]) == 1
    written, printed = json.loads(output.read_text(encoding="utf-8")), json.loads(capsys.readouterr().out)
    assert written == printed
    assert (written["schema"], written["passed"], list(written["steps"])) == (1, False, ["facts"])
    assert written["steps"]["facts"]["error"]
    assert str(tmp_path) not in json.dumps(written["steps"])


def test_a_step_that_does_not_end_is_told_as_hung(tmp_path: Path) -> None:
    told: list[str] = []

    def note(step: str, result: dict[str, Any]) -> None:
        told.append(f"{step}: {result['error']}")

    result = run_self_test("cuda:0", tmp_path, note, step_seconds=0.0)
    assert told == ["facts: hung"]
    assert not result["passed"]


@pytest.mark.gpu
def test_every_step_passes_on_this_machines_card(tmp_path: Path) -> None:
    failed: dict[str, str] = {}

    def note(step: str, result: dict[str, Any]) -> None:
        if not result["ok"]:
            failed[step] = result["said"]

    assert run_self_test("cuda:0", tmp_path, note)["passed"], failed
