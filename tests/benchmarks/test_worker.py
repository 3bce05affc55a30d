"""The benchmarks' own worker: in an environment with nothing in it, beside a busy thread, and what it compares."""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.bench.process import Worker, WorkerFailure
from weightlift.testing import make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

numpy = pytest.importorskip("numpy", reason="numpy is not installed")

SECONDS = 120.0
PEER = """
class Tensor:
    def to(self, device):
        return device


class SafetensorsStreamer:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def stream_files(self, files, device=None):
        self.device = device

    def get_tensors(self):
        assert self.device == "somewhere"
        yield "x", Tensor()
        yield "y", Tensor()
"""


def request(path: Path, loader: str, **more: Any) -> dict[str, Any]:
    files = [str(path)]
    plain = {"loader": loader, "path": str(path), "files": files, "device": "cpu", "options": {}, "touch": ""}
    return plain | {"busy_thread": False} | more


def test_other_loaders_need_nothing_of_weightlifts_own(scripts: Path, tmp_path: Path) -> None:
    """Without site packages, as in an environment that has the other loader alone."""
    (tmp_path / "runai_model_streamer.py").write_text(PEER)
    wanted = request(tmp_path, "runai", device="somewhere", options={"pass_device": True}, import_from=[str(tmp_path)])
    with Worker(wanted, {}, (sys.executable, "-S", str(scripts / "worker.py"))) as worker:
        worker.hear("ready", SECONDS)
        worker.say("go")
        told = worker.hear("loaded", SECONDS)
    assert 0 < told["first_tensor_seconds"] <= told["seconds"]


@pytest.mark.parametrize("busy", [False, True])
def test_a_busy_thread_runs_beside_the_load(scripts: Path, tmp_path: Path, busy: bool) -> None:
    telling = "import threading\ndef GGUFReader(path):\n    raise OSError(f'{threading.active_count()} threads')\n"
    (tmp_path / "gguf.py").write_text(telling)
    wanted = request(tmp_path, "gguf_open", busy_thread=busy, import_from=[str(tmp_path)])
    with Worker(wanted, {}, (sys.executable, str(scripts / "worker.py"))) as worker:
        worker.hear("ready", SECONDS)
        worker.say("go")
        with pytest.raises(WorkerFailure, match=f"{1 + busy} threads"):
            worker.hear("loaded", SECONDS)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_every_tensor_is_compared_with_its_digest(scripts: Path, tmp_path: Path, framework: str) -> None:
    tensors: dict[str, Any] = {
        "matrix": numpy.arange(6, dtype="float32").reshape(2, 3).T,
        "scalar": numpy.ones(()),
        "none": numpy.zeros((0, 4)),
    }
    digests = importlib.import_module("digests")
    file = tmp_path / "digests.json"
    file.write_text(json.dumps({name: digests.digest_of(tensor.tobytes()) for name, tensor in tensors.items()}))
    if framework == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    wanted = {"digests": str(file), "every": 1}
    assert digests.compare(tensors, wanted) == {"tensors_checked": 3, "tensors": 3}
    assert digests.compare(tensors, wanted | {"every": 2})["tensors_checked"] == 2
    tensors["matrix"][1, 1] = 7
    with pytest.raises(RuntimeError, match="'matrix' has other bytes"):
        digests.compare(tensors, wanted)
    del tensors["none"]
    with pytest.raises(RuntimeError, match="2 tensors where 3 were expected"):
        digests.compare(tensors, wanted)


def test_a_tensor_with_other_bytes_ends_the_run(scripts: Path, tmp_path: Path) -> None:
    path, _ = make_checkpoint(tmp_path / "model.safetensors", shape=(64, 64))
    checkpoints = importlib.import_module("checkpoints")
    found = checkpoints.existing(path, tmp_path)
    sums = json.loads((tmp_path / "model.digests.json").read_text())
    (tmp_path / "model.digests.json").write_text(json.dumps(sums | {min(sums): "0"}))
    wanted = request(path, "weightlift", options={"framework": "numpy"})
    with Worker(wanted, {}, (sys.executable, str(scripts / "worker.py"))) as worker:
        worker.hear("ready", SECONDS)
        worker.say("go")
        worker.hear("loaded", SECONDS)
        worker.say({"digests": found.digests, "every": 1})
        with pytest.raises(WorkerFailure, match="has other bytes than the file"):
            worker.hear("checked", SECONDS)
