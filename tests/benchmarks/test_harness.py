"""A page-cache state that was not reached is tried again; a load that failed is not."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.bench.cache_states import StateNotReached

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("failures", "attempts", "ends"),
    [
        (["StateNotReached"], 2, "done"),
        (["StateNotReached"] * 5, 3, "StateNotReached"),
        (["RuntimeError"], 1, "RuntimeError"),
    ],
)
def test_only_a_state_that_was_not_reached_is_tried_again(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, failures: list[str], attempts: int, ends: str
) -> None:
    harness, running = importlib.import_module("harness"), importlib.import_module("running")
    kinds = {"StateNotReached": StateNotReached, "RuntimeError": RuntimeError}
    tried: list[int] = []

    def run(*_: Any) -> dict[str, Any]:
        tried.append(1)
        if len(tried) <= len(failures):
            raise kinds[failures[len(tried) - 1]]("made to fail")
        return {"done": True}

    checkpoint = harness.Checkpoint(path="", files=(), tensor_bytes=0, tensors=0, digests="")
    case = harness.Case(name="case", contestant=harness.Contestant(command=("true",)), checkpoint=checkpoint)
    monkeypatch.setattr(harness, "measure_program", run)
    found = running.once(case)
    assert len(tried) == attempts
    assert ends in found or found["error"].startswith(ends)
