"""The page of a load: complete, self-contained, escaped, and really drawn by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, Final

import pytest
from msgspec.structs import replace
from PIL import Image

from weightlift.reports.charts import Mark, Series, line_chart, share_bar, tick_step
from weightlift.reports.page import report_page
from weightlift.reports.page_charts import speeds, stepped
from weightlift.units import GIB

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.types import LoadReport

VOID: Final = {"meta", "br", "path", "rect"}
ALLOWED: Final = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "div", "p", "h1", "h2"),
    *("dl", "dt", "dd", "small", "b", "i", "span", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "br"),
    *("svg", "g", "path", "rect", "text"),
}


class Outline(HTMLParser):
    """What a page is made of; raises where elements do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or (tag == "path" and not self.get_starttag_text().endswith("/>")):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(report: LoadReport, path: str = "/models/llama") -> str:
    return "".join(report_page(report, path))


def test_it_says_everything(full_report: LoadReport) -> None:
    words = Outline(page(full_report)).text
    for said in (
        *("llama", "723 tensors", "3.00 GiB", "cuda:0", "1.04 GB/s", "31% of the storage's 3.40 GB/s", "storage"),
        *("40.0 MiB", "swapped 45.0 MiB out", "programs waited 90 ms for memory", "2 workers × 4096 KiB"),
        *("pinned", "33% of the file was in the page cache", "8 slots of 4 MiB", "model-2.safetensors", "it was cold"),
        *("Left for other programs", "Taken by the load", "Swap", "Pressure", "Memory of the devices", "In flight"),
        *("read from storage", "arrived", "anonymous", "file-backed", "page cache", "budget", "floor, 512 MiB"),
    ):
        assert said in words


def test_one_file_that_runs_and_loads_nothing(full_report: LoadReport) -> None:
    text = page(full_report)
    outline = Outline(text)
    assert {tag for tag, _ in outline.elements} <= ALLOWED
    for _, attributes in outline.elements:
        assert not attributes.keys() & {"src", "href", "srcset", "action", "data", "xlink:href"}
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?:|javascript:", text)
    policy = next(attributes for tag, attributes in outline.elements if "http-equiv" in attributes)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_names_of_strangers_are_text(full_report: LoadReport) -> None:
    evil = "</h1><script>alert(1)</script>\x1b[2J\"'&{style}"
    report = replace(
        full_report,
        device=evil,
        reason=evil,
        files=tuple(replace(file, path=evil, reason=evil) for file in full_report.files),
    )
    outline = Outline(page(report, f"/models/{evil}"))
    assert {tag for tag, _ in outline.elements} <= ALLOWED
    assert "<script>alert(1)</script>\\x1b[2J" in outline.text
    assert "\x1b" not in outline.text


def test_a_load_without_samples_or_trouble_has_a_page_too(full_report: LoadReport) -> None:
    memory = replace(full_report.host_memory, peak_anonymous_bytes=None, terms=())
    bare = replace(
        full_report,
        samples=(),
        interventions=(),
        phases={},
        files=(),
        method_used={},
        nbytes=0,
        ceilings={},
        worker_seconds={},
        host_memory=memory,
        page_cache_before_bytes=None,
        page_cache_after_bytes=None,
        swap_in_bytes=None,
        swap_out_bytes=None,
        pressure_stall_seconds=None,
        floor_bytes=None,
    )
    words = Outline(page(bare)).text
    assert "The load was over before memory was looked at" in words
    assert "The machine stayed healthy. No trouble was seen; this system does not tell all." in words
    assert "unknown" in words


def test_unknown_memory_leaves_gaps_not_zeros(full_report: LoadReport) -> None:
    names = ("anonymous_bytes", "available_bytes", "page_cache_bytes", "swap_out_bytes", "machine_stall_seconds")
    unknown: dict[str, Any] = dict.fromkeys(names)
    samples = tuple(entry._replace(**unknown) for entry in full_report.samples)
    words = Outline(page(replace(full_report, samples=samples))).text
    assert "anonymous peak" not in words
    assert "swapped out peak" not in words
    assert "file-backed peak" in words


def test_many_files_are_counted(full_report: LoadReport) -> None:
    text = page(replace(full_report, files=full_report.files * 100))
    assert text.count("it was cold") == 200
    assert "and 100 more files" in text


