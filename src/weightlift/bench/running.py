"""One benchmark from a path to its result: what is in the model, what is to run, the rounds, and tidying up after them.

The rounds themselves are :mod:`weightlift.bench.rounds`; nothing here prints.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from weightlift import errors
from weightlift.bench.backed_memory import is_virtual
from weightlift.bench.cache_states import ModelFiles, Restored
from weightlift.bench.contestants import installed_version, own_contestants, peer_contestants
from weightlift.bench.results import BenchResult, case_results
from weightlift.bench.rounds import Model, Rounds
from weightlift.formats import describe
from weightlift.health.cache.files import FoundFile
from weightlift.health.facts import Speeds
from weightlift.health.recommend import recommend
from weightlift.host.memory import available_processors, headroom
from weightlift.options import LoadOptions
from weightlift.selection import select_rows
from weightlift.units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightlift.bench.contestants import Contestant
    from weightlift.bench.options import BenchOptions
    from weightlift.bench.rounds import Step
    from weightlift.health.facts import Facts

_PACKAGES: Final = ("weightlift", "torch", "numpy")
_AHEAD_MAX: Final = 4
_WAITING_BYTES: Final = 2 * GIB
"""What a process that has started torch and a device may hold on either side."""


def open_model(path: str | os.PathLike[str], options: BenchOptions) -> Model:
    """Read the headers, and take down what is cached of the files.

    Raises:
        WeightliftError: see :mod:`weightlift.errors`.
    """
    description = describe(path, header=LoadOptions(header=options.header).header)  # type: ignore[arg-type]
    rows = select_rows(description, None if options.names is None else tuple(options.names))
    if not description.bytes_of(rows):
        raise errors.SelectionError("there is not a byte to load", hint="name a checkpoint that holds tensors")
    used = sorted({description.shard_indexes[row] for row in rows})
    shards = [description.shards[index] for index in used]
    files = [FoundFile(shard.path, shard.identity) for shard in shards]
    cache = ModelFiles(files, may_drop=options.cold, brought_in=[list(shard.brought_in) for shard in shards])
    return Model(os.fspath(path), description, rows, files, cache)


def choose_device(facts: Facts) -> str:
    """The first GPU that torch can use, else the CPU; ``null`` where no framework is installed."""
    if facts.software.gpus:
        return facts.software.gpus[0].name
    return "cpu" if installed_version("torch") or installed_version("numpy") else "null"


def run_bench(
    path: str | os.PathLike[str],
    options: BenchOptions,
    *,
    gather: Callable[[str], Facts],
    progress: Callable[[Step], None] = lambda _: None,
) -> BenchResult:
    """Measure.

    Args:
        path: a checkpoint.
        options: how.
        gather: finds out about the machine, given the path.
        progress: called before every load.

    Returns:
        What was found; ``partial`` if it was interrupted.

    Raises:
        WeightliftError: the model cannot be read, or no path of weightlift's could load it.
        KeyboardInterrupt: before anything was measured.
    """
    begin = time.monotonic()
    model = open_model(path, options)
    facts = gather(model.path)
    device = choose_device(facts) if options.device is None else options.device
    device = "cuda:0" if device == "cuda" else device
    contestants = own_contestants(options.paths, options.load_keywords(), device)
    others, left_out = _peers(model, options, device)
    bench = Rounds(
        model,
        device,
        [*contestants, *others],
        options.rounds,
        progress,
        virtual=is_virtual(),
        ahead=workers_ahead(model, device, facts),
    )
    bench.not_measured.update(left_out)
    restored = Restored(before_bytes=None, after_bytes=None)
    try:
        bench.run()
    finally:
        restored = model.cache.restore(read_again=not bench.interrupted)
    _raise_if_nothing_loaded(bench)
    cases = case_results(bench.contestants, bench.runs)
    speeds = {kind: speed for found in bench.ceilings for kind, speed in found.speeds.items() if kind != "link"}
    facts = replace(facts, speeds=Speeds(storage=speeds)) if speeds else facts
    return BenchResult(
        path=model.path,
        file_format=model.description.file_format,
        tensors=len(model.rows),
        nbytes=model.nbytes,
        file_bytes=model.cache.total_bytes,
        files=len(model.files),
        device=device,
        rounds=options.rounds,
        rounds_done=bench.rounds_done,
        partial=bench.interrupted,
        ceilings=tuple(bench.ceilings),
        cases=cases,
        not_measured=bench.not_measured,
        notes=tuple(bench.notes),
        page_cache=restored,
        facts=facts,
        recommendation=recommend(facts),
        seconds=time.monotonic() - begin,
        versions={name: version for name in _PACKAGES if (version := installed_version(name))},
    )


def workers_ahead(model: Model, device: str, facts: Facts) -> int:
    """How many workers may wait for their loads: each takes a processor to start, and memory of host and device."""
    room = headroom()
    places = [_AHEAD_MAX, available_processors() // 2]
    if room is not None:
        places.append((room.available_bytes - 2 * model.cache.total_bytes) // _WAITING_BYTES)
    places += [
        (gpu.free_bytes - model.nbytes - model.nbytes // 4) // _WAITING_BYTES
        for gpu in facts.software.gpus or ()
        if gpu.name == device
    ]
    return max(1, min(places))


def _peers(model: Model, options: BenchOptions, device: str) -> tuple[list[Contestant], dict[str, str]]:
    if not options.against:
        return [], {}
    if device == "null":
        raise errors.OptionError(
            "against=… needs tensors, and no framework is installed for them", hint="install torch"
        )
    contestants, left_out = peer_contestants(options.against, device)
    if model.description.file_format != "safetensors" and contestants:
        why = f"it reads safetensors files, and these are {model.description.file_format}"
        return [], left_out | dict.fromkeys((one.name for one in contestants), why)
    return contestants, left_out


def _raise_if_nothing_loaded(bench: Rounds) -> None:
    """A typed error of the own loads is the benchmark's own, where none of them succeeded."""
    own = {contestant.name for contestant in bench.contestants if contestant.own}
    if bench.interrupted:
        return
    runs = [run for (_, name), made in bench.runs.items() if name in own for run in made]
    failed = [run for run in runs if run.error and not run.unready]
    if not failed or any(not run.error for run in runs):
        return
    kind = getattr(errors, failed[0].kind, None) if failed[0].ours else None
    message = f"no path could load the model: {failed[0].error}"
    hint = failed[0].hint or "weightlift load says more"
    raise (kind or errors.UnsupportedError)(message, hint=hint)
