"""A fit report as a table for people; takes the finished record and asks nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlift.fitting import Verdict
from weightlift.reports.console import column_table, fact_grid, joined, text
from weightlift.units import format_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from weightlift.fitting import DeviceFit, FitReport

_STYLES = {Verdict.FITS: "green", Verdict.SWAPS: "yellow", Verdict.LACKS: "red", Verdict.UNKNOWN: ""}


def fit_tables(fit: FitReport, path: str | os.PathLike[str]) -> Iterator[RenderableType]:
    """What a load would take and what there is.

    Args:
        fit: the report.
        path: what would be loaded, as the user named it.
    """
    grid = fact_grid()
    grid.add_row("dry run of", text(path))
    lacking = f", {format_bytes(fit.missing_bytes)} too little" if fit.missing_bytes else ""
    grid.add_row("verdict", text(f"{fit.verdict.value}{lacking}", _STYLES[fit.verdict]))
    for warning in fit.warnings():
        grid.add_row("warning", text(warning, "yellow"))
    if fit.cache is not None:
        cached = "unknown" if fit.cache.cached_bytes is None else format_bytes(fit.cache.cached_bytes)
        what = f"holds {cached} of {format_bytes(fit.cache.file_bytes)}; {'keep' if fit.cache.keep else 'drop'}"
        grid.add_row("page cache", text(f"{what}: {fit.cache.reason}"))
    yield grid
    yield text("")
    yield _needs(fit)
    yield text("")
    yield _limits(fit)


def _needs(fit: FitReport) -> Table:
    table = column_table("needed", "bytes", "of", "remark", right=("bytes", "of"))
    if fit.tensor_bytes or not (fit.mapped_bytes or fit.devices):
        _row(table, "tensors in host memory", fit.tensor_bytes, None, "")
    if fit.mapped_bytes:
        remark = "read when first touched; what is written to takes memory of its own"
        _row(table, "tensors mapped from files", fit.mapped_bytes, None, remark)
    _row(table, "staging, at most", fit.staging_bytes, fit.budget_bytes, "the host-memory budget (--host-memory)")
    _row(table, "description", fit.description_bytes, None, "names, shapes and places; in memory already")
    for device in fit.devices:
        _row(table, f"tensors on {device.device}", device.tensor_bytes, device.total_bytes, _device_remark(device))
    return table


def _row(table: Table, name: str, nbytes: int, whole: int | None, remark: str) -> None:
    table.add_row(
        text(name), text(format_bytes(nbytes)), text("" if whole is None else format_bytes(whole)), text(remark)
    )


def _device_remark(device: DeviceFit) -> str:
    if device.free_bytes is None:
        return "how much is free there is unknown"
    return joined(
        f"{format_bytes(device.free_bytes)} free",
        f"{format_bytes(device.reusable_bytes)} held by the framework for reuse" if device.reusable_bytes else "",
        f"{format_bytes(device.missing_bytes)} too little" if device.missing_bytes else "",
    )


def _limits(fit: FitReport) -> Table:
    table = column_table("available", "bytes", "of", right=("bytes", "of"))
    if fit.room is None:
        table.add_row(text("host memory"), text("unknown"), text(""))
        return table
    for room in fit.room.rooms:
        name = f"control group {room.group} (version {room.version})" if room.version else "the machine"
        table.add_row(text(name), text(format_bytes(room.available_bytes)), text(format_bytes(room.limit_bytes)))
    table.add_row(text("swap"), text(format_bytes(fit.room.swap_free_bytes)), text(""))
    return table
