"""What is compared with what: each section is a list of cases and the claims made about them.

Pure data out of a context; nothing here runs or prints anything. A section's docstring is its heading in tables.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from typing import TYPE_CHECKING, Any

import peers
import raw
from claims import Limit, Ratio
from harness import MIB, Case, Checkpoint, Contestant
from states import CacheState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

COLD, WARM, HALF, AS_LEFT = CacheState.COLD, CacheState.WARM, CacheState.HALF, CacheState.AS_LEFT
DEVICES = ("null", "cpu")
PATHS: Mapping[str, Mapping[str, Any]] = {
    "direct": {"method": "direct"},
    "buffered": {"method": "buffered", "cache": "keep"},
    "buffered, drop": {"method": "buffered", "cache": "drop"},
    "auto": {"method": "auto"},
    "auto, drop": {"method": "auto", "cache": "drop"},
}
OWNING = ("direct", "buffered")
SETTINGS: Mapping[CacheState, tuple[str, ...]] = {COLD: ("auto", "direct", "buffered, drop"), WARM: ("auto",)}
"""What weightlift is compared with others at, as they are at what was found best for them."""
DROPPING = ("buffered, drop", "auto, drop")
GUESSES = ((2, 4 * MIB), (4, 4 * MIB))


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What sections are made from.

    Attributes:
        checkpoints: by the names ``main``, ``large`` and ``small``, as far as they were asked for.
        program: the raw reader.
        sweep: rows of the raw sweep; may be empty.
        tuning: per state and peer, what :func:`peers.tune` found; may be empty.
    """

    checkpoints: Mapping[str, Checkpoint]
    program: Path
    sweep: Sequence[Mapping[str, Any]] = ()
    tuning: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """Cases that run in the same rounds, and what is claimed of them."""

    cases: tuple[Case, ...]
    ratios: tuple[Ratio, ...] = ()
    limits: tuple[Limit, ...] = ()


def only(section: Section, match: str) -> Section:
    """The cases of a section whose names match globs, with `|` between; a comparison stays if both of its sides do."""
    globs = match.split("|")
    cases = tuple(case for case in section.cases if any(fnmatch.fnmatchcase(case.name, glob) for glob in globs))
    kept = {case.name for case in cases}
    return Section(
        cases,
        tuple(ratio for ratio in section.ratios if kept.issuperset((*ratio.over, *ratio.under))),
        tuple(limit for limit in section.limits if limit.case in kept),
    )


def load(name: str, checkpoint: Checkpoint, state: CacheState, *, device: str = "cpu", **rest: Any) -> Case:
    """One weightlift load; keywords of :class:`Case` are taken out, the others go to ``weightlift.load``."""
    case_words = {key: rest.pop(key) for key in ("beside", "loads") if key in rest}
    options = {"device": device} | ({} if device == "null" else {"framework": "torch"}) | rest
    contestant = Contestant(
        adapter="weightlift", options=options, mapped=rest.get("method") == "mmap", delivers=device != "null"
    )
    return Case(name=name, contestant=contestant, checkpoint=checkpoint, state=state, **case_words)


def ceilings(context: Context, checkpoint: Checkpoint, state: CacheState, method: str, memory: str) -> list[Case]:
    """The raw reads that may be the fastest of their kind, to be measured in the same rounds."""
    found = raw.best(context.sweep, state, method, memory)
    if not found:
        kinds = ("fresh-huge", "fresh") if memory == "fresh" else (memory,)
        found = [raw.Point(state, method, kind, *guess) for kind in kinds for guess in GUESSES]
    cases = [raw.case(context.program, point, checkpoint) for point in found]
    return [dataclasses.replace(case, name=f"{case.name}, {state}") for case in cases]


def names(cases: Sequence[Case]) -> tuple[str, ...]:
    """The cases' names."""
    return tuple(case.name for case in cases)


def paths(context: Context, *, which: str = "main", states: Sequence[CacheState] = (COLD, WARM, HALF)) -> Section:
    """Every read path, device and cache state, against raw reads of the same file."""
    checkpoint = context.checkpoints[which]
    cases: list[Case] = []
    ratios: list[Ratio] = []
    for state, device in itertools.product(states, DEVICES):
        for label, options in PATHS.items():
            if label not in DROPPING or state is not WARM:
                cases.append(load(f"{label} → {device}, {state}", checkpoint, state, device=device, **options))
        raw_cases, raw_ratios = _against_raw(context, checkpoint, state, device)
        cases += raw_cases
        ratios += [*raw_ratios, *_auto(state, device)]
        if device == "cpu":
            cases.append(load(f"mmap → cpu, {state}", checkpoint, state, method="mmap"))
    if WARM in states:
        cases.append(load("auto → cpu, second load", checkpoint, COLD, method="auto", loads=2))
        second, warm = ("auto → cpu, second load",), (f"auto → cpu, {WARM}",)
        ratios.append(Ratio(name="second auto load over a warm one", over=second, under=warm, at_least=0.95))
    return Section(tuple(cases), tuple(ratios))


