"""The order of rounds, and what becomes of loads that fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from weightlift.bench.cache_states import StateNotReached
from weightlift.bench.contestants import Contestant, own_contestants
from weightlift.bench.options import BenchOptions
from weightlift.bench.process import Worker
from weightlift.bench.rounds import Rounds
from weightlift.bench.running import open_model

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


def test_each_round_begins_with_another_contestant(made: Made) -> None:
    rounds, steps = made(own_contestants(["auto", "direct", "buffered"], {}, "null"), 3)
    rounds.run()
    told = [(step.done, step.total, step.round, step.what.rpartition(", ")[2]) for step in steps]
    assert told == [
        (0, 9, 1, "ceilings"), (0, 9, 1, "auto"), (1, 9, 1, "direct"), (2, 9, 1, "buffered"),
        (3, 9, 2, "ceilings"), (3, 9, 2, "direct"), (4, 9, 2, "buffered"), (5, 9, 2, "auto"),
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
