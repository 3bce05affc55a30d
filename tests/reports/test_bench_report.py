"""A benchmark's tables and picture, from a result made by hand."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from weightlift.bench.cache_states import Restored
from weightlift.bench.ceilings import Ceilings
from weightlift.bench.contestants import Contestant
from weightlift.bench.memory import Peaks
from weightlift.bench.results import BenchResult, Run, case_results
from weightlift.bench.rounds import Step
from weightlift.errors import MissingExtraError
from weightlift.health.recommend import recommend
from weightlift.reports.bench import bench_tables
from weightlift.reports.bench_chart import bench_picture
from weightlift.reports.console import show
from weightlift.reports.drawing import Picture, Words, as_svg, require_png, write_png
from weightlift.reports.progress import step_bar, step_lines
from weightlift.testing import machines
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

OWN = Contestant(name="auto", loader="weightlift")
PEER = Contestant(name="peer 1.0 <b>\x1b[31m", loader="peer", package="peer")
BROKEN = Contestant(name="broken 2.0", loader="broken", package="broken")


def run(number: int, speed: float) -> Run:
    return Run(
        round=number,
        seconds=2.0 / speed,
        gigabytes_per_second=speed,
        peaks=Peaks(2 * GIB, 3 * MIB, 0),
        beyond_tensors_bytes=40 * MIB,
        cached_before_bytes=0,
        cached_after_bytes=GIB,
        ceiling=("direct", 5.0),
    )


def result(rounds: int, *, partial: bool = False) -> BenchResult:
    facts = machines.workstation()
    runs = {
        ("cold", "auto"): [run(number, 4.0 + number / 10) for number in range(rounds)],
        ("cold", PEER.name): [run(number, 2.0) for number in range(rounds)],
        ("cold", "broken 2.0"): [Run(round=0, error="no \x1bway")],
    }
    return BenchResult(
        path="/models/\x1b[2Jllama",
        file_format="safetensors",
        tensors=219,
        nbytes=2 * GIB,
        file_bytes=2 * GIB,
        files=1,
        device="cpu",
        rounds=5,
        rounds_done=rounds,
        partial=partial,
        ceilings=tuple(Ceilings({"direct": 5.0 + number}, {"cached": "too small"}) for number in range(rounds)),
        cases=case_results([OWN, PEER, BROKEN], runs),
        not_measured={"warm": "memory has no room"},
        notes=("memory is looked at from outside",),
        page_cache=Restored(before_bytes=0, after_bytes=0),
        facts=facts,
        recommendation=recommend(facts),
        seconds=9.0,
    )


def lines(found: BenchResult) -> list[str]:
    stream = io.StringIO()
    show(stream, *bench_tables(found))
    assert "\x1b" not in stream.getvalue()
    return [re.sub(r"\s+", " ", line).strip() for line in stream.getvalue().splitlines()]


class TestTables:
    def test_a_result(self) -> None:
        shown = lines(result(3))
        assert "loaded 219 tensors, 2.00 GiB in 1 file, to cpu; 3 rounds" in shown
        assert "storage, direct 6.00 GB/s (5.00 – 7.00)" in shown
        assert "not page cache, copied out too small" in shown
        assert "not warm memory has no room" in shown
        assert "auto 4.10 4.00 – 4.20 488 ms 82% – 2.00 GiB 40.0 MiB 3.00 MiB 50%" in shown
        assert any(line.endswith("2.00 – 2.00 1.00 s 40% 0.49 × auto 2.00 GiB 40.0 MiB 3.00 MiB 50%") for line in shown)
        assert any(line.startswith("broken 2.0 – – ") and line.endswith(r"no \x1bway") for line in shown)
        assert "fastest cold auto, 4.10 GB/s in 3 runs" in shown
        assert f"recommended {result(3).recommendation.command}" in shown

    def test_single_runs_are_no_result(self) -> None:
        shown = lines(result(2))
        assert shown[0].startswith("2 whole rounds: these are single runs, not results, and no fractions or ratios")
        assert "storage, direct 5.00 GB/s, 6.00 GB/s (single runs)" in shown
        assert "auto 4.00, 4.10 single runs 500 ms, 488 ms – – 2.00 GiB 40.0 MiB 3.00 MiB 50%" in shown
        assert not any("fastest" in line or "×" in line for line in shown)

    def test_a_partial_result_says_so(self) -> None:
        assert lines(result(3, partial=True))[0] == "partial: interrupted in round 4 of 5"
        assert not any("partial" in line for line in lines(result(3)))


class TestPicture:
    @pytest.mark.parametrize("rounds", [1, 3])
    def test_it_is_svg_with_every_case(self, rounds: int) -> None:
        svg = as_svg(bench_picture(result(rounds)))
        assert "\x1b" not in svg
        root = ElementTree.fromstring(svg)  # noqa: S314 - the project's own picture
        texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
        assert "auto" in texts
        assert r"peer 1.0 <b>\x1b[31m" in texts
        assert "broken 2.0" not in texts, "it has no figure"
        assert ("4.10" in texts) == (rounds == 3)
        assert any("not a result" in text for text in texts) == (rounds == 1)
        shapes = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert ("circle" in shapes) == (rounds == 1), "single runs are dots"

    def test_bars_are_as_long_as_they_should_be(self) -> None:
        root = ElementTree.fromstring(as_svg(bench_picture(result(3))))  # noqa: S314 - the project's own picture
        bars = [float(element.get("width", "0")) for element in root.iter() if element.tag.endswith("rect")][1:]
        assert bars[0] / bars[1] == pytest.approx(4.1 / 2.0, rel=0.01)

    def test_png(self, tmp_path: Path) -> None:
        image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
        picture = bench_picture(result(3))
        write_png(picture, tmp_path / "plot.png")
        with image_module.open(tmp_path / "plot.png") as image:
            assert (image.format, image.size) == ("PNG", (2 * picture.width, 2 * picture.height))
            colours = {colour for _, colour in image.getcolors(1 << 20)}
        assert {(211, 64, 42), (138, 143, 152), (43, 110, 168)} <= colours, "both kinds of bars and the ceiling"

    def test_letters_beyond_ascii_can_be_drawn(self, tmp_path: Path) -> None:
        pytest.importorskip("PIL.Image", reason="Pillow is not installed")
        write_png(Picture(200, 40, "", [Words(4, 20, "größer – 模型 …")]), tmp_path / "words.png")

    def test_without_pillow_a_png_is_refused_with_a_way_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        monkeypatch.setitem(sys.modules, "PIL.ImageFont", None)
        with pytest.raises(MissingExtraError, match=r"\.svg"):
            require_png()


STEP = Step(3, 50, 1, "cold, direct")


def test_steps_as_lines() -> None:
    stream = io.StringIO()
    step_lines(stream)(STEP)
    assert stream.getvalue() == "measuring: 3 of 50, round 1: cold, direct\n"


def test_steps_as_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = io.StringIO()
    with step_bar(stream) as progress:
        progress(STEP)
        progress(replace_done(STEP))
    assert "3 of 50" in stream.getvalue()
    assert "round 1: cold, direct" in stream.getvalue()


def replace_done(step: Step) -> Step:
    return step._replace(done=step.done + 1)


def test_an_interrupted_result_without_whole_rounds_is_said_to_have_none() -> None:
    shown = lines(replace(result(1), rounds_done=0, partial=True))
    assert shown[0] == "partial: interrupted in round 1 of 5"
    assert shown[1].startswith("0 whole rounds: these are single runs")
