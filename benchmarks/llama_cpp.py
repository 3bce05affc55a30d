"""Beside llama.cpp: ``python benchmarks/llama_cpp.py`` writes ``benchmarks/results/llama_cpp.json``.

Builds llama.cpp from the source package of llama-cpp-python, once, and compares its load modes with weightlift's read
paths on the same GGUF file in the same rounds: seconds until every byte is in memory, peak memory by kind, and what
stays in the page cache. Then, what ``weightlift cache warm`` does for its first mapped load, and what ``weightlift
guard`` shows around one. Before that, a small model that llama.cpp loads and runs is compared byte for byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import claims
import environment
import gguf_files
import harness
import running
import sections
import states
import tables
from harness import MIB, Case, Checkpoint, Contestant
from peers import FOLDER
from states import CacheState

from weightlift.bench.memory import KINDS
from weightlift.bench.rounds import SPARE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESULTS = Path(__file__).resolve().parent / "results" / "llama_cpp.json"
PACKAGE = "llama-cpp-python==0.3.36"
BESIDE = ("diskcache", "jinja2", "markupsafe", "typing_extensions")
BUILD = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}
MODES = {"mmap": "MMAP", "no mmap": "NONE", "mlock": "MLOCK", "mmap and mlock": "MMAP_MLOCK", "direct I/O": "DIRECT_IO"}
PATHS: Mapping[str, Mapping[str, Any]] = {
    "mmap": {"method": "mmap"},
    "direct": {"method": "direct"},
    "buffered": {"method": "buffered", "cache": "keep"},
    "auto": {"method": "auto"},
}
FIGURES = (*harness.FIGURES, *(f"peak_{kind}" for kind in KINDS))
GENERATE = (
    "import json, sys; sys.path.insert(0, sys.argv[1]); from llama_cpp import Llama; "
    "model = Llama(sys.argv[2], n_ctx=64, verbose=False); "
    "print(json.dumps(model('a', max_tokens=4)['usage']))"
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=4.0, help="GiB of the model (default 4)")
    parser.add_argument("--model", type=Path, help="measure this GGUF file instead")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every case (default 3)")
    parser.add_argument("--folder", type=Path, help="generate the model here (default: a temporary folder)")
    parser.add_argument("--wheel", type=Path, help="a wheel of llama-cpp-python that was built before")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    return parser.parse_args()


def build(wheel: Path | None) -> Path:
    """The folder with llama-cpp-python in it, built from its source package unless it is there already.

    Raises:
        subprocess.CalledProcessError: the build failed; its words are on the terminal.
    """
    folder = FOLDER / PACKAGE
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        told = [str(wheel)] if wheel else ["--no-binary", "llama-cpp-python", PACKAGE]
        print("building llama.cpp, which takes minutes", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=_made(FOLDER)) as unfinished:
            target = Path(unfinished) / "package"
            subprocess.run([*pip, "--target", str(target), *told], check=True, env={**os.environ, **BUILD})
            subprocess.run([*pip, "--target", str(target), *BESIDE], check=True)
            target.rename(folder)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def modes(package: Path) -> dict[str, str]:
    """The load modes that this version has."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import llama_cpp; print(*dir(llama_cpp))"
    names = _output(sys.executable, "-P", "-c", program, str(package)).split()
    return {label: mode for label, mode in MODES.items() if f"LLAMA_LOAD_MODE_{mode}" in names}


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def tiny_model(package: Path, folder: Path) -> dict[str, Any]:
    """A complete small model: llama.cpp loads and runs it, and every tensor of it arrives byte for byte."""
    import gguf

    from weightlift import load
    from weightlift.testing import write_llama_gguf

    path = write_llama_gguf(folder / "tiny.gguf")
    state = load(path, framework="numpy")
    found = gguf.GGUFReader(path).tensors
    differing = [item.name for item in found if state[item.name].tobytes() != item.data.tobytes()]
    used = json.loads(_output(sys.executable, "-P", "-c", GENERATE, str(package), str(path)).splitlines()[-1])
    same = not differing and len(state) == len(found)
    return {"tensors": len(found), "identical": same, "differing": differing, "tokens_made": used["completion_tokens"]}


def compared(checkpoint: Checkpoint, package: Path, state: CacheState, known: Mapping[str, str]) -> list[Case]:
    """Every mode of llama.cpp and every path of weightlift from one state of the page cache."""
    theirs = [
        Case(
            name=f"llama.cpp, {label}, {state}",
            contestant=_llama(package, mode),
            checkpoint=checkpoint,
            state=state,
            # Its weights are in memory of its own unless it maps them.
            memory_bytes=2 * checkpoint.tensor_bytes + SPARE_BYTES,
        )
        for label, mode in known.items()
    ]
    ours = [
        sections.load(f"weightlift, {label}, {state}", checkpoint, state, **{**options, "framework": "numpy"})
        for label, options in PATHS.items()
    ]
    return [*theirs, *ours]


