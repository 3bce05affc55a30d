"""The report of a load as text, from records made by hand."""

from __future__ import annotations

import io

import pytest
from msgspec.structs import replace

from weightlift.reports.console import make_console, show, text
from weightlift.reports.load import digest_lines, load_tables, seconds_text, speed_text
from weightlift.reports.progress import progress_bar, progress_lines
from weightlift.samples import Intervention
from weightlift.types import BudgetTerm, FileReport, HostMemoryReport, LoadReport
from weightlift.units import GIB, MIB


def file_report(name: str, *, direct: int = 0, buffered: int = 0, reason: str = "because") -> FileReport:
    return FileReport(path=name, used={"direct": direct, "buffered": buffered, "mmap": 0}, reason=reason)


REPORT = LoadReport(
    tensors=1234,
    nbytes=3 * GIB,
    seconds=2.0,
    phases={"open": 0.25, "plan": 0.0001, "read": 1.5, "finish": 0.25},
    device="cpu",
    engine="native",
    method_requested="auto",
    method_used={"direct": 2 * GIB, "buffered": GIB, "mmap": 0},
    reason="33% of the file was in the page cache",
    cache_requested="auto",
    cache_decided="drop",
    files=(file_report("one.safetensors", direct=2 * GIB), file_report("two.safetensors", buffered=GIB)),
    staging="none",
    staging_reason="the memory of the tensors is filled in place",
    workers=4,
    chunk_bytes=4 * MIB,
    host_memory=HostMemoryReport(
        budget_bytes=128 * MIB,
        staging_bytes=32 * MIB,
        description_bytes=400_000,
        peak_anonymous_bytes=33 * MIB,
        peak_file_bytes=None,
        peak_pinned_bytes=0,
        terms=(BudgetTerm(name="staging slots", nbytes=32 * MIB, reason="8 slots of 4 MiB"),),
    ),
    page_cache_before_bytes=GIB,
    page_cache_after_bytes=GIB,
    swap_in_bytes=0,
    swap_out_bytes=0,
    pressure_stall_seconds=0.0,
    ceilings={"storage": None, "memory_copy": None, "link": None},
    bottleneck="storage",
)


def plain(report: LoadReport, path: str = "model", *, verbose: bool = False) -> str:
    stream = io.StringIO()
    show(stream, *load_tables(report, path, verbose=verbose))
    return stream.getvalue()


