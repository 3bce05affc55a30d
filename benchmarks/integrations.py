"""What weightlift changes under transformers, ExLlamaV2 and ExLlamaV3: load times, host memory, and nothing else.

Makes a random Llama checkpoint in half precision, then loads it in a fresh process per run, stock and with weightlift
underneath, warm and cold, and compares the digests of logits. Nothing is fetched. Results are written after every run,
so that a run cut short still leaves its part; with ``--only``, those of other frameworks in the file stay.

    python benchmarks/integrations.py --output results.json            # a GPU, some 8 minutes
    python benchmarks/integrations.py --only exllamav3 --output results.json
    python benchmarks/integrations.py --tiny --device cpu --output x.json  # the same steps in seconds, to try them
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import environment
import integration_figures
import integration_runs
import states

from weightlift.bench.cache_states import StateNotReached
from weightlift.integrations.versions import installed_version

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("weightlift", "torch", "transformers", "accelerate", "safetensors", "exllamav2", "exllamav3")
FRAMEWORKS = ("transformers", "exllamav2", "exllamav3")
COLD_FRACTION = 0.01
"""So much of the files may be cached for a load to count as cold."""

SHAPES = {
    "full": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 14, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512},
}
HEADS = {"full": 32, "tiny": 4}


# ---- the checkpoint


def make_checkpoint(folder: Path, size: str, device: str) -> dict[str, Any]:
    """A Llama with random weights, in two shards or more, written to disk and known to be there."""
    import torch
    import transformers

    torch.manual_seed(0)
    heads = HEADS[size]
    config = transformers.LlamaConfig(
        **SHAPES[size],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        dtype=torch.float16,
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.float16)
    model.save_pretrained(folder, max_shard_size="4GB" if size == "full" else "300KB")
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
        "parameters": model.num_parameters(),
    }


def bring_about(state: str, folder: Path) -> bool:
    """Make the checkpoint warm or cold; returns whether it is."""
    try:
        states.prepare(sorted(folder.glob("*.safetensors")), states.CacheState(state))
    except (StateNotReached, OSError):
        return False
    return True


# ---- all runs


def gpus() -> list[str]:
    """The names of this machine's GPUs, asked in a process of its own, which gives their memory back."""
    asking = "import torch; print(*map(torch.cuda.get_device_name, range(torch.cuda.device_count())), sep=chr(10))"
    return subprocess.run(
        [sys.executable, "-c", asking], capture_output=True, text=True, check=True
    ).stdout.splitlines()


class Plan:
    """The runs, the time they may take, and the file that holds what came out so far."""

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        self.device = chosen.device
        self.output = Path(chosen.output)
        self.deadline = time.monotonic() + chosen.seconds
        where = environment.record(folder)
        where |= {"packages": {name: installed_version(name) for name in PACKAGES}, "gpus": gpus()}
        earlier = json.loads(self.output.read_text(encoding="utf-8")) if self.output.exists() else {}
        self.results: dict[str, Any] = {
            "schema": 2,
            "taken": earlier.get("taken", {}) | dict.fromkeys(chosen.only, where),
            "runs": [run for run in earlier.get("runs", ()) if _framework(run) not in chosen.only],
        }

    def write(self) -> None:
        """Write what there is, whole or not at all."""
        text = json.dumps(self.results, indent=1)
        partial = self.output.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.output)

    def run(self, framework: str, subject: str, state: str, **options: Any) -> dict[str, Any]:
        """One run; skipped with the reason if there is no time for it."""
        named = {"framework": framework, "subject": subject, "state": state, "options": options}
        left = self.deadline - time.monotonic()
        if left < 10:
            record: dict[str, Any] = {"skipped": "no time left"}
        else:
            verified = bring_about(state, self.folder)
            request = named | {"folder": str(self.folder), "device": self.device}
            record = self._start(request, left) | {"state_verified": verified}
        self.results["runs"].append(named | record)
        self.write()
        shown = f"{record['seconds']:.2f} s" if "seconds" in record else record.get("skipped") or record.get("error")
        print(f"{framework}, {subject}, {state} {options or ''}: {shown}", flush=True)
        return record

    @staticmethod
    def _start(request: dict[str, Any], left: float) -> dict[str, Any]:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(request)]
        try:
            finished = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=max(left, 5),
                check=False,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done within {left:.0f} s"}
        lines = [line for line in finished.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            return {"error": f"exit code {finished.returncode}", "traceback": finished.stderr[-3000:]}
        record: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
        return record


def _framework(run: dict[str, Any]) -> str:
    return str(run["framework"]).removeprefix("try ")


def main() -> int:
    """Make the checkpoint, run everything there is time for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="integrations.json", help="the results")
    parser.add_argument("--folder", help="where the checkpoint is made; a temporary folder if left out")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a checkpoint of a few hundred KB, to try the steps")
    parser.add_argument("--seconds", type=float, default=500, help="time for all of it")
    parser.add_argument("--repeats", type=int, default=3, help="warm runs of each kind; cold ones are one fewer")
    parser.add_argument(
        "--only", help=f"frameworks, in this order, with commas (default: all): {', '.join(FRAMEWORKS)}"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.only = chosen.only.split(",") if chosen.only else list(FRAMEWORKS)
    if unknown := sorted(set(chosen.only) - set(FRAMEWORKS)):
        parser.error(f"no framework called {', '.join(unknown)}; there are {', '.join(FRAMEWORKS)}")
    if chosen.worker:
        print("RESULT", json.dumps(integration_runs.worker(json.loads(chosen.worker))), flush=True)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="integrations-", dir=chosen.folder))
    try:
        plan = Plan(chosen, folder)
        begin = time.monotonic()
        # In a process of its own, so that its device memory is given back.
        making = [sys.executable, "-c", MAKING, str(folder), "tiny" if chosen.tiny else "full", chosen.device]
        made = subprocess.run(making, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        plan.results["checkpoint"] = json.loads(made.stdout.splitlines()[-1])
        plan.results["checkpoint"]["seconds_to_make"] = time.monotonic() - begin
        plan.write()
        everything(plan, chosen.only, chosen.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for framework in chosen.only:
        print(f"\n{framework}\n\n{integration_figures.loads(plan.results['runs'], framework)}")
    return 0


MAKING = """
import json, sys
from pathlib import Path
from integrations import make_checkpoint
print(json.dumps(make_checkpoint(Path(sys.argv[1]), sys.argv[2], sys.argv[3])))
"""


def everything(plan: Plan, frameworks: Sequence[str], repeats: int) -> None:
    """The most telling runs first, stock and ours in turns, since machines change while they are measured."""
    for state, count in (("warm", repeats), ("cold", max(repeats - 1, 1))):
        for _ in range(count):
            for subject in ("stock", "weightlift"):
                if "transformers" in frameworks:
                    plan.run("transformers", subject, state)
    for framework in frameworks:
        if framework != "transformers" and plan.device.startswith("cuda"):
            _everything_compiled(plan, framework, repeats)


def _everything_compiled(plan: Plan, framework: str, repeats: int) -> None:
    tried = plan.run(f"try {framework}", "stock", "warm")
    if "error" in tried or "skipped" in tried:
        return
    for _ in range(repeats):
        for state in ("warm", "cold"):
            for subject in ("stock", "weightlift"):
                plan.run(framework, subject, state)
        if framework == "exllamav2":
            plan.run(framework, "weightlift", "cold", fasttensors=True)


if __name__ == "__main__":
    sys.exit(main())
