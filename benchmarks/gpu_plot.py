"""Draws ``results/gpu.json``: how near to the ceiling every loader comes in every state, and one card beside several.

``python benchmarks/gpu_plot.py`` writes ``docs/pictures/gpu.svg``: one row a state, one mark a loader; the further
right, the nearer to what the machine can do. A loader run with several settings is drawn at its best one in each state.
Beside it ``cards.svg``, where several cards were measured: speeds onto one and onto all, under the links' own.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot_command import plot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "gpu.json"
PICTURE = ROOT.parent / "docs" / "pictures" / "gpu.svg"
OURS = "weightlift"
COLOURS = ("#8a8f98", "#c2803a", "#5b8c5a", "#9a6fb0", "#4f86b5", "#b05f6d")
MARKS = ("circle", "square", "diamond", "triangle", "square", "diamond")
FONT = 'font-family="system-ui, sans-serif" font-size="13" fill="#222"'
HEADING = "Fraction of the ceiling, by state"
WIDTH, LEFT, RIGHT, ROW, TOP = 860, 130, 30, 44, 96
CARDS = (
    ("one card", "its link", "link to the first, pinned", "", "#b9bec6"),
    ("", "first load", "weightlift, one card", "", "#e58f80"),
    ("", "later loads", "weightlift, one card", "second_", "#d3402a"),
    ("all", "their links", "link, pinned", "", "#b9bec6"),
    ("", "reading the page cache alone", "raw buffered", "", "#d5d8dd"),
    ("", "first load", "weightlift, several cards", "", "#e58f80"),
    ("", "later loads", "weightlift, several cards", "second_", "#d3402a"),
)
"""Bars of the second picture: group, label, how the case's name begins, which of its figures, colour."""
BAR = 30


def families(worst: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Fraction of the ceiling per loader and state, the best of its settings."""
    found: dict[str, dict[str, float]] = {}
    for name, row in worst.items():
        # Settings follow the loader's name after a comma.
        best = found.setdefault(name.partition(", ")[0], {})
        for state, fraction in row["states"].items():
            best[state] = max(best.get(state, 0.0), fraction)
    return dict(sorted(found.items(), key=lambda item: (item[0] != OURS, -min(item[1].values()))))


def mark(kind: str, x: float, y: float, colour: str, title: str) -> str:
    """One mark with its tooltip."""
    shapes = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}"/>',
        "square": f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{colour}"/>',
        "diamond": f'<path d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z" fill="{colour}"/>',
        "triangle": f'<path d="M{x:.1f} {y - 6.5:.1f}l6.5 12h-13z" fill="{colour}"/>',
        "star": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8.5" fill="{colour}" stroke="#fff" stroke-width="2"/>',
    }
    return f"<g>{shapes[kind]}<title>{html.escape(title)}</title></g>"


def draw(worst: Mapping[str, Mapping[str, Any]], caption: str) -> str:
    """The picture."""
    loaders = families(worst)
    states = list(dict.fromkeys(state for row in loaders.values() for state in row))
    height = TOP + ROW * len(states) + 46
    span = WIDTH - LEFT - RIGHT
    looks = {name: ("#d3402a", "star") for name in loaders if name == OURS}
    others = [name for name in loaders if name != OURS]
    looks |= {name: (COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]) for number, name in enumerate(others)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {FONT}>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="20" y="28" font-size="16" font-weight="600">{HEADING}</text>',
        f'<text x="20" y="48" fill="#666">{html.escape(caption)}</text>',
    ]
    x = 20.0
    for name in (*[name for name in loaders if name == OURS], *others):
        colour, kind = looks[name]
        parts.append(mark(kind, x + 8, 70, colour, name))
        parts.append(f'<text x="{x + 21:.0f}" y="75">{html.escape(name)}</text>')
        x += 34 + 7.4 * len(name)
    for tenth in range(0, 11, 2):
        at = LEFT + span * tenth / 10
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - 40}" stroke="#e6e6e6"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 20}" text-anchor="middle" fill="#666">{tenth * 10} %</text>')
    for number, state in enumerate(states):
        y = TOP + ROW * (number + 0.5)
        parts.append(f'<text x="{LEFT - 14}" y="{y + 4:.1f}" text-anchor="end">{html.escape(state)}</text>')
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#f0f0f0"/>')
        for name in (*others, *[name for name in loaders if name == OURS]):
            fraction = loaders[name].get(state)
            if fraction is not None:
                colour, kind = looks[name]
                title = f"{name}, {state}: {fraction:.0%}"
                parts.append(mark(kind, LEFT + span * min(fraction, 1.0), y, colour, title))
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def draw_cards(cases: Sequence[Mapping[str, Any]], count: int, caption: str) -> str:
    """One card and several, as bars with the spread over rounds; "" where too little was measured."""
    bars = []
    for group, label, name, which, colour in CARDS:
        case = next((case for case in cases if case["name"].startswith(name)), {})
        spread = case.get(f"{which}gigabytes_per_second")
        if not spread:
            return ""
        bars.append((group.replace("all", f"{count} cards"), label, spread, colour))
    left, height = 110, 76 + BAR * len(bars) + 24
    scale = (WIDTH - left - 330) / max(spread["max"] for *_, spread, _ in bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {FONT}>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        '<text x="20" y="28" font-size="16" font-weight="600">One card and several, out of the page cache</text>',
        f'<text x="20" y="48" fill="#666">{html.escape(caption)}</text>',
    ]
    for number, (group, label, spread, colour) in enumerate(bars):
        y, nbytes = 70 + BAR * number, scale * spread["median"]
        low, high = left + scale * spread["min"], left + scale * spread["max"]
        said = f"{spread['median']:.0f} GB/s, {label}"
        parts += [
            f'<text x="{left - 14}" y="{y + 14}" text-anchor="end" font-weight="600">{group}</text>',
            f'<rect x="{left}" y="{y}" width="{nbytes:.1f}" height="{BAR - 10}" fill="{colour}"/>',
            f'<path d="M{low:.1f} {y + 10}H{high:.1f}" stroke="#222" stroke-width="1.5"/>',
            f'<text x="{max(left + nbytes, high) + 10:.1f}" y="{y + 14}">{html.escape(said)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def machines(sections: Sequence[Mapping[str, Any]]) -> str:
    """What sections were measured on, and when, for a caption."""
    taken = [section["taken"] for section in sections]
    gpus = " and ".join(sorted({name for one in taken for name in one["gpus"]})) or "no GPU"
    counts = sorted({one["usable_processors"] for one in taken})
    return f"{gpus}, {' or '.join(map(str, counts))} processors, {max(one['date'] for one in taken)[:10]}"


def draw_worst(results: Mapping[str, Any]) -> str:
    """The picture of the worst fractions, with the machines that they are of."""
    sections = [section for section in results.values() if isinstance(section, dict) and "taken" in section]
    return draw(results["worst"], f"{machines(sections)}; each loader at its best setting")


def main() -> None:
    """The command line."""
    results, picture_path = plot((__doc__ or "").splitlines()[0], "gpu.py", RESULTS, PICTURE, draw_worst)
    cards = results.get("cards")
    if cards and (picture := draw_cards(cards["cases"], len(cards["taken"]["gpus"]), machines([cards]))):
        beside = picture_path.with_name("cards.svg")
        beside.write_text(picture)
        print(beside)


if __name__ == "__main__":
    main()
