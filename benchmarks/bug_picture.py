"""Draws the results of ``bug.py`` as SVG: one panel per way of loading, anonymous memory and page cache over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

WIDTH, HEIGHT = 1000, 366
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 112, 46
GAP = 14
MIB = 1 << 20

TITLES = {
    "safetensors, pinned": ("safetensors library", "sources pinned for writing,", "as amdgpu does (emulated)"),
    "safetensors": ("safetensors library", "the same mappings,", "only read"),
    "mmap": ("weightlift mmap", "shared read-only mapping,", "staged"),
    "buffered": ("weightlift buffered", "small reads into slots,", "cache left as found"),
    "direct": ("weightlift direct", "past the page cache", "into slots"),
}

STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-size: 12px; }
text { fill: #5c606b; } .ground { fill: #ffffff; } .panel { fill: #f6f5f1; }
.title, .head { font-weight: 650; fill: #1c1d21; } .title { font-size: 13.5px; } .head { font-size: 17px; }
.anonymous { fill: #d9652b; } .cache { fill: #9db6cf; } .limit { stroke: #1c1d21; stroke-dasharray: 5 4; }
.good { fill: #2f7d32; font-weight: 650; } .bad { fill: #c62828; font-weight: 650; }
.cross { stroke: #c62828; stroke-width: 2.5; } .axis { stroke: #d5d2c9; }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa0ad; } .ground { fill: #0d1117; } .panel { fill: #1a1e26; } .title, .head { fill: #e9eaee; }
  .anonymous { fill: #f07f45; } .cache { fill: #4f6a86; } .limit { stroke: #e9eaee; } .good { fill: #6cc26f; }
  .bad { fill: #ff7b73; } .cross { stroke: #ff7b73; } .axis { stroke: #3a404c; }
}
"""


def draw(result: Mapping[str, Any]) -> str:
    """The picture.

    Args:
        result: what ``bug.json`` holds.
    """
    runs = result["runs"]
    limit, size = result["limit_bytes"], result["checkpoint_bytes"]
    seconds = max(run["seconds"] for run in runs)
    width = (WIDTH - LEFT - RIGHT - GAP * (len(runs) - 1)) / len(runs)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" role="img"><title>Memory while a checkpoint is loaded that is larger than the memory '
            f'allowed</title><style>{STYLE}</style><rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>'
        ),
        (
            f'<text class="head" x="{LEFT}" y="28">A checkpoint of {size / MIB:.0f} MiB in {limit / MIB:.0f} MiB of '
            "memory</text>"
        ),
        *_legend(limit),
        *_scale(limit),
    ]
    for index, run in enumerate(runs):
        parts += _panel(run, LEFT + index * (width + GAP), width, limit, seconds)
    parts.append("</svg>\n")
    return "\n".join(parts)


def _legend(limit: int) -> Iterator[str]:
    square = 'y="40" width="11" height="11" rx="2"/>'
    entries = (
        (f'<rect class="anonymous" x="{LEFT}" {square}', 17, "anonymous: only swap can take it back"),
        (f'<rect class="cache" x="{LEFT + 290}" {square}', 307, "page cache: dropped when needed"),
        (f'<path class="limit" d="M{LEFT + 560} 46h22"/>', 589, f"limit, {limit / MIB:.0f} MiB"),
    )
    for shape, offset, words in entries:
        yield f'{shape}<text x="{LEFT + offset}" y="50">{words}</text>'


def _y(value: float, limit: int) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(value / (limit * 1.1), 1.0)


def _scale(limit: int) -> Iterator[str]:
    for share in (0.0, 0.5, 1.0):
        yield (
            f'<text x="{LEFT - 8}" y="{_y(share * limit, limit) + 4:.1f}" text-anchor="end">'
            f"{share * limit / MIB:.0f}{' MiB' if share else ''}</text>"
        )


def _panel(run: Mapping[str, Any], left: float, width: float, limit: int, seconds: float) -> Iterator[str]:
    floor = HEIGHT - BOTTOM
    title, *lines = TITLES[run["way"]]
    yield f'<rect class="panel" x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{floor - TOP}" rx="3"/>'
    yield f'<text class="title" x="{left:.1f}" y="72">{title}</text>'
    for number, line in enumerate(lines):
        yield f'<text x="{left:.1f}" y="{87 + 14 * number}">{line}</text>'
    points = [(0.0, 0, 0), *map(tuple, run["samples"])]
    if not run["done"]:
        # What follows is only the kernel clearing up.
        points = points[: 1 + max(range(len(points)), key=lambda index: points[index][1])]
    xs = [left + width * moment / seconds for moment, *_ in points]
    nothing = [0] * len(points)
    anonymous = [held for _, held, _ in points]
    both = [min(held + cached, limit) for _, held, cached in points]
    yield _area("cache", xs, anonymous, both, limit)
    yield _area("anonymous", xs, nothing, anonymous, limit)
    yield f'<path class="axis" d="M{left:.1f} {floor}h{width:.1f}"/>'
    yield f'<path class="limit" d="M{left:.1f} {_y(limit, limit):.1f}h{width:.1f}"/>'
    if not run["done"]:
        x, y = xs[-1], _y(anonymous[-1], limit)
        yield f'<path class="cross" d="M{x - 6:.1f} {y - 6:.1f}l12 12m0 -12l-12 12"/>'
    kind, words = ("good", "loaded in") if run["done"] else ("bad", "killed after")
    yield f'<text class="{kind}" x="{left:.1f}" y="{floor + 18}">{words} {run["seconds"]:.1f} s</text>'
    most = -(-run["peak_anonymous_bytes"] // MIB)
    yield f'<text x="{left:.1f}" y="{floor + 34}">anonymous ≤ {max(most, 1)} MiB</text>'


def _area(kind: str, xs: Sequence[float], lower: Sequence[float], upper: Sequence[float], limit: int) -> str:
    above = (f"{x:.1f} {_y(value, limit):.1f}" for x, value in zip(xs, upper, strict=True))
    below = (f"{x:.1f} {_y(value, limit):.1f}" for x, value in zip(reversed(xs), reversed(lower), strict=True))
    return f'<path class="{kind}" d="M{"L".join((*above, *below))}Z"/>'