def fact(report: LoadReport, label: str) -> str:
    lines = [line for line in plain(report).splitlines() if line.startswith(f"{label}  ")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix(label).strip()


def test_the_summary_names_what_was_measured() -> None:
    assert fact(REPORT, "loaded    ") == "1,234 tensors, 3.00 GiB in 2 files, on cpu"
    assert fact(REPORT, "time      ") == "2.00 s, 1.61 GB/s  (open 250 ms, read 1.50 s, finish 250 ms)"
    assert fact(REPORT, "read path ") == "auto → direct 2.00 GiB, buffered 1.00 GiB"
    assert fact(REPORT, "why       ") == REPORT.reason
    assert fact(REPORT, "page cache") == "auto → drop; held 1.00 GiB of the files before, 1.00 GiB after"
    assert fact(REPORT, "engine    ") == "native, 4 workers × 4.00 MiB chunks"
    assert fact(REPORT, "bottleneck") == "storage"
    assert fact(REPORT, "memory    ").endswith("at peak: anonymous 33.0 MiB, file-backed unknown")


def test_one_method_alone_needs_no_sizes() -> None:
    report = replace(REPORT, method_used={"direct": 5, "buffered": 0, "mmap": 0})
    assert fact(report, "read path ") == "auto → direct"


def test_unknown_is_said_and_never_zero() -> None:
    report = replace(REPORT, page_cache_before_bytes=None, page_cache_after_bytes=None, pressure_stall_seconds=None)
    assert "unknown" in fact(report, "page cache")
    assert "trouble" not in plain(replace(report, swap_in_bytes=None, swap_out_bytes=None))


def test_trouble_is_shown_only_when_there_was_some() -> None:
    assert "trouble" not in plain(REPORT)
    report = replace(REPORT, swap_out_bytes=5 * MIB, pressure_stall_seconds=1.5)
    assert fact(report, "trouble   ") == "the machine swapped 5.00 MiB out, programs waited 1.50 s for memory"


def test_ceilings_are_shown_with_the_fraction_reached() -> None:
    report = replace(REPORT, ceilings={"storage": 3.22, "memory_copy": None, "link": None})
    assert fact(report, "bottleneck") == "storage  (ceilings: storage 3.22 GB/s, 50% reached)"


def test_mapped_tensors_have_no_speed() -> None:
    report = replace(REPORT, engine="none", method_used={"direct": 0, "buffered": 0, "mmap": 9})
    assert "GB/s" not in plain(report)
    assert "engine" not in plain(report)


@pytest.mark.parametrize(("count", "verbose", "shown"), [(1, False, 0), (2, False, 2), (30, False, 0), (30, True, 30)])
def test_files_are_listed_when_few_or_wanted(count: int, verbose: bool, shown: int) -> None:
    files = tuple(file_report(f"shard-{number:02}.safetensors") for number in range(count))
    assert plain(replace(REPORT, files=files), verbose=verbose).count(".safetensors") == shown


def test_the_budget_is_a_sum_when_wanted() -> None:
    assert "8 slots of 4 MiB" not in plain(REPORT)
    assert "8 slots of 4 MiB" in plain(REPORT, verbose=True)


def test_hostile_text_is_neither_markup_nor_control() -> None:
    hostile = "[red]\x1b[31mx\x1b]0;title\x07[/red]\n:smile:\u202e"
    report = replace(
        REPORT,
        reason=hostile,
        files=(file_report(hostile, reason=hostile), file_report("b")),
        digests={hostile: "00"},
    )
    printed = plain(report, hostile) + "\n".join(digest_lines(report))
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "\u202e" not in printed
    assert printed.count(r"[red]\x1b[31mx\x1b]0;title\x07[/red]\n:smile:\u202e") == 5


def test_plain_output_has_no_trailing_blanks_and_no_wrapping() -> None:
    printed = plain(replace(REPORT, reason="word " * 120))
    assert all(line == line.rstrip() for line in printed.splitlines())
    assert ("word " * 120).strip() in printed


def test_a_terminal_gets_its_width() -> None:
    stream = io.StringIO()
    console = make_console(stream, width=60)
    console.print(*load_tables(replace(REPORT, reason="word " * 60), "model"), sep="\n")
    assert max(len(line.rstrip()) for line in stream.getvalue().splitlines()) <= 60


@pytest.mark.parametrize(("variable", "coloured"), [(None, True), ("1", False)])
def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch, variable: str | None, coloured: bool) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable:
        monkeypatch.setenv("NO_COLOR", variable)
    stream = io.StringIO()
    show(stream, text("trouble", "yellow"))
    assert ("\x1b[33m" in stream.getvalue()) is coloured


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.00123, "1.23 ms"), (0.25, "250 ms"), (0.9996, "1.00 s"), (12.345, "12.35 s"), (125, "2 min 5 s")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert seconds_text(seconds) == shown


@pytest.mark.parametrize(
    ("speed", "shown"), [(0.001, "below 0.01 GB/s"), (0.5, "0.50 GB/s"), (9.996, "10.0 GB/s"), (52.4, "52.4 GB/s")]
)
def test_speeds(speed: float, shown: str) -> None:
    assert speed_text(speed) == shown


def test_progress_lines_come_once_a_second_and_at_the_end() -> None:
    stream = io.StringIO()
    now = iter([0.0, 0.0, 0.4, 1.1, 1.2, 1.3])
    progress = progress_lines(stream, clock=lambda: next(now))
    for done in (0, 40, 110, 120, 200):
        progress(done * MIB, 200 * MIB)
    assert stream.getvalue().splitlines() == [
        "loading: 0%, 0 B of 200 MiB",
        "loading: 55%, 110 MiB of 200 MiB, 0.10 GB/s",
        "loading: 100%, 200 MiB of 200 MiB, 0.16 GB/s",
    ]


def test_progress_of_nothing_is_complete() -> None:
    stream = io.StringIO()
    progress_lines(stream, clock=lambda: 0.0)(0, 0)
    assert stream.getvalue() == "loading: 100%, 0 B of 0 B\n"


def test_the_bar_shows_bytes_and_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = io.StringIO()
    with progress_bar(stream) as progress:
        progress(GIB, 4 * GIB)
        progress(2 * GIB, 4 * GIB)
    assert "2.00 GiB of 4.00 GiB" in stream.getvalue()
    assert "50 %" in stream.getvalue()


def test_what_was_done_about_memory_is_told() -> None:
    steps = (
        Intervention(0.52, "2 workers × 1024 KiB", "20 MiB are left"),
        Intervention(0.7, "1 workers × 1024 KiB", "10 MiB are left"),
    )
    shown = plain(replace(REPORT, interventions=steps))
    assert "trouble" in shown
    assert "at 0.5 s memory got short (2 workers × 1024 KiB), 1 more step like that" in shown
    assert "memory got short" not in plain(REPORT)
