"""The figures about frameworks are those of the results file: medians of equal runs, stock beside ours."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

MIB = 1 << 20


def run(subject: str, state: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "framework": "exllamav2",
        "subject": subject,
        "state": state,
        "options": {},
        "seconds": seconds + 1,
        "weights_seconds": seconds,
        "anonymous_growth_bytes": 10 * MIB,
        "cached_after_bytes": 0,
        "outcome": "a",
        **more,
    }


def result(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"runs": list(runs), "models": {"llama": {"bytes": 6.2e9, "files": 2}}}


@pytest.fixture
def figures(scripts: Path) -> ModuleType:
    return importlib.import_module("integration_figures")


def test_medians_of_equal_runs_are_compared(figures: ModuleType) -> None:
    stock = [run("stock", "warm", seconds) for seconds in (2.0, 9.0, 3.0)]
    ours = [run("weightlift", "warm", seconds) for seconds in (1.0, 0.1, 1.5)]
    others = [run("weightlift", "warm", 50.0, options={"fasttensors": True}), run("stock", "cold", 70.0)]
    failed = {**run("stock", "warm", 1.0), "error": "killed"}
    del failed["seconds"]
    runs = [*stock, *ours, *others, failed]
    assert figures.faster(runs, "exllamav2", "warm") == 2.0
    assert figures.faster(runs, "exllamav2", "cold") is None
    text = figures.BLOCKS["exllamav2"]["integrations exllamav2"][1](result(*runs))
    assert "2.00 times as fast warm; logits equal bit for bit" in text
    assert "| warm, its own loader | 3 | 4.00 | 3.00 | 10.0 | 0.00 |" in text
    assert "| warm, weightlift, fasttensors=True | 1 | 51.00 | 50.00 |" in text


def test_transformers_is_compared_by_weights_alone(figures: ModuleType) -> None:
    runs = [run("stock", "warm", 6.0), run("weightlift", "warm", 2.0)]
    assert figures.faster([one | {"framework": "transformers"} for one in runs], "transformers", "warm") == 3.0


def test_reading_that_was_not_timed_alone_has_no_figure(figures: ModuleType) -> None:
    runs = [run("stock", "warm", 4.0), run("weightlift", "warm", 2.0)]
    del runs[0]["weights_seconds"]
    text = figures.loads(runs, "exllamav2")
    assert "| warm, its own loader | 1 | 5.00 | – |" in text
    assert "| warm, weightlift | 1 | 3.00 | 2.00 |" in text


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"seconds": 9.0}, "ExLlamaV2, cold: times as fast"),
        ({"outcome": "b"}, "ExLlamaV2: logits equal bit for bit"),
        (
            {"options": {"fasttensors": True}, "cached_after_bytes": 2 * MIB},
            "ExLlamaV2, fasttensors: cached after, MiB",
        ),
    ],
)
def test_what_was_missed_is_said(figures: ModuleType, changes: dict[str, Any], claim: str) -> None:
    pairs = [
        run(subject, state, seconds)
        for state in ("warm", "cold")
        for subject, seconds in (("stock", 4.0), ("weightlift", 1.0))
    ]
    assert all(target.reached for target in figures.judged(pairs, "exllamav2"))
    changed = [*pairs, *(run("weightlift", "cold", 1.0) | changes for _ in range(2))]
    missed = [target.name for target in figures.judged(changed, "exllamav2") if not target.reached]
    assert missed == [claim]


def test_nothing_is_equal_where_nothing_was_measured(figures: ModuleType) -> None:
    assert not figures.judged([], "exllamav2")[-1].reached


def test_a_framework_that_never_ran_is_not_shown(figures: ModuleType) -> None:
    assert (
        figures.BLOCKS["transformers"]["integrations transformers"][1](result(run("stock", "warm", 1.0)))
        == "Not recorded yet."
    )


def test_the_readme_says_it_in_one_sentence(figures: ModuleType) -> None:
    runs = [run("stock", "warm", 4.0), run("weightlift", "warm", 2.0)]
    text = figures.summary(result(*runs))
    assert "ExLlamaV2 1.7 times as fast warm.\nWhat they make of the same input is equal bit for bit." in text
    assert "transformers" not in text
    others = run("weightlift", "cold", 1.0, outcome="b")
    assert "input is **not equal**" in figures.summary(result(*runs, others))