def _against_raw(
    context: Context, checkpoint: Checkpoint, state: CacheState, device: str
) -> tuple[list[Case], list[Ratio]]:
    memory = "reused" if device == "null" else "fresh"
    cases: list[Case] = []
    ratios: list[Ratio] = []
    labels = {"direct": "direct", "buffered": "buffered", "dontcache": "buffered, drop"}
    for method in raw.METHODS.get(state, ()):
        found = ceilings(context, checkpoint, state, method, memory)
        cases += found
        goal = None if method == "dontcache" else 0.95
        case = f"{labels[method]} → {device}, {state}"
        ratios.append(Ratio(name=f"{case}, over raw", over=(case,), under=names(found), at_least=goal))
    return cases, ratios


def _auto(state: CacheState, device: str) -> list[Ratio]:
    """``auto`` against the paths it chooses between: all of them, and those that leave the page cache as it does.

    By default ``auto`` keeps a file that fits into memory, which direct reads do not; with ``drop`` it may use them.
    """
    goal = 1.0 if state is HALF else 0.95
    where = f"→ {device}, {state}"
    default = f"auto {where}"
    owning = tuple(f"{label} {where}" for label in OWNING)
    ratios = [Ratio(name=f"{default}, over the best owning path", over=(default,), under=owning, at_least=goal)]
    if state is not WARM:
        keeping, dropping = f"buffered {where}", f"auto, drop {where}"
        ratios.append(
            Ratio(name=f"{default}, over the path that keeps", over=(default,), under=(keeping,), at_least=goal)
        )
        leaving = (f"direct {where}", f"buffered, drop {where}")
        name = f"{dropping}, over the best path that drops"
        ratios.append(Ratio(name=name, over=(dropping,), under=leaving, at_least=goal))
    return ratios


def large(context: Context) -> Section:
    """The cold figures once more with a file of twice the size."""
    return paths(context, which="large", states=(COLD,))


def others(context: Context) -> Section:
    """Other loaders into CPU memory, each at its best: owned with owned, mapped (every page touched) with mapped."""
    checkpoint = context.checkpoints["main"]
    cases: list[Case] = []
    ratios: list[Ratio] = []
    for state, labels in SETTINGS.items():
        auto, mapped = f"weightlift auto, {state}", f"weightlift mmap, {state}"
        owned = tuple(f"weightlift {label}, {state}" for label in labels)
        cases += [load(name, checkpoint, state, **PATHS[label]) for name, label in zip(owned, labels, strict=True)]
        cases.append(load(mapped, checkpoint, state, method="mmap"))
        by_peer: dict[str, tuple[peers.Peer, list[str]]] = {}
        for peer, case in peers.cases(checkpoint, state, context.tuning.get(str(state), {})):
            cases.append(case)
            by_peer.setdefault(peer.name, (peer, []))[1].append(case.name)
        goal = 1.0 if state is COLD else 0.97
        for peer, under in by_peer.values():
            kind, over = ("mmap", (mapped,)) if peer.mapped else ("owned", owned)
            name = f"weightlift {kind}, {state}, over {peer.name}"
            ratios.append(Ratio(name=name, over=over, under=tuple(under), at_least=goal))
        rivals = tuple(name for peer, under in by_peer.values() if not peer.mapped for name in under)
        ratios.append(Ratio(name=f"{auto}, over the best of the others", over=(auto,), under=rivals))
    return Section(tuple(cases), tuple(ratios))


def busy(context: Context) -> Section:
    """Beside a Python thread that computes; the same beside another process shows what the lost core alone costs."""
    checkpoint = context.checkpoints["large"]
    cases: list[Case] = []
    ratios: list[Ratio] = []
    kinds = (("direct", COLD), ("buffered", WARM))
    for (label, state), device, engine in itertools.product(kinds, DEVICES, ("native", "python")):
        base = f"{engine}, {label} → {device}, {state}"
        for beside in ("", "thread", "process"):
            name = f"{base}, beside a busy {beside}" if beside else base
            options = {**PATHS[label], "engine": engine, "device": device, "beside": beside}
            cases.append(load(name, checkpoint, state, **options))
        goal = 0.9 if engine == "native" else None
        thread, process = f"{base}, beside a busy thread", f"{base}, beside a busy process"
        ratios.append(Ratio(name=f"{thread}, over idle", over=(thread,), under=(base,), at_least=goal))
        ratios.append(Ratio(name=f"{thread}, over a busy process", over=(thread,), under=(process,)))
    for (label, state), memory in itertools.product(kinds, ("reused", "fresh")):
        for point in ceilings(context, checkpoint, state, label, memory)[:1]:
            cases.append(point)
            cases.append(dataclasses.replace(point, name=f"{point.name}, beside a busy process", beside="process"))
            ratios.append(Ratio(name=f"{cases[-1].name}, over idle", over=(cases[-1].name,), under=(point.name,)))
    return Section(tuple(cases), tuple(ratios))


