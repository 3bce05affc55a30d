"""A picture of a few kinds of shapes, written as SVG by code of our own or as PNG by Pillow.

Knows nothing of what is drawn. Text is text: it is escaped for SVG, and control characters never reach either.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from weightlift.errors import MissingExtraError, printable

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

_SCALE: Final = 2
"""Pixels of a PNG per unit of a picture, so that it is sharp on dense screens."""

_FONT: Final = "system-ui, sans-serif"
_WORDS_MAX: Final = 200

Anchor = Literal["start", "middle", "end"]


class Box(NamedTuple):
    """A filled rectangle; ``title`` appears in an SVG when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str = ""


class Stroke(NamedTuple):
    """A straight line."""

    x1: float
    y1: float
    x2: float
    y2: float
    colour: str
    width: float = 1.0


class Dot(NamedTuple):
    """A filled circle."""

    x: float
    y: float
    radius: float
    colour: str
    title: str = ""


class Words(NamedTuple):
    """One line of text; ``y`` is its base line."""

    x: float
    y: float
    text: str
    size: int = 13
    colour: str = "#222222"
    anchor: Anchor = "start"
    bold: bool = False


Shape = Box | Stroke | Dot | Words


@dataclass(frozen=True, slots=True)
class Picture:
    """Shapes on white, later ones over earlier ones.

    Attributes:
        width: in units of a pixel at ordinary density.
        height: the same.
        title: what a screen reader says.
        shapes: what is drawn.
    """

    width: int
    height: int
    title: str
    shapes: Sequence[Shape]


def as_svg(picture: Picture) -> str:
    """The picture as an SVG document."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {picture.width} {picture.height}" '
        f'width="{picture.width}" height="{picture.height}" role="img" font-family="{_FONT}">'
    )
    background = f'<rect width="{picture.width}" height="{picture.height}" fill="#ffffff"/>'
    return "\n".join((head, f"<title>{_text(picture.title)}</title>", background, *_elements(picture), "</svg>\n"))


def _elements(picture: Picture) -> Iterator[str]:
    for shape in picture.shapes:
        if isinstance(shape, Box):
            place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"'
            yield f'<rect {place} fill="{shape.colour}">{_title(shape.title)}</rect>'
        elif isinstance(shape, Stroke):
            ends = f'x1="{shape.x1:.1f}" y1="{shape.y1:.1f}" x2="{shape.x2:.1f}" y2="{shape.y2:.1f}"'
            yield f'<line {ends} stroke="{shape.colour}" stroke-width="{shape.width:g}"/>'
        elif isinstance(shape, Dot):
            place = f'cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:g}"'
            yield f'<circle {place} fill="{shape.colour}">{_title(shape.title)}</circle>'
        else:
            weight = ' font-weight="600"' if shape.bold else ""
            yield (
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size}" fill="{shape.colour}" '
                f'text-anchor="{shape.anchor}"{weight}>{_text(shape.text)}</text>'
            )


def _title(text: str) -> str:
    return f"<title>{_text(text)}</title>" if text else ""


def _text(text: str) -> str:
    return escape(printable(text, _WORDS_MAX))


def require_png() -> None:
    """Find out whether PNG can be written, before there is anything to write.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    try:
        import PIL.ImageFont  # noqa: F401
    except ImportError as err:
        raise MissingExtraError(
            "a PNG needs the package Pillow",
            hint="pip install 'weightlift[plot]', or write an .svg, which needs nothing",
        ) from err


def write_png(picture: Picture, path: str | os.PathLike[str]) -> None:
    """Draw the picture into a PNG file of twice its size.

    Raises:
        MissingExtraError: Pillow is not installed.
        OSError: the file cannot be written.
    """
    require_png()
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (picture.width * _SCALE, picture.height * _SCALE), "#ffffff")
    canvas = ImageDraw.Draw(image)
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for shape in picture.shapes:
        if isinstance(shape, Box):
            corners = (shape.x, shape.y, shape.x + shape.width, shape.y + shape.height)
            canvas.rectangle([edge * _SCALE for edge in corners], fill=shape.colour)
        elif isinstance(shape, Stroke):
            ends = [edge * _SCALE for edge in (shape.x1, shape.y1, shape.x2, shape.y2)]
            canvas.line(ends, fill=shape.colour, width=max(1, round(shape.width * _SCALE)))
        elif isinstance(shape, Dot):
            edges = (shape.x - shape.radius, shape.y - shape.radius, shape.x + shape.radius, shape.y + shape.radius)
            canvas.ellipse([edge * _SCALE for edge in edges], fill=shape.colour)
        else:
            canvas.text(
                (shape.x * _SCALE, shape.y * _SCALE),
                printable(shape.text, _WORDS_MAX),
                fill=shape.colour,
                font=ImageFont.load_default(shape.size * _SCALE),
                anchor=anchors[shape.anchor],
                stroke_width=1 if shape.bold else 0,
                stroke_fill=shape.colour,
            )
    image.save(path, format="PNG")
