"""The figures of the page on reliability are those of the results files."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, SubElement

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def sample(load: int, megabytes: float, descriptors: int, threads: int) -> dict[str, Any]:
    return {"load": load, "anonymous_bytes": megabytes * 1e6, "descriptors": descriptors, "threads": threads}


def test_endurance_names_what_changed_and_what_was_held(scripts: Path) -> None:
    result = {
        "seed": 7,
        "loads": 1200,
        "endings": {
            "whole": 700,
            "FileChangedError": 150,
            "TruncatedFileError": 50,
            "stopped": 200,
            "stream left": 100,
        },
        "samples": [sample(1, 20.04, 6, 2), sample(600, 21, 6, 3), sample(1200, 22.5, 7, 2)],
        "kills": 9,
        "files_left": [],
        "python": "3.11.7",
    }
    text = importlib.import_module("reliability_figures").endurance(result).replace("\n", " ")
    for words in (
        "1,200 loads with random options (seed 7), 200 met a changed file, 300 were broken off",
        "the other 700 were right",
        "3 samples on the way, descriptors were 6 to 7 and threads 2 to 3 (2 at the end)",
        "from 20.0 MB after the first load to 22.5 MB after the last",
        "none left a file",
    ):
        assert words in text


def test_fuzzing_is_summed_up_by_reader(scripts: Path) -> None:
    def target(executions: int, seconds: float, *findings: str) -> dict[str, Any]:
        return {"executions": executions, "seconds": seconds, "findings": list(findings)}

    runs = [
        {"targets": {"gguf": target(1000, 60.0), "pickle": target(5, 30.0, "crash-1")}},
        {"targets": {"pickle": target(4000, 90.0)}},
    ]
    text = importlib.import_module("reliability_figures").fuzz({"runs": runs})
    assert "| `pickle` | 4,005 | 2 | 1 |\n| `gguf` | 1,000 | 1 | 0 |\n| together | 5,005 | 3 | 1 |" in text


def test_mutants_are_noticed_explained_or_neither(scripts: Path) -> None:
    counts = {"mutants": 2000, "tried": 300, "killed": 280, "timeout": 3, "survived": 17, "no_tests": 0}
    suite = {**counts, "sample": {"mutants": 300, "seed": 0}, "explained": [{}] * 12, "unexplained": [{}] * 5}
    whole: dict[str, object] = {**counts, "mutants": 300, "sample": None, "explained": [{}] * 17, "unexplained": []}
    text = importlib.import_module("reliability_figures").mutation({"gguf": suite, "plan": whole})
    assert "| `gguf` | 300 of 2,000, at random | 283 | 12 | 5 |" in text
    assert "| `plan` | 300 of 300 | 283 | 17 | 0 |" in text


def test_headers_that_are_refused_say_so(scripts: Path) -> None:
    def run(seconds: float, refused: str = "") -> dict[str, Any]:
        return {"processor_seconds": seconds, "refused": refused}

    headers = {
        "lists": {"weightlift": run(1.26), "safetensors": run(2.0)},
        "lists, broken at the end": {
            "weightlift": run(0.5, "HeaderError"),
            "safetensors": run(0.25, "SafetensorError"),
        },
        "disorder": {"weightlift": run(3.0, "HeaderError"), "safetensors": run(2.0, "SafetensorError")},
    }
    result = {"header_bytes": 20_000_000, "headers": headers}
    result |= {"environment": {"usable_processors": 2, "load_average_at_start": [8.27, 7, 6]}}
    text = importlib.import_module("reliability_figures").headers(result)
    assert "Of 20 MB" in text
    assert "load average 8.3" in text
    assert "| lists | 1.3 | 2.0 | 0.5 | 0.2 |" in text
    assert "| disorder | 3.0 (refused) | 2.0 (refused) | – | – |" in text


def test_faults_are_counted_by_kind_out_of_pytests_own_report(scripts: Path) -> None:
    figures, script = importlib.import_module("reliability_figures"), importlib.import_module("faults")
    names = [name if "::" in name else f"{name}::test_any" for _, _, tests in figures.FAULTS for name in tests]
    cases = []
    for name in names:
        file, _, function = name.partition(".py::")
        classname = f"tests.{file.replace('/', '.')}"
        made = [Element("testcase", classname=classname, name=f"{function}[{number}]") for number in range(3)]
        SubElement(made[2], "skipped")
        cases += made
    many = Element("testcase", classname="tests.fuzz.test_hostile_inputs", name="many")
    for reader, count in {"gguf": 1200, "pickle": 30}.items():
        SubElement(many, "property", name=f"hostile inputs: {reader}", value=str(count))
    tests, hostile = script.counted([*cases, many])
    result = {"tests": tests, "hostile_inputs": hostile, "environment": {"date": "2026-01-02T03", "python": "3.12.1"}}
    text = figures.faults(result)
    assert "| The n-th read fails with EIO | 2 (1 skipped) | `strace` |" in text
    assert "| Loads at once, threads that share, forked children | 4 (2 skipped) |" in text
    assert "on 2026-01-02 with CPython 3.12.1" in text
    assert "| `gguf` | 1,200 |\n| `pickle` | 30 |\n| together | 1,230 |" in figures.hostile(result)
    del tests["tests/trouble/test_two_at_once.py::test_any"]
    with pytest.raises(ValueError, match="knows no test trouble/test_two_at_once"):
        figures.faults(result)


def test_pythons_stand_with_what_failed_under_them(scripts: Path) -> None:
    figures, script = importlib.import_module("reliability_figures"), importlib.import_module("pythons")
    cases = [Element("testcase", classname="tests.core", name=str(number)) for number in range(5)]
    SubElement(cases[1], "skipped")
    SubElement(cases[4], "failure")
    run = script.counted(cases)
    assert run == {"passed": 3, "skipped": 1, "failed": ["tests.core::4"]}
    text = figures.pythons({"CPython 3.14.7, free-threaded": run | {"environment": {"date": "2026-01-02T03"}}})
    assert "| CPython 3.14.7, free-threaded | 2026-01-02 | 3 | 1 | 1 |" in text
    text = figures.portability({"statx": run | {"environment": {"date": "2026-01-02T03"}}})
    assert "| statx | 2026-01-02 | 3 | 1 | 1 |" in text


def test_a_step_of_the_self_test_that_failed_is_missed(scripts: Path) -> None:
    figures = importlib.import_module("reliability_figures")
    facts = {"ok": True, "seconds": 1.0, "name": "card", "devices": 2, "hip": "6.4", "cuda": None, "torch": "2.9"}
    steps = {"facts": facts, "stream": {"ok": False, "seconds": 2.25}}
    result = {"date": "2026-01-02T03:04:05", "device": "cuda:0", "python": "3.12", "steps": steps}
    part = figures.part_of_self_test(result)
    assert [(target.value, target.reached) for target in part.targets] == [("1", False)]
    assert "card, 2 in the machine; HIP 6.4" in part.text[0]
    assert "| stream | 2.2 | **no** |" in part.text[1]
