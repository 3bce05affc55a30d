"""The files that ``weightlift load`` writes about a load: a trace and a page."""

from __future__ import annotations

import contextlib
import os
from typing import IO, TYPE_CHECKING

from weightlift.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.types import LoadReport


class Written:
    """What one load is recorded in.

    Attributes:
        recording: for the load's ``recording=``; ``None`` where nothing is to be recorded.
        report: to be set once the load is done.
    """

    def __init__(self, recording: Recording | None) -> None:
        self.recording = recording
        self.report: LoadReport | None = None


@contextlib.contextmanager
def recorded(trace: str | None, page: str | None, path: str) -> Iterator[Written]:
    """Record a load, and write the files when it has ended.

    Whether they can be written is found out first, so that a load is not in vain. The trace is written for a load that
    failed too; a page is not, and one that is there already stays.

    Args:
        trace: where the trace goes, if it is wanted.
        page: where the page goes, if it is wanted.
        path: what is loaded, as the user named it.

    Raises:
        OSError: a file cannot be written.
    """
    new = [name for name in (trace, page) if name and not os.path.exists(name)]
    for name in (trace, page):
        if name:
            open(name, "a", encoding="utf-8").close()
    written = Written(_recording(steps=trace is not None) if trace or page else None)
    try:
        yield written
    finally:
        if trace and written.recording is not None:
            from weightlift.reports.trace import write_trace

            with _create(trace) as file:
                write_trace(file, written.recording, written.report.samples if written.report else ())
        if page and written.report is None and page in new:
            os.unlink(page)
    if page and written.report is not None:
        from weightlift.reports.page import report_page

        with _create(page) as file:
            file.writelines(report_page(written.report, path))


def _create(name: str) -> IO[str]:
    return open(name, "w", encoding="utf-8", errors="backslashreplace")


def _recording(*, steps: bool) -> Recording:
    return Recording() if steps else Recording(steps_max=0)
