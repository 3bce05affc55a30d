"""How near to the ceiling each loader comes in each state, and the worst of it: the figure that a user meets.

Arithmetic over runs; a fraction divides within one round, and the median over rounds counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from claims import Run, speed, spread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpu_sections import Ceiling, Section


def fractions(section: Section, runs: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """One entry per case that has a ceiling: loader, and spread of the fraction over the rounds."""
    sizes = {case.name: case.checkpoint.tensor_bytes for case in section.cases}
    found = []
    for ceiling in section.ceilings:
        for name in ceiling.applies_to:
            if name not in section.loader_of:
                continue
            values = [
                speed(run) / best
                for number, run in enumerate(runs[name])
                if speed(run) > 0 and (best := _ceiling(ceiling, runs, number, sizes[name])) > 0
            ]
            found.append({"case": name, "loader": section.loader_of[name], "fraction": spread(values)})
    return found


def _ceiling(ceiling: Ceiling, runs: Mapping[str, Sequence[Run]], number: int, nbytes: int) -> float:
    """The ceiling in GB/s for so many bytes, as the round gave it; 0 where nothing is known."""
    choose = min if ceiling.narrowest else max
    best = choose((speed(runs[name][number]) for name in ceiling.cases), default=0.0) * ceiling.factor
    if not best or not ceiling.create:
        return best
    creating = runs[ceiling.create][number].get("seconds")
    return nbytes / 1e9 / (nbytes / 1e9 / best + creating) if creating else 0.0


def worst(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Per loader: the median fraction in every state it was measured in, and the smallest of them."""
    table: dict[str, dict[str, float]] = {}
    for result in sections.values():
        for entry in result.get("fractions", ()):
            if entry["fraction"]:
                state = entry["case"].rpartition(", ")[2]
                table.setdefault(entry["loader"], {})[state] = entry["fraction"]["median"]
    return {
        loader: {"states": states, "worst": min(states.values())}
        for loader, states in sorted(table.items(), key=lambda item: -min(item[1].values()))
    }
