"""``weightlift cache`` as users run it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.cli.main import main
from weightlift.health.cache import warm as warm_module
from weightlift.host.groups import Available
from weightlift.reports.cache import bar
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cold = Callable[[str, int], Path]


def lines(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[str]:
    assert main(["cache", *words]) == code
    return [re.sub(r"\s+", " ", line).strip() for line in capsys.readouterr().out.splitlines()]


def answer(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["cache", *words, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["action"]) == (1, words[0])
    return found


def test_from_cold_to_warm_and_back(cold_file: Cold, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(cold_file("weights", 24 * MIB))
    assert f"0 B 24.0 MiB 0% {'·' * 24} {path}" in lines(capsys, "status", path)
    assert f"24.0 MiB 24.0 MiB 100% {'█' * 24} {path}" in lines(capsys, "warm", path)
    assert f"24.0 MiB 0 B {path}" in lines(capsys, "evict", path)


def test_json(cold_file: Cold, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(cold_file("weights", 24 * MIB))
    cold = answer(capsys, "status", path)
    assert cold["files"] == [{"path": path, "bytes": 24 * MIB, "cached_bytes": 0, "cells": [0.0] * 24}]
    warmed = answer(capsys, "warm", path, "--budget", "12MiB")
    assert (warmed["read_bytes"], warmed["bound"], warmed["after_bytes"]) == (12 * MIB, "budget", 12 * MIB)
    gone = answer(capsys, "evict", path)
    assert [(file["before_bytes"], file["after_bytes"], file["gone"]) for file in gone["files"]] == [
        (12 * MIB, 0, True)
    ]


def test_a_machine_without_room_is_exit_code_4(
    cold_file: Cold, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(cold_file("weights", 24 * MIB))
    monkeypatch.setattr(warm_module, "available_memory", lambda: Available(55 * MIB, 0, 1000 * MIB, 0))
    assert answer(capsys, "warm", path, code=4)["bound"] == "memory"


def test_only_the_largest_files_are_shown(cold_file: Cold, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cold_file("many/a", 3 * MIB).parent
    cold_file("many/b", 5000)
    cold_file("many/c", 2 * MIB)
    shown = lines(capsys, "status", str(folder), "--limit", "2")
    assert [line.split("/")[-1] for line in shown[2:4]] == ["a", "c"]
    assert shown[-1].endswith("3 files, 1 smaller file not shown (--limit 0 shows all)")
    assert len(lines(capsys, "status", str(folder), "--limit", "0")) == len(shown) + 1


@pytest.mark.parametrize(
    "words", [["cache"], ["cache", "status"], ["cache", "melt", "."], ["cache", "evict", ".", "--budget", "1MiB"]]
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "error: " in capsys.readouterr().err


def test_only_empty_looks_empty_and_only_full_looks_full() -> None:
    assert bar((0.0, 0.001, 0.4, 0.7, 0.999, 1.0)) == "·░▒▓▓█"
    assert bar(()) == "?" * 24
