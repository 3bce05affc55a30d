"""What is compared with what on GPUs: each section is a list of cases, the claims about them and their ceiling.

Pure data out of a context; nothing here runs or prints anything. A section's docstring is its heading in tables.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import raw
from claims import Limit, Ratio
from gpu_harness import memory_needed
from harness import MIB, Case, Checkpoint, Contestant
from states import CacheState

from weightlift.host.memory import available_processors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from gpu_peers import Loader

COLD, WARM, HALF = CacheState.COLD, CacheState.WARM, CacheState.HALF
LINK = {"chunks_mib": (4, 8, 32), "streams": (1, 2), "bytes": 2 << 30}
PAGEABLE = {"chunks_mib": (4, 16), "threads": (1, 4), "bytes": 1 << 30}
RAW_POINTS = {
    "direct": ((2, 4 * MIB), (4, 8 * MIB), (16, 4 * MIB)),
    # Copying out of the page cache takes all processors to be fastest; storage may not want many.
    "buffered": ((available_processors(), 4 * MIB),),
}
SECOND = ", second load"


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What sections are made from.

    Attributes:
        checkpoints: by name, as far as they were asked for.
        peers: every loader that this machine has.
        program: the raw reader.
        devices: where tensors go; more than one in the section about several.
    """

    checkpoints: Mapping[str, Checkpoint]
    peers: Sequence[tuple[Loader, Contestant]]
    program: Path
    devices: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Ceiling:
    """What no loader can beat in a section.

    Attributes:
        cases: the fastest of these counts, in the same round.
        factor: times this; 2 where half of the bytes need not come from where the cases read.
        create: a case whose seconds are added, for the making of very many tensors.
        narrowest: the slowest of the cases counts instead, since all bytes pass each of them.
        applies_to: the cases it is a ceiling for.
    """

    cases: tuple[str, ...]
    applies_to: tuple[str, ...]
    factor: float = 1.0
    create: str = ""
    narrowest: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """Cases that run in the same rounds, what is claimed of them, and which loader each case is."""

    cases: tuple[Case, ...]
    loader_of: Mapping[str, str]
    ratios: tuple[Ratio, ...] = ()
    limits: tuple[Limit, ...] = ()
    ceilings: tuple[Ceiling, ...] = ()


