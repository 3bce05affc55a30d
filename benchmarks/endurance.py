"""Many loads in one process with random options, faults and cancellations: what it holds must not grow.

Also kills loads at random moments, and looks for files they leave. Writes ``results/endurance.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy

import weightlift as wl
from weightlift.host.memory import process_memory
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint

SPECS: Final = [TensorSpec(f"layer.{n}", "F32", (64, 1024)) for n in range(8)]
RESULTS: Final = Path(__file__).parent / "results" / "endurance.json"
KILLED = """
import sys
import numpy
import weightlift as wl
print("ready", flush=True)
while True:
    wl.load(sys.argv[1], framework="numpy", engine=sys.argv[2], method=sys.argv[3])
"""


class Stop(Exception):  # noqa: N818 - what a person does, not an error
    """Raised from a progress callback."""


def holds() -> dict[str, int | None]:
    """Anonymous memory in bytes, descriptors and threads of this process."""
    memory = process_memory()
    return {
        "anonymous_bytes": memory.anonymous_bytes if memory else None,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def one_load(path: Path, rng: random.Random) -> str:
    """Load once in a random way, check the bytes, and name how it ended."""
    fate = rng.choice(["whole", "whole", "stopped", "truncated", "appended", "stream left"])
    method = rng.choice(["auto", "direct", "buffered"])
    options: dict[str, Any] = {"method": method, "engine": rng.choice(["auto", "python"]), "framework": "numpy"}
    options |= {"cache": rng.choice(["auto", "keep", "drop"]), "workers": rng.choice([None, 1, 2, 7])}
    options["chunk_bytes"] = rng.choice([None, 65536, 1 << 20])

    def progress(_done: int, _total: int) -> None:
        if fate == "stopped":
            raise Stop
        if fate == "truncated":
            os.truncate(path, path.stat().st_size // 2)
        if fate == "appended":
            with path.open("ab") as file:
                file.write(b"more")

    try:
        if fate == "stream left":
            with wl.stream(path, **options) as stream:
                next(stream)
            return "stream left"
        state = wl.load(path, progress=progress, **options)
    except Stop:
        return "stopped"
    except (wl.errors.TruncatedFileError, wl.errors.FileChangedError) as error:
        write_checkpoint(path, SPECS)
        return type(error).__name__
    spec = rng.choice(SPECS)
    assert state[spec.name].tobytes() == tensor_bytes(spec)
    return "whole"


def kill_loads(folder: Path, path: Path, count: int, rng: random.Random) -> list[str]:
    """Kill loading processes at random moments; return the names of files that were not there before."""
    before = set(folder.rglob("*")) | set(Path("/dev/shm").iterdir())  # noqa: S108 - looked at, not written
    for _ in range(count):
        words = [
            sys.executable,
            "-c",
            KILLED,
            str(path),
            rng.choice(["auto", "python"]),
            rng.choice(["auto", "direct"]),
        ]
        environment = os.environ | {"TMPDIR": str(folder)}
        with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
    after = set(folder.rglob("*")) | set(Path("/dev/shm").iterdir())  # noqa: S108 - looked at, not written
    return sorted(str(name) for name in after - before)


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    rng, endings, samples = random.Random(arguments.seed), Counter[str](), []
    with tempfile.TemporaryDirectory() as name:
        path = write_checkpoint(Path(name) / "model.safetensors", SPECS)
        for number in range(arguments.loads):
            endings[one_load(path, rng)] += 1
            if number % max(1, arguments.loads // 30) == 0 or number == arguments.loads - 1:
                samples.append({"load": number + 1, **holds()})
        write_checkpoint(path, SPECS)
        left = kill_loads(Path(name), path, arguments.kills, rng)
    result = {
        "seed": arguments.seed,
        "loads": arguments.loads,
        "endings": dict(endings),
        "samples": samples,
        "kills": arguments.kills,
        "files_left": left,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["endings"]), samples[0], samples[len(samples) // 2], samples[-1], left)


if __name__ == "__main__":
    main()
