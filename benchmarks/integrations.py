"""What weightlift changes under the frameworks that load models: load times, host memory, and nothing else.

Makes models with random weights, then loads them in a fresh process per run, stock and with weightlift underneath, warm
and cold in turns, and compares what models make of the same input. Nothing is fetched. Results are written after every
run, so that a run cut short still leaves its part; with ``--only``, those of other frameworks in the file stay. vLLM's
kernels take no part in loading, so its Python packages are enough.

    python benchmarks/integrations.py --output results.json            # a GPU, some 15 minutes
    python benchmarks/integrations.py --only exllamav3 --output results.json
    python benchmarks/integrations.py --tiny --device cpu --output x.json  # the same steps in seconds, to try them
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import environment
import integration_runs
import states
from integration_figures import FRAMEWORKS, loads
from integration_runs import COMPILED

import weightlift
from weightlift.bench.cache_states import StateNotReached
from weightlift.integrations.versions import installed_version

PACKAGES = ("weightlift", "torch", "accelerate", "safetensors", "transformers", "diffusers", "vllm", *COMPILED)
MAKING = Path(__file__).resolve().parent / "integration_models.py"


def bring_about(state: str, folder: Path) -> bool:
    """Make the checkpoint warm or cold; returns whether it is."""
    try:
        states.prepare(sorted(folder.glob("*.safetensors")), states.CacheState(state))
    except (StateNotReached, OSError):
        return False
    return True


# ---- all runs


def write_bytecode() -> None:
    """Compile weightlift, as installing does and Python may not: else every process would compile it anew."""
    compileall.compile_dir(Path(weightlift.__file__).parent, quiet=1)


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
        self.size = "tiny" if chosen.tiny else "full"
        self.output = Path(chosen.output)
        self.deadline = time.monotonic() + chosen.seconds
        where = environment.record(folder)
        where |= {"packages": {name: installed_version(name) for name in PACKAGES}, "gpus": gpus()}
        earlier = json.loads(self.output.read_text(encoding="utf-8")) if self.output.exists() else {}
        self.results: dict[str, Any] = {
            "schema": 3,
            "taken": earlier.get("taken", {}) | dict.fromkeys(chosen.only, where),
            "models": earlier.get("models", {}),
            "runs": [run for run in earlier.get("runs", ()) if _framework(run) not in chosen.only],
        }

    def write(self) -> None:
        """Write what there is, whole or not at all."""
        text = json.dumps(self.results, indent=1)
        partial = self.output.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.output)

    def model(self, name: str) -> Path:
        """The folder of a model, which is made when it is first asked for."""
        folder = self.folder / name
        if not folder.exists():
            begin = time.monotonic()
            making = [sys.executable, str(MAKING), name, str(folder), self.size, self.device]
            made = subprocess.run(making, capture_output=True, text=True, check=True)
            self.results["models"][name] = json.loads(made.stdout.splitlines()[-1]) | {
                "seconds_to_make": time.monotonic() - begin
            }
            self.write()
        return folder

    def run(self, framework: str, subject: str, state: str, **options: Any) -> dict[str, Any]:
        """One run; skipped with the reason if there is no time for it."""
        named = {"framework": framework, "subject": subject, "state": state, "options": options}
        if self.deadline - time.monotonic() < 10:
            record: dict[str, Any] = {"skipped": "no time left"}
        else:
            folder = self.model(FRAMEWORKS[_framework(named)].model)
            verified = bring_about(state, folder)
            request = named | {"folder": str(folder), "device": self.device}
            record = self._start(request, self.deadline - time.monotonic()) | {"state_verified": verified}
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


def arguments() -> argparse.Namespace:
    """What to measure, and for how long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="integrations.json", help="the results")
    parser.add_argument("--folder", help="where models are made; a temporary folder if left out")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="models of a few hundred KB, to try the steps")
    parser.add_argument("--seconds", type=float, default=900, help="time for all of it")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument(
        "--only", help=f"frameworks, in this order, with commas (default: all): {', '.join(FRAMEWORKS)}"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.only = chosen.only.split(",") if chosen.only else list(FRAMEWORKS)
    if unknown := sorted(set(chosen.only) - set(FRAMEWORKS)):
        parser.error(f"no framework called {', '.join(unknown)}; there are {', '.join(FRAMEWORKS)}")
    return chosen


def main() -> int:
    """Run everything there is time for, and write the results."""
    chosen = arguments()
    if chosen.worker:
        print("RESULT", json.dumps(integration_runs.worker(json.loads(chosen.worker))), flush=True)
        return 0
    write_bytecode()
    folder = Path(tempfile.mkdtemp(prefix="integrations-", dir=chosen.folder))
    try:
        plan = Plan(chosen, folder)
        for framework in chosen.only:
            everything(plan, framework, chosen.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for framework in chosen.only:
        print(f"\n{FRAMEWORKS[framework].title}\n\n{loads(plan.results['runs'], framework)}")
    return 0


def everything(plan: Plan, framework: str, repeats: int) -> None:
    """All runs of a framework, its own loader and ours in turns, since machines change while they are measured."""
    if framework.startswith(COMPILED) and not plan.device.startswith("cuda"):
        return
    tried = plan.run(f"try {framework}", "stock", "warm")
    if "error" in tried or "skipped" in tried:
        return
    for _ in range(repeats):
        for state in ("warm", "cold"):
            for subject in ("stock", "weightlift"):
                plan.run(framework, subject, state)
        if framework.startswith("exllamav2"):
            plan.run(framework, "weightlift", "cold", fasttensors=True)


if __name__ == "__main__":
    sys.exit(main())
