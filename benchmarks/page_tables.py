"""Markdown for the page of published figures: tables, spreads, and how a target was met.

Knows the shape of cases, ratios and limits, which the scripts share, and of no single results file.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

from environment import names_only

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    Spread = Mapping[str, float]

MIB: Final = 1 << 20
NOTHING: Final = "–"
WORDS: Final = {True: "yes", False: "**no**", None: NOTHING}
SPECIAL: Final = re.compile(r"([\\|*_<\[\]])")
PEERS: Final = ("safetensors", "fastsafetensors", "instanttensor", "runai-model-streamer", "runai_model_streamer")


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """A column of a table of cases.

    Attributes:
        figure: the figure's name in results.
        heading: how the table calls it.
        scale: what figures are divided by.
        digits: digits after the point.
    """

    figure: str
    heading: str
    scale: float = 1.0
    digits: int = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Something that was to be reached.

    Attributes:
        name: what.
        value: what was measured.
        wanted: what was wanted.
        reached: whether it was; ``None`` where nothing was measured.
    """

    name: str
    value: str
    wanted: str
    reached: bool | None


@dataclasses.dataclass(slots=True)
class Part:
    """One part of the page.

    Attributes:
        text: paragraphs and tables.
        targets: what was to be reached.
    """

    text: list[str] = dataclasses.field(default_factory=list)
    targets: list[Target] = dataclasses.field(default_factory=list)

    def add(self, text: str, targets: Iterable[Target] = ()) -> None:
        """A paragraph or a table, and the targets that it shows."""
        if text:
            self.text.append(text)
        self.targets += targets


CASE_COLUMNS: Final = (
    Column("gigabytes_per_second", "GB/s"),
    Column("second_gigabytes_per_second", "second load, GB/s"),
    Column("shown_seconds", "seconds", digits=3),
    Column("pinned_bytes", "pinned, MiB", MIB, 1),
    Column("extra_anonymous_bytes", "anonymous memory beside the tensors, MiB", MIB, 1),
    Column("peak_anonymous_bytes", "anonymous memory, MiB", MIB, 1),
    Column("resident_added", "added to the page cache", 0.01, 1),
)
FIGURES: Final = {
    "extra_anonymous_bytes": Column("", "anonymous memory beside the tensors, MiB", MIB, 1),
    "peak_anonymous_bytes": Column("", "anonymous memory, MiB", MIB, 1),
    "pinned_bytes": Column("", "pinned memory, MiB", MIB, 1),
    "device_extra_bytes": Column("", "device memory beside the tensors, MiB", MIB, 1),
    "resident_added": Column("", "part of the file added to the page cache", 1, 4),
    "resident_kept": Column("", "part of what was cached that still is", 1, 4),
}


def escaped(text: object) -> str:
    """Text that Markdown shows as it is, in a cell too."""
    return SPECIAL.sub(r"\\\1", str(text))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; cells are Markdown already."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (headings, *rows)]
    rule = "|".join(["---", *(["---:"] * (len(headings) - 1))])
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def spread(value: Spread | None, scale: float = 1.0, digits: int = 2) -> str:
    """``median (smallest–largest)``; figures under the last digit keep two that tell something."""
    if not value:
        return NOTHING
    middle, low, high = (number(value[key] / scale, digits) for key in ("median", "min", "max"))
    return middle if low == middle == high else f"{middle} ({low}–{high})"


def number(value: float, digits: int = 2) -> str:
    """A number with so many digits after the point, or two that tell something where it is smaller than those."""
    if value and abs(value) < 10.0**-digits:
        return f"{value:.2g}"
    return f"{value:,.{digits}f}"