def test_a_long_load_makes_no_longer_page(full_report: LoadReport) -> None:
    samples = tuple(full_report.samples[0]._replace(seconds=0.01 * (n + 1), landed_bytes=n << 20) for n in range(240))
    assert len(page(replace(full_report, samples=samples))) < 400_000


def test_speeds_are_differences_in_few_points(full_report: LoadReport) -> None:
    first = full_report.samples[0]
    samples = [first._replace(seconds=0.1 * (n + 1), read_bytes=n * 10**9, landed_bytes=n * 10**8) for n in range(300)]
    points = speeds(samples)
    assert 40 <= len(points) <= 80
    assert all(point[1:] == pytest.approx((10, 1), rel=1e-6) for point in points[1:])


def test_steps_hold_until_the_next_moment() -> None:
    assert stepped([1.0, 3.0], [5.0, 7.0]) == ([0.0, 1.0, 1.0, 3.0], [5.0, 5.0, 7.0, 7.0])


@pytest.mark.parametrize(
    ("wanted", "binary", "step"),
    [(0.3, False, 0.5), (1, False, 1), (2.1, False, 5), (70, False, 100), (3 * GIB, True, 4 * GIB), (1, True, 1)],
)
def test_ticks_read_well(wanted: float, binary: bool, step: float) -> None:
    assert tick_step(wanted, binary=binary) == pytest.approx(step)


def test_lines_break_where_nothing_is_known_and_marks_far_above_are_left_out() -> None:
    line = Series("x", "blue", [1.0, 2.0, None, 3.0, 4.0])
    drawn = line_chart(
        "t", [0, 1, 2, 3, 4], [line], end=4, text=str, marks=[Mark("near", 6.0), Mark("far away", 1000.0)]
    )
    assert len(re.findall(r'class="line blue"', drawn)) == 2
    assert "near" in drawn
    assert "far away" not in drawn


def test_a_bar_of_nothing_says_so() -> None:
    assert "nothing was measured" in share_bar([("a", "blue", 0.0)], str)


class Browser:
    """Headless Chromium, started for every picture with a fresh profile."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program = program
        self._folder = folder

    def picture(self, file: Path, *, width: int, height: int, dark: bool = False) -> Image.Image:
        """What the browser draws of a file."""
        out, profile = self._folder / "page.png", self._folder / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        command = [
            *(self._program, "--no-sandbox", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
            *(f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={out}"),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            file.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=100)
        with Image.open(out) as image:
            return image.convert("RGB")


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed (Debian: apt install chromium)")
    return Browser(program, tmp_path)


LIGHT: Final = {"ground": (246, 245, 241), "blue": (47, 111, 222), "amber": (217, 130, 43), "red": (209, 60, 60)}
DARK: Final = {"ground": (20, 22, 26), "blue": (110, 160, 255), "amber": (240, 163, 85), "red": (255, 123, 115)}


@pytest.mark.parametrize(("dark", "colours"), [(False, LIGHT), (True, DARK)])
def test_a_browser_draws_it(
    browser: Browser, tmp_path: Path, full_report: LoadReport, dark: bool, colours: dict[str, tuple[int, int, int]]
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(full_report), encoding="utf-8")
    image = browser.picture(file, width=1160, height=2600, dark=dark)
    assert image.size == (1160, 2600)
    counts = {colour: count for count, colour in image.getcolors(1 << 24) or ()}
    for name, colour in colours.items():
        assert counts.get(colour, 0) > (100_000 if name == "ground" else 300), name
    # The charts reach from left to right inside their cards: the line of the first one is somewhere in every part.
    chart = image.crop((60, 380, 1100, 900))
    for part in range(8):
        strip = chart.crop((part * 130, 0, part * 130 + 130, chart.height))
        assert any(colour == colours["blue"] for _, colour in strip.getcolors(1 << 24) or ()), f"part {part} is empty"


def test_nothing_sticks_out_on_a_narrow_screen(browser: Browser, tmp_path: Path, full_report: LoadReport) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(replace(full_report, reason="x" * 900), "/models/" + "y" * 90), encoding="utf-8")
    image = browser.picture(file, width=500, height=3000)
    margin = image.crop((image.width - 8, 0, image.width, image.height))
    assert margin.getcolors() == [(8 * 3000, LIGHT["ground"])]
