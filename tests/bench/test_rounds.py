"""The order of rounds, and what becomes of loads that fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from weightlift.bench import running
from weightlift.bench.cache_states import StateNotReached
from weightlift.bench.contestants import Contestant, own_contestants
from weightlift.bench.options import BenchOptions
from weightlift.bench.process import Worker
from weightlift.bench.rounds import Rounds
from weightlift.bench.running import open_model
from weightlift.health.facts import Facts, Gpu, SoftwareFacts
from weightlift.host.memory import Headroom
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from weightlift.bench.rounds import Step

    Made = Callable[..., tuple[Rounds, list[Step]]]


@pytest.fixture
def made(model: Path) -> Made:
    """Rounds over the model that drop nothing, and the steps that they tell."""

    def make(contestants: Sequence[Contestant], count: int, device: str = "null") -> tuple[Rounds, list[Step]]:
        steps: list[Step] = []
        opened = open_model(model, BenchOptions(device=device, cold=False))
        return Rounds(opened, device, contestants, count, steps.append), steps

    return make


def test_each_round_begins_with_another_contestant_and_every_second_goes_backwards(made: Made) -> None:
    rounds, steps = made(own_contestants(["auto", "direct", "buffered"], {}, "null"), 3)
    rounds.run()
    told = [(step.done, step.total, step.round, step.what.rpartition(", ")[2]) for step in steps]
    assert told == [
        (0, 9, 1, "ceilings"), (0, 9, 1, "auto"), (1, 9, 1, "direct"), (2, 9, 1, "buffered"),
        (3, 9, 2, "ceilings"), (3, 9, 2, "direct"), (4, 9, 2, "auto"), (5, 9, 2, "buffered"),
        (6, 9, 3, "ceilings"), (6, 9, 3, "buffered"), (7, 9, 3, "auto"), (8, 9, 3, "direct"),
    ]  # fmt: skip


def test_what_fails_by_itself_is_not_tried_again(made: Made) -> None:
    broken = Contestant(name="broken", loader="fastsafetensors", package="fastsafetensors")
    rounds, _ = made([*own_contestants(["auto"], {}, "null"), broken], 3)
    rounds.run()
    assert [len(rounds.runs["warm", name]) for name in ("auto", "broken")] == [3, 1]
    assert "fastsafetensors" in rounds.runs["warm", "broken"][0].error
    rounds, _ = made([broken], 3)
    rounds.run()
    assert (rounds.rounds_done, len(rounds.runs["warm", "broken"])) == (1, 1)


def test_a_state_that_was_not_reached_may_be_reached_later(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, _ = made(own_contestants(["auto"], {}, "null"), 2)
    looks: list[None] = []

    def pushed_out() -> None:
        looks.append(None)
        if len(looks) == 1:
            raise StateNotReached("pushed out")

    monkeypatch.setattr(rounds.model.cache, "check_warm", pushed_out)
    rounds.run()
    assert [(run.error, run.unready) for run in rounds.runs["warm", "auto"]] == [("pushed out", True), ("", False)]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_workers_start_side_by_side_and_load_one_after_the_other(
    made: Made, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    events: list[str] = []

    class Noted(Worker):
        def hear(self, event: str, seconds: float, look: Callable[[], None] | None = None) -> dict[str, Any]:
            told = super().hear(event, seconds, look)
            events.append(event)
            return told

        def say(self, value: Any) -> None:
            super().say(value)
            events.append("go" if value == "go" else "start")

    monkeypatch.setattr("weightlift.bench.rounds.Worker", Noted)
    rounds, _ = made(own_contestants(["auto", "direct", "buffered"], {}, "null"), 1)
    rounds.ahead = ahead
    rounds.run()
    expected = []
    for some in {1: (1, 1, 1), 2: (2, 1), 5: (3,)}[ahead]:
        expected += ["start"] * some + ["ready"] * some + ["go", "loaded"] * some
    assert events == expected
    assert [run.error for runs in rounds.runs.values() for run in runs] == [""] * 3


def test_of_workers_that_start_side_by_side_one_that_fails_leaves_the_others_alone(made: Made) -> None:
    broken = Contestant(name="broken", loader="fastsafetensors", package="fastsafetensors")
    rounds, _ = made([broken, *own_contestants(["auto", "direct"], {}, "null")], 2)
    rounds.ahead = 3
    rounds.run()
    assert "fastsafetensors" in rounds.runs["warm", "broken"][0].error
    for name in ("auto", "direct"):
        assert [run.error for run in rounds.runs["warm", name]] == ["", ""]


@pytest.mark.parametrize(
    ("processors", "free_host", "free_device", "ahead"),
    [
        (16, 64 * GIB, 80 * GIB, 4),
        (6, 64 * GIB, 80 * GIB, 3),
        (2, 64 * GIB, 80 * GIB, 1),
        (1, 64 * GIB, 80 * GIB, 1),
        (16, 5 * GIB, 80 * GIB, 2),
        (16, 64 * GIB, 4 * GIB + 40 * MIB, 2),
        (16, 64 * GIB, 20 * MIB, 1),
    ],
)
def test_as_many_workers_wait_as_there_is_room_for(
    model: Path, monkeypatch: pytest.MonkeyPatch, processors: int, free_host: int, free_device: int, ahead: int
) -> None:
    opened = open_model(model, BenchOptions(device="cuda:1"))
    cards = (
        Gpu(name="cuda:0", model="", total_bytes=GIB, free_bytes=0),
        Gpu(name="cuda:1", model="", total_bytes=80 * GIB, free_bytes=free_device),
    )
    monkeypatch.setattr(running, "available_processors", lambda: processors)
    room = Headroom(free_host, "machine", 64 * GIB, 0, "")
    monkeypatch.setattr(running, "headroom", lambda: room)
    assert running.workers_ahead(opened, "cuda:1", Facts(software=SoftwareFacts(gpus=cards))) == ahead


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"tensors": 7}, "7 tensors"),
        ({"bytes": 5}, "5 B"),
        ({"wrong": "layers.0\x1b"}, r"tensor 'layers.0\x1b' has other bytes"),
    ],
)
def test_a_load_of_wrong_tensors_is_a_failure_and_no_figure(
    made: Made, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], words: str
) -> None:
    class Liar(Worker):
        def hear(self, event: str, seconds: float, look: Callable[[], None] | None = None) -> dict[str, Any]:
            told = super().hear(event, seconds, look)
            return told | answer if event == "checked" else told

    monkeypatch.setattr("weightlift.bench.rounds.Worker", Liar)
    rounds, _ = made(own_contestants(["auto"], {}, "cpu"), 1, "cpu")
    rounds.run()
    (run,) = rounds.runs["warm", "auto"]
    assert run.gigabytes_per_second == 0
    assert words in run.error