def cases(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per case, with the columns that any of them has."""
    shown = [dict(row) | {"shown_seconds": row.get("touched_seconds") or row.get("seconds")} for row in rows]
    columns = [column for column in CASE_COLUMNS if any(row.get(column.figure) for row in shown)]
    failed = any(row.get("errors") for row in shown)
    headings = ["case", *(column.heading + (", %" if column.scale == 0.01 else "") for column in columns)]
    lines = [
        [
            escaped(row["name"]) + (" (sparse file)" if row.get("sparse") else ""),
            *(spread(row.get(column.figure), column.scale, column.digits) for column in columns),
            *([escaped("; ".join(row.get("errors", ())))[:200]] if failed else ()),
        ]
        for row in shown
    ]
    return table([*headings, *(["errors"] if failed else ())], lines)


def ratio_targets(ratios: Iterable[Mapping[str, Any]]) -> Iterator[Target]:
    """Ratios between cases; the median decides."""
    for row in ratios:
        wanted = f"≥ {row['at_least']:.2f}" if row["at_least"] else ""
        yield Target(escaped(row["name"]), spread(row["value"]), wanted, row["reached"])


def limit_targets(limits: Iterable[Mapping[str, Any]]) -> Iterator[Target]:
    """Limits on single figures; the worst run decides."""
    for row in limits:
        figure = FIGURES.get(row["figure"], Column("", row["figure"].replace("_", " ")))
        upper = row["at_most"] is not None
        bound = (row["at_most"] if upper else row["at_least"]) / figure.scale
        value = spread(row["value"], figure.scale, figure.digits)
        name = f"{escaped(row['case'])}: {figure.heading}"
        yield Target(name, value, f"{'≤' if upper else '≥'} {bound:,g}", row["reached"])


def targets(found: Sequence[Target]) -> str:
    """What was to be reached, and what was."""
    return table(("claim", "measured", "target", "reached"), map(cells, found)) if found else ""


def cells(target: Target) -> tuple[str, ...]:
    """A target as a line of a table."""
    return (target.name, target.value, target.wanted or NOTHING, WORDS[target.reached])


def taken(record: Mapping[str, Any]) -> str:
    """Where, when and how figures were taken, in a paragraph."""
    packages = record.get("packages", {})
    beside = {name: version for name, version in _peers(record).items() if packages.get(name) != version}
    versions = ", ".join(f"{name} {version}" for name, version in (*packages.items(), *beside.items()) if version)
    git = record.get("git", {})
    commit = f"commit `{git['commit'][:7]}`" if git.get("commit") else "no commit known"
    changed = f" with changes in {git['changed_files']} of its files" if git.get("changed_files") else ""
    loads = record.get("load_average_at_start")
    parts = [
        *record.get("gpus", ()),
        f"{record['processor']}{', virtual' if record.get('hypervisor') else ''}",
        f"{record['usable_processors']} processors",
        f"{record['memory_bytes'] / 1e9:.1f} GB of memory",
        _storage(record.get("storage", {})),
        f"Linux {record['kernel']}",
    ]
    lines = [
        f"Taken {record['date'][:10]} by `{command(record['command'])}`. {escaped('; '.join(filter(None, parts)))}.",
        f"Python {record['python']}, {escaped(versions)}; {commit}{changed}.",
    ]
    if record.get("rounds"):
        lines.append(f"{record['rounds']} round{'s' if record['rounds'] > 1 else ''}.")
    if loads:
        busy = loads[0] > record["usable_processors"]
        lines.append(
            f"Load average before it began: {loads[0]:.1f}{', so other work may have been under way' if busy else ''}."
        )
    if record.get("quick"):
        lines.append("**A smoke run: its figures mean nothing.**")
    return "\n".join(lines)


def command(words: Sequence[str]) -> str:
    """A command line as somebody else would type it: other machines have other folders."""
    shown = [f"benchmarks/{PurePath(words[0]).name}", *names_only(words[1:])]
    return " ".join(["python", *(f"'{word}'" if re.search(r"[\s*?\[\\]", word) else word for word in shown)])


def _storage(record: Mapping[str, str | None]) -> str:
    if not record.get("file_system"):
        return ""
    disk = " on a disk made of memory" if record.get("loop_over") == "tmpfs" else ""
    return f"{record['file_system']}{disk}"


def _peers(record: Mapping[str, Any]) -> dict[str, str]:
    return {name: version for name, version in record.get("peer_packages", {}).items() if name in PEERS and version}


def anything(result: Mapping[str, Any]) -> Iterator[str]:
    """Tables of a results file of a shape unknown here: its plain values, and its collections of plain records."""
    plain = {key: value for key, value in result.items() if key != "schema" and _is_plain(value)}
    if plain:
        yield table(("figure", "value"), [(_words(key), _plain(value)) for key, value in plain.items()])
    rest = {key: value for key, value in result.items() if key not in plain and key not in ("schema", "taken")}
    if len(rest) > 1 and _is_records(rest.values()):
        yield _records([{"of": _words(key), **value} for key, value in rest.items()])
        return
    for key, value in rest.items():
        if isinstance(value, dict):
            parts = list(anything(value))
        else:
            parts = [_records(value)] if isinstance(value, list) and _is_records(value) else []
        if parts:
            yield f"**{_words(key)}**"
            yield from parts


def _is_records(values: Iterable[object]) -> bool:
    found = list(values)
    return bool(found) and all(isinstance(row, dict) and any(map(_is_plain, row.values())) for row in found)


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name, cell in row.items() if _is_plain(cell)))
    lines = [[_plain(row[name]) if name in row else NOTHING for name in names] for row in rows]
    return table([_words(name) for name in names], lines)


def _words(name: str) -> str:
    return escaped(name.replace("_", " "))


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return WORDS[value]
    return number(value, 3) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else escaped(value)


def settings(states: Mapping[str, Any]) -> str:
    """What was tried for every peer, and what its best case below runs with."""
    lines = [
        (escaped(peer), state, escaped(name), number(speed), "yes" if name == json.dumps(tried["settings"]) else "")
        for state, by_peer in states.items()
        for peer, tried in by_peer.items()
        for name, speed in tried["gigabytes_per_second"].items()
    ]
    return table(("loader", "page cache", "settings over those shipped", "GB/s", "taken for best"), lines)
