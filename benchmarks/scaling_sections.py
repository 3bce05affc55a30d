"""What is measured over a growing quantity: bytes, tensors, workers, budgets; and what is claimed of each.

Pure data out of checkpoints; nothing here runs or prints anything. A section's docstring is its heading in tables.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import sections
from claims import Limit, Ratio
from harness import MIB, Case, Checkpoint, Contestant
from states import CacheState

from weightlift.bench.rounds import SPARE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

COLD, WARM = CacheState.COLD, CacheState.WARM
DEFAULT_BUDGET_BYTES = 128 * MIB
GROWTH_BYTES_MAX = 16 * MIB
GROWTH = "from the smallest to the largest"
PATHS: Mapping[str, Mapping[str, Any]] = {
    "direct → null": {"method": "direct", "device": "null"},
    "buffered → null": {"method": "buffered", "cache": "keep", "device": "null"},
    "auto → cpu": {"method": "auto", "cache": "drop", "device": "cpu"},
    "mmap → cpu": {"method": "mmap", "device": "cpu"},
}
STOCK = "safetensors → cpu"
SPARSE = "direct → null, sparse"
FIXED_WORKERS = 4
FIXED = f"{SPARSE}, {FIXED_WORKERS} workers"
"""While concurrency is being found, a longer load comes to use more of its slots; a fixed one shows what else grows."""
OVER_WORKERS = (("direct → null", COLD), ("buffered → null", WARM), ("auto → cpu", COLD))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The quantities that grow.

    Attributes:
        shard_bytes: bytes of one shard of the checkpoints that grow in bytes.
        sparse: how many shards those without data have.
        written: how many those with data have, as far as there is room.
        divided_bytes: bytes of the checkpoints that grow in tensors.
        tensors: how many tensors those have.
        main_bytes: bytes of the checkpoint for workers and budgets.
        workers: fixed numbers of reading threads.
        budgets: host-memory budgets in bytes.
    """

    shard_bytes: int = 10**9
    sparse: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    written: tuple[int, ...] = (1, 2, 4, 8, 16)
    divided_bytes: int = 1024 * MIB
    tensors: tuple[int, ...] = (1, 10, 100, 1_000, 10_000, 100_000, 220_000)
    main_bytes: int = 2048 * MIB
    workers: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    budgets: tuple[int, ...] = tuple(mib * MIB for mib in (8, 16, 32, 64, 128, 256, 512, 1024))


QUICK = Sizes(
    shard_bytes=16_000_000,
    sparse=(1, 4),
    written=(1, 2),
    divided_bytes=16 * MIB,
    tensors=(1, 1_000),
    main_bytes=32 * MIB,
    workers=(1, 4),
    budgets=(8 * MIB, 32 * MIB),
)
"""Just enough to see that everything runs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What sections are made from.

    Attributes:
        sizes: the quantities.
        checkpoints: by kind (``sparse``, ``written``, ``divided``, ``main``) and by quantity, as far as needed.
        framework: whose tensors weightlift makes on the CPU.
        stock: the version of the safetensors library that is measured beside, or ``None``.
    """

    sizes: Sizes
    checkpoints: Mapping[str, Mapping[int, Checkpoint]]
    framework: str = "torch"
    stock: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One case, and where it lies.

    Attributes:
        series: the line that it belongs to.
        x: the quantity.
        case: what runs.
        sparse: its file has no data on any storage.
    """

    series: str
    x: int
    case: Case
    sparse: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The points of a section, and the claims about them.

    Attributes:
        axis: what grows.
        points: all points.
        ratios: claims about throughput.
        limits: claims about single figures.
        grown: pairs of cases whose difference in memory is a figure of its own, by its name.
    """

    axis: str
    points: tuple[Point, ...]
    ratios: tuple[Ratio, ...] = ()
    limits: tuple[Limit, ...] = ()
    grown: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def line(self, series: str) -> tuple[str, ...]:
        """Names of a line's cases, by growing quantity."""
        found = sorted((point for point in self.points if point.series == series), key=lambda point: point.x)
        return tuple(point.case.name for point in found)


def label(nbytes: int) -> str:
    """Bytes as they are called in names: ``64 GB``, ``128 MiB``."""
    if nbytes % MIB == 0:
        return f"{nbytes // MIB} MiB"
    return f"{nbytes / 1e9:g} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:g} MB"


def ours(
    context: Context, path: str, checkpoint: Checkpoint, state: CacheState, *, series: str, x: int, at: str, **more: Any
) -> Point:
    """A weightlift load along one of :data:`PATHS`."""
    options = {**PATHS[path], **more}
    if options["device"] != "null":
        options["framework"] = context.framework
    case = sections.load(f"{series}, {state}, {at}", checkpoint, state, **options)
    case = dataclasses.replace(case, contestant=dataclasses.replace(case.contestant, touch="mappings"))
    # What is read past the page cache, or out of it, takes memory for tensors of the caller's alone.
    if state is COLD and options["method"] != "mmap":
        owned = checkpoint.tensor_bytes if options["device"] != "null" else 0
        case = dataclasses.replace(case, memory_bytes=owned + SPARE_BYTES)
    return Point(series=series, x=x, case=case, sparse=series in (SPARSE, FIXED))


def stock(checkpoint: Checkpoint, state: CacheState, *, x: int, at: str) -> Point:
    """The safetensors library's load of the same file, every page touched."""
    contestant = Contestant(adapter="safetensors", mapped=True, touch="mappings")
    case = Case(name=f"{STOCK}, {state}, {at}", contestant=contestant, checkpoint=checkpoint, state=state)
    return Point(series=STOCK, x=x, case=case)


