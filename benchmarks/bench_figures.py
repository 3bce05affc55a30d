"""What ``weightlift bench`` found on a card, for the page of published figures.

Knows the JSON object of that command alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from page_tables import MIB, NOTHING, Part, Target, escaped, spread, table, taken, targets

from weightlift.reports.bench import CEILINGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

STATES: Final = ("cold", "warm")


def part(result: Mapping[str, Any]) -> Part:
    """The ceilings, a table per state of the page cache, and what was recommended."""
    found = result["bench"]
    page = Part([taken(result["taken"] | {"rounds": found["rounds_done"]})])
    page.add(
        f"`weightlift bench` on {found['bytes'] / 1e9:.1f} GB in {found['tensors']} tensors, to `{found['device']}`; "
        f"{found['seconds']:.0f} s. {'It was ended before all rounds were done. ' if found['partial'] else ''}"
        f"It recommends `{found['recommendation']['command']}`."
    )
    speeds = [
        (CEILINGS.get(kind, kind), _spread(ceiling["gigabytes_per_second"]))
        for kind, ceiling in found["ceilings"].items()
    ]
    page.add(table(("ceiling", "GB/s"), speeds))
    for state in STATES:
        rows = [case for case in found["cases"] if case["state"] == state]
        if rows:
            page.add(table((state, *COLUMNS), map(_line, rows)))
    judged = list(_judged(found))
    page.add(targets(judged), judged)
    return page


COLUMNS: Final = ("GB/s", "of the ceiling", "to the baseline", "anonymous beyond tensors, MiB", "left cached")


def _line(case: Mapping[str, Any]) -> tuple[str, ...]:
    beyond = case["peak_memory"]["beyond_tensors_bytes"]
    after = case["cached_after_bytes"]
    return (
        escaped(case["name"]),
        _spread(case["gigabytes_per_second"]),
        _spread(case["fraction_of_ceiling"]),
        f"{_spread(case['ratio_to_baseline'])} × {case['baseline']}" if case["ratio_to_baseline"] else NOTHING,
        NOTHING if beyond is None else f"{beyond / MIB:,.1f}",
        NOTHING if after is None else f"{after / 1e9:.2f} GB",
    )


def _spread(value: Mapping[str, float] | None) -> str:
    return spread({"median": value["median"], "min": value["smallest"], "max": value["largest"]} if value else None)


def _judged(found: Mapping[str, Any]) -> Iterable[Target]:
    own = [case for case in found["cases"] if case["package"] == "weightlift"]
    failed = sorted({error for case in own for error in case["errors"]})
    yield Target(
        "loads of weightlift's that gave the right bytes",
        escaped("; ".join(failed)) or "all",
        "all",
        bool(own) and not failed,
    )
