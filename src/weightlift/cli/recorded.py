"""The files that ``weightlift load`` writes about a load: a trace and a page."""

from __future__ import annotations

import contextlib
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
    """Open the files first, so that a load is not in vain, and write them when the load has ended.

    Args:
        trace: where the trace goes, if it is wanted. It is written for a load that failed too.
        page: where the page goes, if it is wanted.
        path: what is loaded, as the user named it.
    """
    with contextlib.ExitStack() as stack:
        trace_file, page_file = (stack.enter_context(_create(name)) if name else None for name in (trace, page))
        written = Written(_recording(steps=trace is not None) if trace or page else None)
        try:
            yield written
        finally:
            if trace_file is not None and written.recording is not None:
                from weightlift.reports.trace import write_trace

                write_trace(trace_file, written.recording, written.report.samples if written.report else ())
        if page_file is not None and written.report is not None:
            from weightlift.reports.page import report_page

            page_file.writelines(report_page(written.report, path))


def _create(name: str) -> IO[str]:
    return open(name, "w", encoding="utf-8", errors="backslashreplace")


def _recording(*, steps: bool) -> Recording:
    return Recording() if steps else Recording(steps_max=0)