class Draft:
    """A section in the making.

    Args:
        context: what it is made from.
        checkpoint: what its cases read unless they say otherwise.
        state: page cache before each.
    """

    def __init__(self, context: Context, checkpoint: Checkpoint, state: CacheState) -> None:
        self.context, self.checkpoint, self.state = context, checkpoint, state
        self.cases: list[Case] = []
        self.loader_of: dict[str, str] = {}

    def add(self, name: str, contestant: Contestant, **rest: Any) -> str:
        """One case; returns its name."""
        taken = rest.pop("host_bytes", 0)
        words = {"checkpoint": self.checkpoint, "state": self.state, "devices": self.context.devices, **rest}
        case = Case(name=name, contestant=contestant, **words)
        self.cases.append(dataclasses.replace(case, memory_bytes=memory_needed(case, taken)))
        return name

    def ours(self, label: str, *, loader: str = "", **rest: Any) -> str:
        """A weightlift load; keywords of a case are taken out, the others are options."""
        case_words = {key: rest.pop(key) for key in ("beside", "loads", "checkpoint", "devices") if key in rest}
        if self.context.devices[0] == "cpu":
            rest.pop("staging", None)
        contestant = Contestant(adapter=rest.pop("adapter", "weightlift"), options=rest)
        name = self.add(label, contestant, **case_words)
        if loader:
            self.loader_of[name] = loader
        return name

    def peers(self, label: str, *, only: Callable[[Loader], bool] | None = None, **rest: Any) -> list[str]:
        """Every loader that is run in a state, as shipped and otherwise; returns their names."""
        names = []
        for loader, contestant in self.context.peers:
            elsewhere = loader.states and label not in loader.states
            if elsewhere or (only is not None and not only(loader)):
                continue
            words = {**rest, "host_bytes": loader.host_bytes} | ({"loads": 1} if loader.slow else {})
            names.append(self.add(f"{loader.name}, {label}", contestant, **words))
            self.loader_of[names[-1]] = loader.name
        return names

    def link(self) -> str:
        """The link to the devices, out of pinned memory."""
        return self._ceiling("link, pinned", "ceiling_link", LINK)

    def first_link(self) -> str:
        """The link to the first of several devices."""
        return self._ceiling("link to the first, pinned", "ceiling_link", LINK, devices=self.context.devices[:1])

    def events(self) -> tuple[str, ...]:
        """The link with an event behind each copy, of the kind that a thread may sleep for and of the other."""
        return tuple(
            self._ceiling(
                f"link, {kind} events", "ceiling_link", {**LINK, "chunks_mib": (2,), "streams": (1,), "events": kind}
            )
            for kind in ("waking", "plain")
        )

    def pageable(self) -> str:
        """Copies out of ordinary memory."""
        return self._ceiling("link, pageable", "ceiling_pageable", PAGEABLE)

    def create(self, checkpoint: Checkpoint) -> str:
        """The making of as many tensors."""
        options = {"count": checkpoint.tensors, "nbytes": checkpoint.tensor_bytes // checkpoint.tensors}
        return self._ceiling(f"making {checkpoint.tensors:,} tensors", "ceiling_create", options)

    def _ceiling(self, name: str, adapter: str, options: Mapping[str, Any], **rest: Any) -> str:
        contestant = Contestant(adapter=adapter, options=options, delivers=False)
        return self.add(name, contestant, state=CacheState.AS_LEFT, **rest)

    def raw(self, method: str) -> tuple[str, ...]:
        """Raw reads into buffers used again."""
        names = []
        for threads, chunk in RAW_POINTS[method]:
            point = raw.Point(self.state if self.state is not HALF else COLD, method, "reused", threads, chunk)
            plain = raw.case(self.context.program, point, self.checkpoint)
            names.append(self.add(plain.name, plain.contestant, state=plain.state))
        return tuple(names)

    def done(
        self, ratios: Sequence[Ratio] = (), limits: Sequence[Limit] = (), ceilings: Sequence[Ceiling] = ()
    ) -> Section:
        """The section."""
        return Section(tuple(self.cases), self.loader_of, tuple(ratios), tuple(limits), tuple(ceilings))


def warm(context: Context) -> Section:
    """From the page cache: the first load of a process, and the second."""
    draft = Draft(context, context.checkpoints["main"], WARM)
    own = draft.ours("weightlift, warm", loader="weightlift", loads=2)
    streamed = draft.ours("weightlift stream, warm", adapter="weightlift_stream", loads=2)
    others = draft.peers("warm", loads=2)
    link, copies = draft.link(), draft.raw("buffered")
    second, others_second = own + SECOND, tuple(name + SECOND for name in others)
    ratios = [
        Ratio(name="first load, over the link", over=(own,), under=(link,), at_least=0.85),
        Ratio(name="second load, over the link", over=(second,), under=(link,), at_least=0.93),
        Ratio(name="first load, over the best peer", over=(own,), under=tuple(others), at_least=1.0),
        Ratio(name="second load, over the best peer's second", over=(second,), under=others_second, at_least=0.97),
        Ratio(name="stream, over the link", over=(streamed,), under=(link,)),
        Ratio(name="link, over reading the cache", over=(link,), under=copies),
    ]
    limits = [
        Limit(case=own, figure="pinned_bytes", at_most=128 * MIB),
        Limit(case=own, figure="peak_anonymous_bytes", at_most=128 * MIB + 64 * MIB),
        Limit(case=own, figure="device_extra_bytes", at_most=64 * MIB),
    ]
    return draft.done(ratios, limits, [Ceiling((link,), tuple(draft.loader_of))])


def cold(context: Context, *, where: str = "cold") -> Section:
    """From storage: a loop device over memory."""
    draft = Draft(context, context.checkpoints[where], COLD)
    own = draft.ours(f"weightlift, {where}", loader="weightlift")
    drop = draft.ours(f"weightlift drop, {where}", cache="drop")
    direct = draft.ours(f"weightlift direct, {where}", method="direct")
    others = draft.peers(where)
    storage = draft.raw("direct")
    ours = (own, drop, direct)
    ratios = [
        Ratio(name=f"{label}, over raw direct reads", over=(label,), under=storage, at_least=0.95) for label in ours
    ]
    ratios += [
        Ratio(name=f"{label}, over the best peer", over=(label,), under=tuple(others), at_least=1.0) for label in ours
    ]
    limits = [Limit(case=label, figure="resident_added", at_most=0.01) for label in (drop, direct)]
    return draft.done(ratios, limits, [Ceiling(storage, tuple(draft.loader_of))])


def disk(context: Context) -> Section:
    """From storage: the machine's own disk."""
    return cold(context, where="disk")


def half(context: Context) -> Section:
    """Every second 16 MiB in the page cache."""
    draft = Draft(context, context.checkpoints["cold"], HALF)
    own = draft.ours("weightlift, half-warm", loader="weightlift")
    drop = draft.ours("weightlift drop, half-warm", cache="drop")
    others = draft.peers("half-warm")
    storage = draft.raw("direct")
    ratios = [
        Ratio(name=f"{label}, over the best peer", over=(label,), under=tuple(others), at_least=1.0)
        for label in (own, drop)
    ]
    limits = [
        Limit(case=drop, figure="resident_added", at_most=0.01),
        Limit(case=drop, figure="resident_kept", at_least=0.999),
    ]
    return draft.done(ratios, limits, [Ceiling(storage, tuple(draft.loader_of), factor=2.0)])


def busy(context: Context) -> Section:
    """From the page cache, beside a Python thread that computes."""
    draft = Draft(context, context.checkpoints["main"], WARM)
    idle = draft.ours("weightlift, idle", loads=2)
    own = draft.ours("weightlift, busy", loader="weightlift", beside="thread", loads=2)
    others = draft.peers("busy", beside="thread")
    link = draft.link()
    ratios = [
        Ratio(name="busy, over idle, first load", over=(own,), under=(idle,), at_least=0.85),
        Ratio(name="busy, over idle, second load", over=(own + SECOND,), under=(idle + SECOND,), at_least=0.85),
        Ratio(name="busy, over the best peer", over=(own,), under=tuple(others), at_least=1.0),
    ]
    return draft.done(ratios, ceilings=[Ceiling((link,), tuple(draft.loader_of))])


def budgets(context: Context) -> Section:
    """Small budgets, and the path that needs neither mapping nor direct I/O nor pinned memory."""
    draft = Draft(context, context.checkpoints["main"], WARM)
    roomy = draft.ours("weightlift, 128 MiB", loads=2)
    tight = draft.ours("weightlift, 32 MiB", loader="weightlift", host_memory=32 * MIB, loads=2)
    least = draft.ours("weightlift, 8 MiB", host_memory=8 * MIB, loads=2)
    plain = draft.ours("weightlift, buffered + pageable", method="buffered", staging="pageable", loads=2)
    link, pageable = draft.link(), draft.pageable()
    ratios = [
        Ratio(name="32 MiB, over 128 MiB, first load", over=(tight,), under=(roomy,), at_least=0.85),
        Ratio(name="32 MiB, over 128 MiB, second load", over=(tight + SECOND,), under=(roomy + SECOND,), at_least=0.85),
        Ratio(name="8 MiB, over 128 MiB, second load", over=(least + SECOND,), under=(roomy + SECOND,)),
        Ratio(name="buffered + pageable, over the pageable link", over=(plain,), under=(pageable,), at_least=0.9),
    ]
    limits = [
        Limit(case=case, figure=figure, at_most=most)
        for case, most in ((tight, 32 * MIB), (least, 8 * MIB))
        for figure in ("pinned_bytes",)
    ]
    return draft.done(ratios, limits, [Ceiling((link,), (tight,))])


def shapes(context: Context) -> Section:
    """Other shapes, warm: a 70B quantised for ExLlamaV2, 220,000 small tensors, 60,000 of 100 KiB."""
    draft = Draft(context, context.checkpoints["exl2"], WARM)
    llama = draft.ours("weightlift, llama", checkpoint=context.checkpoints["main"], loads=2)
    quantised = draft.ours("weightlift, EXL2", loader="weightlift", loads=2)
    link = draft.link()
    quick = (
        "safetensors 0.8.0",
        "safetensors 0.9.0rc1, 16 threads",
        "fastsafetensors, buffered",
        "InstantTensor, MMAP",
    )
    names: dict[str, list[str]] = {}
    for shape in ("small", "many"):
        checkpoint = context.checkpoints[shape]
        own = draft.ours(f"weightlift, {shape}", loader="weightlift", checkpoint=checkpoint, loads=2)
        some = draft.peers(shape, only=lambda loader: loader.name in quick, checkpoint=checkpoint)
        names[shape] = [own, *some]
    made = {shape: draft.create(context.checkpoints[shape]) for shape in names}
    others = draft.peers("EXL2", only=lambda loader: loader.name in quick)
    ratios = [
        Ratio(name="EXL2, over llama, first load", over=(quantised,), under=(llama,), at_least=0.85),
        Ratio(name="EXL2, over llama, second load", over=(quantised + SECOND,), under=(llama + SECOND,), at_least=0.85),
        *(
            Ratio(name=f"{shape}, over the best peer", over=(some[0],), under=tuple(some[1:]), at_least=1.0)
            for shape, some in names.items()
        ),
    ]
    ceilings = [
        Ceiling((link,), (quantised, *others)),
        *(Ceiling((link,), tuple(some), create=made[shape]) for shape, some in names.items()),
    ]
    return draft.done(ratios, (), ceilings)


def cards(context: Context) -> Section:
    """From the page cache onto several cards in one pass, the first layers on the first and so on; and onto one."""
    draft = Draft(context, context.checkpoints["main"], WARM)
    own = draft.ours("weightlift, several cards", loader="weightlift", adapter="weightlift_cards", loads=2)
    one = draft.ours("weightlift, one card", devices=context.devices[:1], loads=2)
    links, link, (copies,) = draft.link(), draft.first_link(), draft.raw("buffered")
    ratios = [
        Ratio(name=f"{name}, over links and memory", over=(case,), under=(links, copies), at_least=0.85, slowest=True)
        for name, case in (("several cards, first load", own), ("several cards, second load", own + SECOND))
    ]
    ratios += [
        Ratio(name="several cards, over one, second load", over=(own + SECOND,), under=(one + SECOND,)),
        Ratio(name="one card, over its link, second load", over=(one + SECOND,), under=(link,)),
        Ratio(name="all links, over one", over=(links,), under=(link,)),
    ]
    limits = [Limit(case=own, figure="pinned_bytes", at_most=128 * MIB)]
    return draft.done(ratios, limits, [Ceiling((links, copies), (own,), narrowest=True)])


def concurrency(context: Context) -> Section:
    """Workers and chunk sizes, warm: where the defaults come from."""
    draft = Draft(context, context.checkpoints["main"], WARM)
    chosen = draft.ours("as chosen", loads=2)
    fixed = [
        draft.ours(f"{workers} × {chunk} MiB", workers=workers, chunk_bytes=chunk * MIB, loads=2)
        for workers in (8, 12, 14)
        for chunk in (1, 2, 4, 8)
    ]
    waking, plain = draft.events()
    seconds = tuple(name + SECOND for name in fixed)
    name = "as chosen, over the best of the sweep, second load"
    ratios = [
        Ratio(name=name, over=(chosen + SECOND,), under=seconds, at_least=0.95),
        Ratio(name="events that wake threads, over plain ones, copies of 2 MiB", over=(waking,), under=(plain,)),
    ]
    return draft.done(ratios)


SECTIONS: Mapping[str, tuple[Callable[[Context], Section], tuple[str, ...]]] = {
    "warm": (warm, ("main",)),
    "cold": (cold, ("cold",)),
    "half-warm": (half, ("cold",)),
    "busy": (busy, ("main",)),
    "budgets": (budgets, ("main",)),
    "shapes": (shapes, ("main", "exl2", "small", "many")),
    "disk": (disk, ("disk",)),
    "concurrency": (concurrency, ("main",)),
    "cards": (cards, ("main",)),
}
"""Every section, with the checkpoints that it needs."""