def budgets(context: Context) -> Section:
    """Host-memory budgets of 128 MiB and 8 MiB: what they cost, and whether they are kept."""
    checkpoint = context.checkpoints["main"]
    cases: list[Case] = []
    ratios: list[Ratio] = []
    limits: list[Limit] = []
    kinds = (("direct", COLD), ("buffered", COLD), ("buffered", WARM), ("auto", HALF))
    for (label, state), device in itertools.product(kinds, DEVICES):
        found = []
        for budget in (128 * MIB, 8 * MIB):
            name = f"{label} → {device}, {state}, {budget // MIB} MiB"
            found.append(load(name, checkpoint, state, device=device, host_memory=budget, **PATHS[label]))
            limits.append(Limit(case=name, figure="extra_anonymous_bytes", at_most=budget))
        cases += found
        wide, narrow = names(found)
        ratios.append(Ratio(name=f"{narrow} over 128 MiB", over=(narrow,), under=(wide,), at_least=0.9))
    return Section(tuple(cases), tuple(ratios), tuple(limits))


def residue(context: Context) -> Section:
    """What a load leaves in the page cache: nothing of its own with drop, and what was there before stays."""
    checkpoint = context.checkpoints["main"]
    cases: list[Case] = []
    limits: list[Limit] = []
    for workers, device in itertools.product((1, 2, 4, 8), DEVICES):
        for state in (COLD, HALF):
            name = f"buffered, drop → {device}, {state}, {workers} threads"
            options = {**PATHS["buffered, drop"], "workers": workers, "device": device}
            cases.append(load(name, checkpoint, state, **options))
    for label, state in itertools.product(("direct", "auto"), (COLD, HALF)):
        options = {**PATHS[label], "cache": "drop"}
        cases.append(load(f"{label}, drop → cpu, {state}", checkpoint, state, **options))
    for case in cases:
        limits.append(Limit(case=case.name, figure="resident_added", at_most=0.01))
        if case.state is HALF:
            limits.append(Limit(case=case.name, figure="resident_kept", at_least=0.999))
    return Section(tuple(cases), (), tuple(limits))


def small(context: Context) -> Section:
    """Very many small tensors: opening, and the whole load."""
    checkpoint = context.checkpoints["small"]
    reference = peers.Peer(name="safetensors 0.8.0", adapter="safetensors", mapped=True).contestant()
    opens = [
        Case(name=f"open, {name}", contestant=contestant, checkpoint=checkpoint, state=WARM)
        for name, contestant in (
            ("weightlift", Contestant(adapter="weightlift_open", delivers=False)),
            (
                "safetensors 0.8.0",
                dataclasses.replace(reference, adapter="safetensors_open", mapped=False, delivers=False),
            ),
        )
    ]
    loads = [load(f"load, weightlift, {state}", checkpoint, state, method="auto") for state in (COLD, WARM)]
    loads.append(load("load, weightlift numpy, warm", checkpoint, WARM, method="auto", framework="numpy"))
    other = Case(name="load, safetensors 0.8.0, warm", contestant=reference, checkpoint=checkpoint, state=WARM)
    ratios = (
        Ratio(name="open, over safe_open (speed)", over=(opens[0].name,), under=(opens[1].name,), at_least=1 / 1.5),
        Ratio(name="load, over safetensors (speed)", over=(loads[1].name,), under=(other.name,), at_least=1.0),
    )
    limits = [Limit(case=loads[1].name, figure="description_bytes_per_tensor", at_most=400)]
    limits += [Limit(case=case.name, figure="microseconds_per_tensor", at_most=20) for case in loads]
    return Section((*opens, *loads, other), ratios, tuple(limits))


SECTIONS: Mapping[str, tuple[Callable[[Context], Section], tuple[str, ...]]] = {
    "paths": (paths, ("main",)),
    "large": (large, ("large",)),
    "peers": (others, ("main",)),
    "busy": (busy, ("large",)),
    "budgets": (budgets, ("main",)),
    "residue": (residue, ("main",)),
    "small": (small, ("small",)),
}
"""Every section but the raw sweep, with the checkpoints that it needs."""
