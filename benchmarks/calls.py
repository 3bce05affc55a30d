"""What single calls of the safetensors face cost: ``python benchmarks/calls.py`` writes ``results/calls.json``.

Programs call ``safe_open``, ``get_slice`` and ``get_tensor`` thousands of times. Each call is timed through
weightlift's face and through the safetensors library, in turns and on a warm file. Calls that read next to nothing are
repeated in one process. Those that read a whole file or much of it are the first of a fresh process each time, as they
are in programs: a process that gives tensors back and loads them again is handed memory that is there already. Right
before such a call a virtual machine's free memory is touched once, since its host may have taken it back, and what
that then takes to bring it is no loader's doing. The library hands out mappings, so whatever reads counts until one
byte of every page was looked at, for both.

With ``--device cuda:0 --output …/calls-gpu.json`` it is calls that bring tensors onto a card instead, each the first of
a process that has used the card, until all has arrived.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import environment
import tables
from claims import spread
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).resolve().parent / "results" / "calls.json"
LARGE_BYTES = 300 << 20
PAGE_BYTES = 4096
SPARE_BYTES = 64 << 20
"""Memory that is touched beside as much as the file's."""
LIMIT_MICROSECONDS = {"get_slice": 5.0, "safe_open, small file": 200.0}
KINDS = ("owned", "mapped")
SIDES = ("weightlift", "safetensors")
SLACK = 1.03

Call = tuple[str, int, Callable[[], Any]]


def touch(tensors: Mapping[str, Any]) -> None:
    """Look at one byte of every page of every tensor."""
    import torch

    for tensor in tensors.values():
        tensor.flatten().view(torch.uint8)[::PAGE_BYTES].sum()


def clone(tensors: Mapping[str, Any]) -> None:
    """Copy every tensor to memory of its own, one after the other, and keep all until the end."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    copies.clear()


def arrive(_tensors: Mapping[str, Any]) -> None:
    """Have all arrive on the card."""
    import torch

    torch.cuda.synchronize()


def keep(_tensors: Mapping[str, Any]) -> None:
    """Leave the tensors as they are: the caller owns them already."""


def small_calls(face: Any, small: Path, large: Path) -> Iterator[Call]:
    """Calls that read next to nothing: each one's name, how often it is repeated in a round, and the call.

    Args:
        face: the module with ``safe_open``.
        small: a file with ten tensors of 4 KiB.
        large: a file with many.
    """
    few, many = (face.safe_open(path, framework="pt") for path in (small, large))

    def open_small() -> None:
        with face.safe_open(small, framework="pt"):
            pass

    yield "safe_open, small file", 200, open_small
    yield "keys", 500, many.keys
    yield "get_slice", 2000, lambda: few.get_slice("tensor.3")
    yield "get_slice, one row of it", 500, lambda: many.get_slice("longest")[0:1]
    yield "get_tensor, 4 KiB", 500, lambda: few.get_tensor("tensor.3")


READS: Final[dict[str, Callable[[Any, Any, Path], Any]]] = {
    "get_tensor, 64 MiB": lambda opened, _, __: {"longest": opened.get_tensor("longest")},
    "get_tensor of each": lambda opened, _, __: {name: opened.get_tensor(name) for name in opened.keys()},  # noqa: SIM118
    "get_tensors": lambda opened, _, __: opened.get_tensors(),
    "load_file": lambda _, load_file, path: load_file(path),
}
"""Calls that read, of an open file, a function that loads one, and its path."""


FILL: Final = "load_into, memory never touched"
"""Filling tensors that have memory and nothing in it, as a module's are after ``to_empty``."""


def first_fill(side: str, large: Path) -> float:
    """Seconds of filling tensors, first thing in this process; the library's are copied over out of its own.

    Args:
        side: who fills them.
        large: the file.
    """
    import safetensors.torch
    import torch

    import weightlift
    from weightlift.bench.backed_memory import back_memory, is_virtual

    def copied() -> None:
        for name, tensor in safetensors.torch.load_file(large).items():
            tensors[name].copy_(tensor)

    torch.zeros(2, PAGE_BYTES, dtype=torch.bfloat16).copy_(torch.ones(2, PAGE_BYTES, dtype=torch.bfloat16))
    if is_virtual():
        back_memory(large.stat().st_size + SPARE_BYTES)
    tensors = {name: torch.empty(info.shape, dtype=torch.bfloat16) for name, info in weightlift.open(large).items()}
    return seconds(1, copied if side == "safetensors" else lambda: weightlift.load_into(tensors, large))