def over_bytes(context: Context) -> Scale:
    """Growing in bytes, cold: files with data as far as the disk holds them, sparse files beyond.

    A sparse file has no storage behind it: its time is that of everything but storage.
    """
    points: list[Point] = []
    for count, checkpoint in context.checkpoints["sparse"].items():
        nbytes = count * context.sizes.shard_bytes
        points += [
            ours(context, "direct → null", checkpoint, COLD, series=series, x=nbytes, at=label(nbytes), **more)
            for series, more in ((SPARSE, {}), (FIXED, {"workers": FIXED_WORKERS}))
        ]
    for count, checkpoint in context.checkpoints["written"].items():
        nbytes = count * context.sizes.shard_bytes
        points += [
            ours(context, path, checkpoint, COLD, series=path, x=nbytes, at=label(nbytes))
            for path in ("direct → null", "auto → cpu")
        ]
        if context.stock:
            points.append(stock(checkpoint, COLD, x=nbytes, at=label(nbytes)))
    scale = Scale(axis="bytes", points=tuple(points))
    limits = [
        Limit(case=point.case.name, figure="extra_anonymous_bytes", at_most=DEFAULT_BUDGET_BYTES)
        for point in points
        if point.series != STOCK
    ]
    ratios, grown = [], {}
    for series in (SPARSE, FIXED, "direct → null", "auto → cpu"):
        line = scale.line(series)
        least, most = line[0], line[-1]
        ratios.append(Ratio(name=f"{most}: speed over that at the least", over=(most,), under=(least,), at_least=0.9))
        if series in (FIXED, "auto → cpu"):
            grown[f"{series}, {GROWTH}"] = (least, most)
    limits += [Limit(case=name, figure="extra_anonymous_bytes", at_most=GROWTH_BYTES_MAX) for name in grown]
    return dataclasses.replace(scale, ratios=tuple(ratios), limits=tuple(limits), grown=grown)


def over_tensors(context: Context) -> Scale:
    """Growing in tensors at the same bytes, warm."""
    points: list[Point] = []
    for count, checkpoint in context.checkpoints["divided"].items():
        at = f"{count:,} tensor{'s' if count > 1 else ''}"
        points += [
            ours(context, path, checkpoint, WARM, series=path, x=count, at=at) for path in ("auto → cpu", "mmap → cpu")
        ]
        if context.stock:
            points.append(stock(checkpoint, WARM, x=count, at=at))
    scale = Scale(axis="tensors", points=tuple(points))
    most = scale.line("auto → cpu")[-1]
    limits = (
        Limit(case=most, figure="microseconds_per_tensor", at_most=20),
        Limit(case=most, figure="description_bytes_per_tensor", at_most=400),
    )
    ratios = []
    if context.stock:
        pairs = zip(scale.line("mmap → cpu"), scale.line(STOCK), strict=True)
        ratios = [
            Ratio(name=f"{mine}: speed over safetensors", over=(mine,), under=(theirs,), at_least=1.0)
            for mine, theirs in pairs
        ]
    return dataclasses.replace(scale, ratios=tuple(ratios), limits=limits)


def over_workers(context: Context) -> Scale:
    """Growing in reading threads; none given, they are found while loading."""
    checkpoint = context.checkpoints["main"][1]
    points, ratios = [], []
    for path, state in OVER_WORKERS:
        fixed = [
            ours(
                context,
                path,
                checkpoint,
                state,
                series=path,
                x=count,
                at=f"{count} worker{'s' if count > 1 else ''}",
                workers=count,
            )
            for count in context.sizes.workers
        ]
        found = ours(context, path, checkpoint, state, series=f"{path}, found", x=0, at="as found while loading")
        points += [*fixed, found]
        name = f"{found.case.name}: speed over the best number"
        best = tuple(point.case.name for point in fixed)
        ratios.append(Ratio(name=name, over=(found.case.name,), under=best, at_least=0.95))
    return Scale(axis="workers", points=tuple(points), ratios=tuple(ratios))


def over_budgets(context: Context) -> Scale:
    """Growing in the host-memory budget."""
    checkpoint = context.checkpoints["main"][1]
    points, ratios, limits = [], [], []
    for path, state in OVER_WORKERS:
        line = [
            ours(context, path, checkpoint, state, series=path, x=budget, at=label(budget), host_memory=budget)
            for budget in context.sizes.budgets
        ]
        points += line
        names = {point.x: point.case.name for point in line}
        least, roomy = names[min(names)], names.get(DEFAULT_BUDGET_BYTES, names[max(names)])
        ratios.append(Ratio(name=f"{least}: speed over {roomy}", over=(least,), under=(roomy,), at_least=0.9))
        limits += [Limit(case=point.case.name, figure="extra_anonymous_bytes", at_most=point.x) for point in line]
    return Scale(axis="budgets", points=tuple(points), ratios=tuple(ratios), limits=tuple(limits))


SECTIONS: Mapping[str, tuple[Callable[[Context], Scale], Sequence[str]]] = {
    "bytes": (over_bytes, ("sparse", "written")),
    "tensors": (over_tensors, ("divided",)),
    "workers": (over_workers, ("main",)),
    "budgets": (over_budgets, ("main",)),
}
"""Every section, with the kinds of checkpoints that it needs."""
