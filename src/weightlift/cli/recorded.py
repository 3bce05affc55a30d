"""The files that ``weightlift load`` writes about a load: a trace and a page."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from weightlift.errors import WriteError
from weightlift.recording import Recording
from weightlift.writing import NewFile

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

    Both are begun first, so that a load is not in vain for want of a place. The trace is written for a load that failed
    too; a page is not. Neither is ever there in part, and one that was there before stays if it cannot be replaced.

    Args:
        trace: where the trace goes, if it is wanted.
        page: where the page goes, if it is wanted.
        path: what is loaded, as the user named it.

    Raises:
        WriteError: a file cannot be written.
    """
    written = Written(_recording(steps=trace is not None) if trace or page else None)
    with contextlib.ExitStack() as unfinished:
        trace_file, page_file = (unfinished.enter_context(NewFile(name)) if name else None for name in (trace, page))
        try:
            yield written
        except BaseException as failure:
            # A trace that cannot be written must not hide why the load failed.
            try:
                _write_trace(trace_file, written)
            except WriteError as err:
                failure.add_note(err.message)
            raise
        _write_trace(trace_file, written)
        if page_file is not None and written.report is not None:
            from weightlift.reports.page import report_page

            with page_file.writing() as file:
                file.writelines(report_page(written.report, path))


def _write_trace(trace_file: NewFile | None, written: Written) -> None:
    if trace_file is None or written.recording is None:
        return
    from weightlift.reports.trace import write_trace

    with trace_file.writing() as file:
        write_trace(file, written.recording, written.report.samples if written.report else ())


def _recording(*, steps: bool) -> Recording:
    return Recording() if steps else Recording(steps_max=0)
