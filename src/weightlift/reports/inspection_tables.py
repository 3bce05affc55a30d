"""An inspection as tables for people.

Tensors are plain lines with the name last: hundreds of thousands of them print in a second, and a long name breaks
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightlift.errors import printable
from weightlift.reports.console import column_table, counted, fact_grid, text
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from weightlift.reports.inspection import Inspection
    from weightlift.reports.model_summary import ModelSummary

_NAME_CHARACTERS: Final = 400
_METADATA_CHARACTERS: Final = 200
_NUMBERS: Final = ("tensors", "parameters", "weights", "bits", "bytes", "file")


def inspect_tables(inspection: Inspection, *, limit: int | None = None) -> Iterator[RenderableType]:
    """Totals, then data types, files and metadata.

    Args:
        inspection: what the checkpoint holds.
        limit: most files and metadata entries shown; ``None`` for all.
    """
    yield _totals(inspection)
    if inspection.model is not None and inspection.model.facts:
        yield text("")
        yield _model(inspection.model)
    if inspection.model is not None and inspection.model.mix:
        yield text("")
        yield _mix(inspection.model)
    if inspection.dtypes:
        yield text("")
        yield _dtypes(inspection)
    if len(inspection.files) > 1:
        yield text("")
        yield _files(inspection, limit)
    if inspection.metadata:
        yield text("")
        yield text("metadata", "bold")
        yield _metadata(inspection, limit)
    if inspection.listed:
        yield text("")


def tensor_lines(inspection: Inspection) -> Iterator[str]:
    """One line per listed tensor: data type, size, shape, name; then how many were left out."""
    listed = inspection.listed
    if not listed:
        return
    shapes = [" × ".join(map(str, tensor.shape)) or "scalar" for tensor in listed]
    wide = max(5, *map(len, shapes))
    kind = max(5, *(len(tensor.dtype.name) for tensor in listed))
    yield f"{'dtype':{kind}}  {'size':>9}  {'shape':{wide}}  name"
    for tensor, shape in zip(listed, shapes, strict=True):
        name = printable(tensor.name, _NAME_CHARACTERS)
        yield f"{tensor.dtype.name:{kind}}  {format_bytes(tensor.nbytes):>9}  {shape:{wide}}  {name}"
    left = inspection.tensors - len(listed)
    if left:
        yield f"… and {left:,} more: --limit 0 lists all, --names and --sort choose which"


def _totals(inspection: Inspection) -> Table:
    grid = fact_grid()
    of_all = f" of {inspection.tensors_total:,}" if inspection.tensors != inspection.tensors_total else ""
    grid.add_row("checkpoint", text(inspection.path))
    model = inspection.model
    if model is not None:
        quantised = f", quantised as {model.kind}" if model.kind != inspection.file_format else ""
        grid.add_row("format", text(f"{inspection.file_format}{quantised}"))
    for note in inspection.notes:
        grid.add_row("note", text(note))
    grid.add_row("tensors", text(f"{inspection.tensors:,}{of_all} in {counted(len(inspection.files), 'file')}"))
    grid.add_row("parameters", text(f"{inspection.parameters:,}{_rounded(inspection.parameters)}"))
    grid.add_row("size", text(f"{format_bytes(inspection.nbytes)} ({inspection.nbytes:,} bytes)"))
    if model is not None and model.bits_per_weight is not None:
        grid.add_row("bits a weight", text(f"{model.bits_per_weight:.3g} over {model.weights:,} weights"))
    grid.add_row("description", text(f"{format_bytes(inspection.description_bytes)} of memory"))
    return grid


def _model(model: ModelSummary) -> Table:
    grid = fact_grid()
    for name, value in model.facts.items():
        shown = f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
        grid.add_row(text(name.replace("_", " ")), text(printable(shown, _METADATA_CHARACTERS)))
    return grid


def _mix(model: ModelSummary) -> Table:
    table = column_table("bits a weight", "linears", "weights", "bytes", right=("bits a weight", "linears", *_NUMBERS))
    for part in model.mix:
        table.add_row(
            text(f"{part.bits:g}"),
            text(f"{part.linears:,}"),
            text(f"{part.weights:,}"),
            text(format_bytes(part.nbytes)),
        )
    return table


def _rounded(count: int) -> str:
    for factor, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= factor:
            return f" ({count / factor:.3g} {name})"
    return ""


def _dtypes(inspection: Inspection) -> Table:
    table = column_table("dtype", "tensors", "parameters", "bits", "bytes", "share", right=(*_NUMBERS, "share"))
    for part in inspection.dtypes:
        share = f"{part.nbytes / inspection.nbytes:.1%}" if inspection.nbytes else "–"
        table.add_row(
            text(part.name),
            text(f"{part.tensors:,}"),
            text(f"{part.parameters:,}"),
            text(f"{8 * part.nbytes / part.parameters:.4g}" if part.parameters else "–"),
            text(format_bytes(part.nbytes)),
            text(share),
        )
    return table


def _files(inspection: Inspection, limit: int | None) -> Table:
    table = column_table("tensors", "parameters", "bytes", "path", right=_NUMBERS)
    shown = inspection.files[:limit]
    for part in shown:
        table.add_row(
            text(f"{part.tensors:,}"), text(f"{part.parameters:,}"), text(format_bytes(part.nbytes)), text(part.name)
        )
    if len(shown) < len(inspection.files):
        left = counted(len(inspection.files) - len(shown), "file")
        table.add_row("", "", "", text(f"… and {left} more"))
    return table


def _metadata(inspection: Inspection, limit: int | None) -> Table:
    grid = fact_grid()
    entries = list(inspection.metadata.items())
    for key, value in entries[:limit]:
        grid.add_row(text(printable(key)), text(printable(str(value), _METADATA_CHARACTERS)))
    if limit is not None and len(entries) > limit:
        grid.add_row("", text(f"… and {len(entries) - limit:,} more"))
    return grid
