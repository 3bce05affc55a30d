"""GGUF files: ``python benchmarks/gguf_files.py`` writes ``benchmarks/results/gguf.json``.

Two questions. How long does opening a file with a large vocabulary take, beside the package ``gguf``? And are the
tensors of a GGUF file read as fast as those of a safetensors file of the same size, by every path? The safetensors side
is what ``cpu.py`` compares with raw reads of the disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoints
import claims
import environment
import harness
import running
import sections
import tables
from claims import Ratio
from digests import digest_of
from harness import MIB, Case, Checkpoint, Contestant
from states import CacheState

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).resolve().parent / "results" / "gguf.json"
TOKENS = 250_000
OPEN_SECONDS_MAX = 0.5
FASTER_AT_LEAST = 20.0
SAME_AT_LEAST = 0.9
PARTS = ("opening", "cold", "warm")
METHODS = {
    "direct": {"method": "direct"},
    "buffered": {"method": "buffered", "cache": "keep"},
    "auto": {"method": "auto"},
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="measure this part; results of the others stay in the file")
    parser.add_argument("--rounds", type=int, default=5, help="runs of every case (default 5)")
    parser.add_argument("--size", type=float, default=8.0, help="GiB of the files whose tensors are read (default 8)")
    parser.add_argument("--folder", type=Path, help="generate the files here (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    return parser.parse_args()


def vocabulary_file(folder: Path) -> Checkpoint:
    """A file with 250,000 tokens and as many merges, scores and types, and next to no tensors."""
    import gguf
    import numpy

    path = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"Ġtoken{number:x}" for number in range(TOKENS)])
    writer.add_token_merges([f"Ġto{number:x} ken{number:x}" for number in range(TOKENS)])
    writer.add_token_scores([0.0] * TOKENS)
    writer.add_token_types([1] * TOKENS)
    writer.add_tensor("token_embd.weight", numpy.zeros((8, 32), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Checkpoint(path=str(path), files=(str(path),), tensor_bytes=path.stat().st_size, tensors=1, digests="")


def described(path: Path, scratch: Path) -> Checkpoint:
    """A GGUF file with the checksums of its tensors, taken by the package ``gguf``."""
    import gguf

    found = gguf.GGUFReader(path).tensors
    digests = scratch / f"{path.stem}.digests.json"
    digests.write_text(json.dumps({item.name: digest_of(item.data.tobytes()) for item in found}))
    return Checkpoint(
        path=str(path),
        files=(str(path),),
        tensor_bytes=sum(item.n_bytes for item in found),
        tensors=len(found),
        digests=str(digests),
    )


def model_file(folder: Path, scratch: Path, nbytes: int, kind: str = "Q8_0") -> Checkpoint:
    """A Llama of about so many bytes, in matrices of a real model's size."""
    from weightlift.testing import write_llama_gguf

    hidden, inner, vocabulary = 4096, 11008, 32000
    layer = (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * inner) * 34 // 32
    ends = vocabulary * hidden * 2 + vocabulary * hidden * 34 // 32
    if nbytes < ends + layer:
        hidden, inner, vocabulary = 1024, 2816, 4096
        layer, ends = layer // 16, ends // 31
    path = write_llama_gguf(
        folder / f"model-{nbytes >> 20}MiB.gguf",
        kind=kind,
        layers=max(1, (nbytes - ends) // layer),
        hidden=hidden,
        inner=inner,
        heads=hidden // 128,
        key_heads=hidden // 512,
        vocabulary=vocabulary,
    )
    return described(path, scratch)


def opening(checkpoint: Checkpoint, rounds: int) -> dict[str, Any]:
    """The first open of a warm file in a fresh process."""
    cases = [
        Case(
            name=name,
            contestant=Contestant(adapter=adapter, delivers=False),
            checkpoint=checkpoint,
            state=CacheState.WARM,
        )
        for name, adapter in (("weightlift.open", "weightlift_open"), ("gguf.GGUFReader", "gguf_open"))
    ]
    runs = running.rounds(cases, rounds)
    ours, theirs = ([run.get("seconds") for run in runs[case.name]] for case in cases)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True) if a and b]
    spread = claims.spread([seconds for seconds in ours if seconds])
    faster = claims.spread(ratios)
    return {
        "tokens": TOKENS,
        "cases": [harness.summary(case, runs[case.name]) for case in cases],
        "seconds_at_most": OPEN_SECONDS_MAX,
        "seconds_reached": spread is not None and spread["median"] <= OPEN_SECONDS_MAX,
        "faster": faster,
        "faster_at_least": FASTER_AT_LEAST,
        "faster_reached": faster is not None and faster["median"] >= FASTER_AT_LEAST,
    }


def reading(state: CacheState, pair: Sequence[Checkpoint], rounds: int) -> dict[str, Any]:
    """Every path over both formats in one state of the page cache."""
    cases, ratios = [], []
    for label, options in METHODS.items():
        both = [
            sections.load(f"{kind}, {label}, {state}", checkpoint, state, **options)
            for kind, checkpoint in zip(("GGUF", "safetensors"), pair, strict=True)
        ]
        cases += both
        name = f"GGUF over safetensors, {label}, {state}"
        ratios.append(Ratio(name=name, over=(both[0].name,), under=(both[1].name,), at_least=SAME_AT_LEAST))
    runs = running.rounds(cases, rounds)
    return {
        "rounds": rounds,
        "bytes": [checkpoint.tensor_bytes for checkpoint in pair],
        "cases": [harness.summary(case, runs[case.name]) for case in cases],
        "ratios": [claims.evaluate(ratio, runs) for ratio in ratios],
    }


def main() -> None:
    """Measure both and write the results."""
    chosen = arguments()
    with tempfile.TemporaryDirectory(prefix="weightlift-benchmarks-", dir=chosen.folder) as name:
        folder = Path(name)
        taken = environment.record(folder) | {"gguf": metadata.version("gguf")}
        found: dict[str, Any] = {}
        if chosen.only in {None, "opening"}:
            opened = found["opening"] = {"taken": taken} | opening(vocabulary_file(folder), chosen.rounds)
            tables.cases("opening a file with 250,000 tokens and merges", opened["cases"])
            tables.CONSOLE.print(f"opening is {tables.spread(opened['faster'])} times as fast")
        if chosen.only != "opening":
            model = model_file(folder, folder, int(chosen.size * 1024 * MIB))
            pair = (model, checkpoints.llama(folder, folder, model.tensor_bytes))
            for state in (CacheState.COLD, CacheState.WARM):
                if chosen.only in {None, state}:
                    read = found[state] = {"taken": taken} | reading(state, pair, chosen.rounds)
                    tables.cases(f"reading all tensors into CPU memory, {state}", read["cases"])
                    tables.claims(read["ratios"], [])
    kept = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(kept | {"schema": 1} | found, indent=1) + "\n")
    tables.CONSOLE.print(f"written: {chosen.output}")


if __name__ == "__main__":
    main()