def first_read(side: str, kind: str, name: str, large: Path) -> float:
    """Seconds of a call that is the first of this process.

    Args:
        side: whose face.
        kind: ``owned`` or ``mapped``: what the tensors have to be in the end; or a device, where they are to be.
        name: one of :data:`READS`.
        large: the file.
    """
    import safetensors
    import safetensors.torch
    import torch

    import weightlift
    import weightlift.compat.safetensors as ours
    import weightlift.compat.safetensors.torch as ours_torch
    from weightlift.bench.backed_memory import back_memory, is_virtual

    use: Callable[[Mapping[str, Any]], None] = touch if kind == "mapped" else clone
    face: Any = safetensors.safe_open
    load_file: Any = safetensors.torch.load_file
    device = "cpu" if kind in KINDS else kind
    if side == "weightlift" and kind != "mapped":
        face, load_file, use = ours.safe_open, ours_torch.load_file, keep
    elif side == "weightlift":
        weightlift.patch(method="mmap")
        face, load_file = safetensors.safe_open, safetensors.torch.load_file
    if device != "cpu":
        use = arrive
    # What an operation of torch takes the first time is no loader's doing either.
    use({"": torch.zeros(2, PAGE_BYTES, dtype=torch.bfloat16, device=device)})
    opened = face(large, framework="pt", device=device)
    if is_virtual():
        back_memory(large.stat().st_size + SPARE_BYTES)
    return seconds(1, lambda: use(READS[name](opened, partial(load_file, device=device), large)))


def in_fresh_process(*words: str) -> float:
    """What :func:`first_read` says in another process."""
    command = [sys.executable, __file__, "--once", *words]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def calls(small: Path, large: Path, device: str) -> Iterator[tuple[str, dict[str, Callable[[], float]]]]:
    """Every call's name, and by side what takes it once."""
    import safetensors

    import weightlift.compat.safetensors as ours

    faces = {"weightlift": ours, "safetensors": safetensors}
    if device == "cpu":
        both = {
            side: {name: (repeats, call) for name, repeats, call in small_calls(face, small, large)}
            for side, face in faces.items()
        }
        for name in both["weightlift"]:
            yield name, {side: partial(seconds, *both[side][name]) for side in faces}
    has_all = hasattr(safetensors.safe_open(large, framework="pt"), "get_tensors")
    for kind in KINDS if device == "cpu" else (device,):
        for name in READS:
            sides = faces if has_all or name != "get_tensors" else ("weightlift",)
            yield f"{name}, {kind}", {side: partial(in_fresh_process, side, kind, name, str(large)) for side in sides}
    if device == "cpu":
        yield FILL, {side: partial(in_fresh_process, side, device, FILL, str(large)) for side in faces}


def seconds(repeats: int, call: Callable[[], Any]) -> float:
    """Time of one call, the mean of several."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(small: Path, large: Path, rounds: int, device: str) -> list[dict[str, Any]]:
    """Every call through both faces, in turns."""
    results = []
    for name, both in calls(small, large, device):
        runs: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(rounds + 1):
            for side in both if number % 2 else reversed(both):
                taken = both[side]() * 1e6
                # The first round brings everything into caches.
                runs[side] += [taken] if number else []
        results.append(judged(name, runs))
    return results


def judged(name: str, runs: dict[str, list[float]]) -> dict[str, Any]:
    """One call's microseconds on both sides, and whether it does what it should."""
    result: dict[str, Any] = {"call": name}
    result |= {side: spread(values) if values else None for side, values in runs.items()}
    ratios = [ours / theirs for ours, theirs in zip(runs["weightlift"], runs["safetensors"], strict=False)]
    result["ratio"] = spread(ratios) if ratios else None
    if name in LIMIT_MICROSECONDS:
        most = result["at_most_microseconds"] = LIMIT_MICROSECONDS[name]
        result["reached"] = result["weightlift"]["median"] <= most
    elif ratios and (name == FILL or any(name.startswith(f"{read}, ") for read in READS)):
        result["at_most_ratio"] = SLACK
        result["reached"] = result["ratio"]["median"] <= SLACK
    return result


def show(results: list[dict[str, Any]]) -> None:
    """The calls as a table."""
    table = Table(title="microseconds a call, warm", title_justify="left")
    for column in ("call", "weightlift", "safetensors", "ratio", "reached"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for one in results:
        figures = (tables.spread(one[side], digits=1) for side in ("weightlift", "safetensors"))
        table.add_row(one["call"], *figures, tables.spread(one["ratio"]), tables.MARKS[one.get("reached")])
    tables.CONSOLE.print(table)


def main() -> None:
    """Measure, show and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds, each with both sides (default 7)")
    parser.add_argument("--device", default="cpu", help="a card, to measure calls that bring tensors onto it instead")
    parser.add_argument("--size", type=int, default=LARGE_BYTES, help="bytes of the large file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    parser.add_argument("--once", nargs=4, metavar=("SIDE", "KIND", "CALL", "FILE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.once:
        side, kind, name, file = chosen.once
        print(first_fill(side, Path(file)) if name == FILL else first_read(side, kind, name, Path(file)))
        return
    from weightlift.testing import TensorSpec, llama_specs, write_checkpoint

    with tempfile.TemporaryDirectory(prefix="weightlift-calls-") as scratch:
        folder = Path(scratch)
        few = [TensorSpec(f"tensor.{number}", "F32", (32, 32)) for number in range(10)]
        small = write_checkpoint(folder / "small.safetensors", few)
        longest = TensorSpec("longest", "BF16", (8192, 4096))
        large = write_checkpoint(folder / "large.safetensors", [longest, *llama_specs(chosen.size)])
        results = measure(small, large, chosen.rounds, chosen.device)
        taken = environment.record(folder)
    show(results)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps({"schema": 1, "taken": taken, "calls": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
