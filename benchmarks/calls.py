"""What single calls of the safetensors face cost: ``python benchmarks/calls.py`` writes ``results/calls.json``.

Programs call ``safe_open``, ``get_slice`` and ``get_tensor`` thousands of times. Each call is timed through
weightlift's face and through the safetensors library, in turns within one process, on a warm file. The library hands
out mappings, so whatever reads counts until one byte of every page was looked at, for both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import environment
import tables
from claims import spread
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

RESULTS = Path(__file__).resolve().parent / "results" / "calls.json"
LARGE_BYTES = 300 << 20
PAGE_BYTES = 4096
LIMIT_MICROSECONDS = {"get_slice": 5.0, "safe_open, small file": 200.0}
NO_SLOWER = ("owned", "mapped")
SLACK = 1.03

Call = tuple[str, int, "Callable[[], Any]"]


def touch(tensors: Mapping[str, Any]) -> None:
    """Look at one byte of every page of every tensor."""
    import torch

    for tensor in tensors.values():
        tensor.flatten().view(torch.uint8)[::PAGE_BYTES].sum()


def clone(tensors: Mapping[str, Any]) -> None:
    """Copy every tensor to memory of its own, one after the other, and keep all until the end."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    copies.clear()


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


def reading_calls(
    kind: str, safe_open: Any, load_file: Callable[[Path], Any], large: Path, use: Callable[[Mapping[str, Any]], None]
) -> Iterator[Call]:
    """Calls that read.

    Args:
        kind: what is compared, for the name.
        safe_open: one of the classes.
        load_file: the function that goes with it.
        large: the file.
        use: what is done with the tensors.
    """
    opened = safe_open(large, framework="pt")
    names = list(opened.keys())
    yield f"get_tensor, 64 MiB, {kind}", 3, lambda: use({"longest": opened.get_tensor("longest")})
    yield f"get_tensor of each, {kind}", 1, lambda: use({name: opened.get_tensor(name) for name in names})
    if hasattr(opened, "get_tensors"):
        yield f"get_tensors, {kind}", 1, lambda: use(opened.get_tensors())
    yield f"load_file, {kind}", 1, lambda: use(load_file(large))


def sides(small: Path, large: Path) -> dict[str, dict[str, tuple[int, Callable[[], Any]]]]:
    """Both faces' calls by name."""
    import safetensors
    import safetensors.torch

    import weightlift
    import weightlift.compat.safetensors as ours
    import weightlift.compat.safetensors.torch as ours_torch

    theirs, their_load_file = safetensors.safe_open, safetensors.torch.load_file
    with weightlift.patch(method="mmap"):
        # These stay what they are when the patch is undone.
        mapped, mapped_load_file = safetensors.safe_open, safetensors.torch.load_file
    found = {
        "weightlift": (
            *small_calls(ours, small, large),
            *reading_calls("owned", ours.safe_open, ours_torch.load_file, large, keep),
            *reading_calls("mapped", mapped, mapped_load_file, large, touch),
        ),
        "safetensors": (
            *small_calls(safetensors, small, large),
            *reading_calls("owned", theirs, their_load_file, large, clone),
            *reading_calls("mapped", theirs, their_load_file, large, touch),
        ),
    }
    return {side: {name: (repeats, call) for name, repeats, call in calls} for side, calls in found.items()}


def seconds(repeats: int, call: Callable[[], Any]) -> float:
    """Time of one call, the mean of several."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(small: Path, large: Path, rounds: int) -> list[dict[str, Any]]:
    """Every call through both faces, in turns."""
    both = sides(small, large)
    results = []
    for name in both["weightlift"]:
        runs: dict[str, list[float]] = {side: [] for side in both}
        for number in range(rounds + 1):
            for side in both if number % 2 else reversed(both):
                if name in both[side]:
                    taken = seconds(*both[side][name]) * 1e6
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
    elif name.endswith(NO_SLOWER) and ratios:
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
    parser.add_argument("--size", type=int, default=LARGE_BYTES, help="bytes of the large file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    chosen = parser.parse_args()
    from weightlift.testing import TensorSpec, llama_specs, write_checkpoint

    with tempfile.TemporaryDirectory(prefix="weightlift-calls-") as scratch:
        folder = Path(scratch)
        few = [TensorSpec(f"tensor.{number}", "F32", (32, 32)) for number in range(10)]
        small = write_checkpoint(folder / "small.safetensors", few)
        longest = TensorSpec("longest", "BF16", (8192, 4096))
        large = write_checkpoint(folder / "large.safetensors", [longest, *llama_specs(chosen.size)])
        results = measure(small, large, chosen.rounds)
        taken = environment.record(folder)
    show(results)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps({"schema": 1, "taken": taken, "calls": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
