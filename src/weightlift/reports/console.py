"""Writing to a stream that may or may not be a terminal.

On a terminal, rich lays text out to its width, with colour unless ``NO_COLOR`` says otherwise. Anywhere else the same
content comes as plain lines, one per row however long, for ``grep`` and files.

Everything given to a table here is text and never markup: names in a checkpoint are a stranger's.
"""

from __future__ import annotations

import io
from typing import IO, TYPE_CHECKING, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightlift.errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

_PLAIN_WIDTH: Final = 4000
_LONGEST_TEXT: Final = 1000


def make_console(stream: IO[str], *, width: int | None = None) -> Console:
    """A console that takes text literally: no markup, no emoji codes, no highlighting of numbers."""
    return Console(file=stream, markup=False, emoji=False, highlight=False, width=width)


def show(stream: IO[str], *renderables: RenderableType) -> None:
    """Print tables and text to a stream."""
    console = make_console(stream)
    if console.is_terminal:
        console.print(*renderables, sep="\n")
        return
    lines = io.StringIO()
    make_console(lines, width=_PLAIN_WIDTH).print(*renderables, sep="\n")
    stream.writelines(f"{line.rstrip()}\n" for line in lines.getvalue().splitlines())


def text(value: object, style: str = "") -> Text:
    """A cell that shows a value as it is, control characters escaped."""
    return Text(printable(str(value), _LONGEST_TEXT), style=style)


def fact_grid() -> Table:
    """A borderless table of labels and what they say."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def column_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table with a rule under its head.

    Args:
        *columns: the heads.
        right: those whose cells are numbers.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        number = column in right
        table.add_column(Text(column), justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def joined(*parts: str) -> str:
    """The parts that say something, with commas between them."""
    return ", ".join(part for part in parts if part)


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 file``, ``2,345 files``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
