"""Progress of a load or a benchmark: a bar on a terminal, a line now and then anywhere else.

For loads both are functions of ``(bytes done, bytes in all)`` for ``progress=``. No thread draws here: the load's own
calls do.
"""

from __future__ import annotations

import contextlib
import time
from typing import IO, TYPE_CHECKING, Final

from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from weightlift.reports.console import make_console
from weightlift.reports.load import speed_text
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Task

    from weightlift.bench.rounds import Step

_LINE_SECONDS: Final = 1.0


class _SizeColumn(ProgressColumn):
    """Bytes done of bytes in all, in the units of the reports."""

    def render(self, task: Task) -> Text:
        total = "?" if task.total is None else format_bytes(int(task.total))
        return Text(f"{format_bytes(int(task.completed))} of {total}", style="progress.download")


class _SpeedColumn(ProgressColumn):
    """Recent throughput in GB/s."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else speed_text(speed / 1e9), style="progress.data.speed")


@contextlib.contextmanager
def progress_bar(stream: IO[str]) -> Iterator[Callable[[int, int], None]]:
    """Draw a bar that is gone when the load is over.

    Args:
        stream: a terminal.

    Yields:
        The function for ``progress=``.
    """
    bar = Progress(
        TextColumn("loading"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        _SizeColumn(),
        _SpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=make_console(stream),
        auto_refresh=False,
        transient=True,
    )
    task: TaskID | None = None

    def update(done: int, total: int) -> None:
        nonlocal task
        if task is None:
            task = bar.add_task("", total=total)
        bar.update(task, completed=done, total=total, refresh=True)

    with bar:
        yield update


def progress_lines(stream: IO[str], *, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """Write a line at the start, then one a second at most, and one at the end.

    Args:
        stream: where to.
        clock: seconds from any start.

    Returns:
        The function for ``progress=``.
    """
    started = clock()
    last: float | None = None

    def update(done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if last is not None and now - last < _LINE_SECONDS and done < total:
            return
        last = now
        elapsed = now - started
        speed = f", {speed_text(done / elapsed / 1e9)}" if elapsed > 0 and done else ""
        share = done / total if total else 1.0
        stream.write(f"loading: {share:.0%}, {format_bytes(done)} of {format_bytes(total)}{speed}\n")
        stream.flush()

    return update


@contextlib.contextmanager
def step_bar(stream: IO[str]) -> Iterator[Callable[[Step], None]]:
    """Draw a bar of a benchmark's loads that is gone when it is over.

    Args:
        stream: a terminal.

    Yields:
        The function to call before each load.
    """
    bar = Progress(
        TextColumn("measuring"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
        console=make_console(stream),
        auto_refresh=False,
        transient=True,
    )
    task: TaskID | None = None

    def update(step: Step) -> None:
        nonlocal task
        if task is None:
            task = bar.add_task("", total=step.total)
        words = f"round {step.round}: {step.what}"
        bar.update(task, completed=step.done, total=step.total, description=words, refresh=True)

    with bar:
        yield update


def step_lines(stream: IO[str]) -> Callable[[Step], None]:
    """Write a line before each load of a benchmark.

    Args:
        stream: where to.
    """

    def update(step: Step) -> None:
        stream.write(f"measuring: {step.done} of {step.total}, round {step.round}: {step.what}\n")
        stream.flush()

    return update
