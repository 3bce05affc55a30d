"""What ``weightlift bench`` says of a card: this writes ``benchmarks/results/bench.json``.

The whole command, as its users run it, on a generated checkpoint on a fast disk made of memory, with every other loader
that is installed beside it. It is the command that is shown here: figures with more rounds and larger checkpoints are
those of ``gpu.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
import environment

from weightlift.testing.fast_disk import fast_disk

GIB = 1 << 30
INTERRUPTED = 130
RESULTS = Path(__file__).resolve().parent / "results" / "bench.json"


def bench(path: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """The command's own JSON object.

    Raises:
        RuntimeError: the command failed.
    """
    command = [sys.executable, "-m", "weightlift", "bench", str(path), "--device", chosen.device, "--json"]
    command += ["--rounds", str(chosen.rounds), "--paths", chosen.paths]
    if chosen.against:
        command += ["--against", chosen.against]
    if chosen.plot:
        command += ["--plot", str(chosen.plot)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            said, _ = running.communicate(timeout=chosen.seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGINT)
            said, _ = running.communicate()
    if running.returncode not in (0, INTERRUPTED):
        raise RuntimeError(f"bench left with {running.returncode}")
    # The folder was made for this and is gone; the machine's facts are recorded as those of all benchmarks are.
    found: dict[str, Any] = json.loads(said.replace(f"{path.parent}/", ""))
    return {name: value for name, value in found.items() if name != "facts"}


def main() -> None:
    """Run the command once and write down what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=4.0, help="GiB of the checkpoint (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the command (default 5)")
    parser.add_argument("--device", default="cuda:0", help="where tensors go (default cuda:0)")
    parser.add_argument("--against", default="all", help="other loaders as the command takes them, or '' (default all)")
    parser.add_argument("--paths", default="auto,auto-drop,direct,buffered,mmap", help="weightlift's paths")
    parser.add_argument("--seconds", type=float, help="have the command end after this time with what it found by then")
    parser.add_argument("--plot", type=Path, help="have the command draw its picture into this file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    chosen = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightlift-benchmarks-")))
        size = int(chosen.size * GIB)
        environment.grow_memory(3 * size)
        folder = stack.enter_context(fast_disk(size + GIB // 4))
        made = checkpoints.llama(folder, scratch, size)
        taken = environment.record(folder)
        result = {"schema": 1, "taken": taken, "bench": bench(Path(made.path), chosen)}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {chosen.output}")


if __name__ == "__main__":
    main()