def _llama(package: Path, mode: str) -> Contestant:
    return Contestant(
        adapter="llama_cpp",
        options={"load_mode": mode},
        import_from=(str(package),),
        mapped="MMAP" in mode,
        touch="mappings",
        delivers=False,
    )


def warmed(checkpoint: Checkpoint, package: Path, rounds: int) -> dict[str, Any]:
    """The first mapped load of llama.cpp from a cold file, and the same after ``weightlift cache warm``."""
    cold = Case(name="cold", contestant=_llama(package, "MMAP"), checkpoint=checkpoint, state=CacheState.COLD)
    after = dataclasses.replace(cold, name="after cache warm", state=CacheState.AS_LEFT)
    runs: dict[str, list[claims.Run]] = {cold.name: [], after.name: []}
    for _ in range(rounds):
        runs[cold.name].append(running.once(cold))
        states.prepare(checkpoint.files, CacheState.COLD)
        begin = time.perf_counter()
        done = subprocess.run(
            _weightlift("cache", "warm", checkpoint.path), capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - begin
        if done.returncode:
            return {"error": done.stderr.strip()[-300:]}
        runs[after.name].append(running.once(after) | {"warming_seconds": seconds})
    pairs = zip(runs[cold.name], runs[after.name], strict=True)
    faster = [a["touched_seconds"] / b["touched_seconds"] for a, b in pairs if "error" not in a and "error" not in b]
    return {
        "cases": [_summary(case, runs[case.name]) for case in (cold, after)],
        "load_faster": claims.spread(faster),
        "warming_seconds": claims.spread([run["warming_seconds"] for run in runs[after.name]]),
    }


def guarded(checkpoint: Checkpoint, package: Path, folder: Path) -> dict[str, Any]:
    """What ``weightlift guard`` says while llama.cpp loads without mmap."""
    log = folder / "guard.jsonl"
    request = harness.request(Case(name="guarded", contestant=_llama(package, "NONE"), checkpoint=checkpoint))
    worker = (sys.executable, str(harness.WORKER))
    states.prepare(checkpoint.files, CacheState.COLD)
    done = subprocess.run(
        _weightlift("guard", "--display", "lines", "--log", str(log), "--", *worker),
        input=f'{json.dumps(request)}\n"go"\n',
        capture_output=True,
        text=True,
        check=False,
    )
    # llama.cpp talks on the same stream.
    shown = [line for line in done.stderr.splitlines() if line.startswith("weightlift guard")]
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {"exit": done.returncode, "shown": shown, "log": entries}


def _weightlift(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "weightlift", *words]


def _summary(case: Case, runs: Sequence[claims.Run]) -> dict[str, Any]:
    for run in runs:
        run.update({f"peak_{kind}": nbytes for kind, nbytes in run.pop("peaks", {}).items()})
    return harness.summary(case, runs, FIGURES)


def main() -> None:
    """Build, measure and write the results."""
    chosen = arguments()
    package = build(chosen.wheel)
    with tempfile.TemporaryDirectory(prefix="weightlift-benchmarks-", dir=chosen.folder) as name:
        folder = Path(name)
        taken = environment.record(folder) | {"llama_cpp_python": PACKAGE}
        tiny = tiny_model(package, folder)
        if chosen.model:
            checkpoint = gguf_files.described(chosen.model.resolve(), folder)
        else:
            checkpoint = gguf_files.model_file(folder, folder, int(chosen.size * 1024 * MIB))
        known = modes(package)
        cases = [
            case for state in (CacheState.COLD, CacheState.WARM) for case in compared(checkpoint, package, state, known)
        ]
        runs = running.rounds(cases, chosen.rounds)
        summed = [_summary(case, runs[case.name]) for case in cases]
        result = {
            "schema": 1,
            "taken": taken,
            "model": {"bytes": checkpoint.tensor_bytes, "tensors": checkpoint.tensors},
            "tiny_model": tiny,
            "modes": known,
            "cases": summed,
            "cache_warm": warmed(checkpoint, package, chosen.rounds),
            "guard": guarded(checkpoint, package, folder),
        }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    tables.cases("llama.cpp's load modes and weightlift's paths on one file", summed)
    tables.CONSOLE.print(f"the tiny model is the same byte for byte: {tiny['identical']}; written: {chosen.output}")


if __name__ == "__main__":
    main()
