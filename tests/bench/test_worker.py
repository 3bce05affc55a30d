"""One worker: the talk with it, what it checks, what it must not see, and how it ends."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from weightlift import bench
from weightlift.bench.contents import compare_parts, part_of, size_of, touch_mappings, touch_tensors
from weightlift.bench.loaders import LOADERS, FirstTensor
from weightlift.bench.memory import KINDS, MemoryWatch
from weightlift.bench.process import Worker, WorkerFailure, start_together
from weightlift.bench.samples import sample_parts
from weightlift.formats import describe
from weightlift.testing import TensorSpec, make_checkpoint, write_checkpoint
from weightlift.units import MIB

numpy = pytest.importorskip("numpy", reason="numpy is not installed")

SECONDS = 120.0


def request(path: Path, loader: str = "weightlift", **more: Any) -> dict[str, Any]:
    files = [str(path)]
    return {"loader": loader, "path": str(path), "files": files, "device": "null", "options": {}, "touch": ""} | more


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model.safetensors", shape=(64, 64))[0]


class TestTalk:
    def test_a_load(self, path: Path) -> None:
        with Worker(request(path, options={"method": "buffered"}), {}) as worker:
            assert worker.hear("ready", SECONDS) == {}
            memory = MemoryWatch(worker.process_id)
            worker.say("go")
            told = worker.hear("loaded", SECONDS, memory.look)
            assert told["seconds"] > 0
            assert told["touched_seconds"] is None
            assert told["report"]["method"]["requested"] == "buffered"
            assert (memory.peaks().anonymous_bytes is None) == (sys.platform != "linux")
            assert memory.peak.keys() == (set(KINDS) if sys.platform == "linux" else set())
            process_id = worker.process_id
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)

    def test_an_interrupt_before_it_is_used_ends_it(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[int] = []

        def interrupt(worker: Worker, _: Any) -> None:
            started.append(worker.process_id)
            raise KeyboardInterrupt

        monkeypatch.setattr(Worker, "say", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Worker(request(path), {})
        with pytest.raises(ProcessLookupError):
            os.kill(started[0], 0)

    @pytest.mark.skipif(os.name != "posix", reason="interrupts are no signals here")
    def test_an_interrupt_while_it_is_started_ends_it(self, path: Path) -> None:
        started: list[int] = []

        def make() -> Worker:
            worker = Worker(request(path), {})
            started.append(worker.process_id)
            # Without waiting it would come now, when only this function knows of the worker.
            signal.raise_signal(signal.SIGINT)
            return worker

        with pytest.raises(KeyboardInterrupt), contextlib.ExitStack() as stack:
            start_together({"it": make}, stack, (WorkerFailure,))
        with pytest.raises(ProcessLookupError):
            os.kill(started[0], 0)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_an_error_comes_with_its_class_and_hint(self, tmp_path: Path) -> None:
        with Worker(request(tmp_path / "nothing"), {}) as worker:
            worker.hear("ready", SECONDS)
            worker.say("go")
            with pytest.raises(WorkerFailure, match="nothing") as caught:
                worker.hear("loaded", SECONDS)
        assert (caught.value.kind, caught.value.ours) == ("CheckpointNotFoundError", True)
        assert caught.value.hint

    def test_a_loader_that_is_not_there(self, path: Path) -> None:
        with Worker(request(path, "fastsafetensors"), {}) as worker, pytest.raises(WorkerFailure) as caught:
            worker.hear("ready", SECONDS)
        assert (caught.value.kind, caught.value.ours) == ("ModuleNotFoundError", False)

    def test_one_that_ends_leaves_its_last_words(self, path: Path) -> None:
        command = (sys.executable, "-c", "import sys; sys.exit('out of order')")
        with Worker(request(path), {}, command) as worker, pytest.raises(WorkerFailure, match="code 1: out of order"):
            worker.hear("ready", SECONDS)

    def test_one_that_does_not_answer_is_given_up_and_ended(self, path: Path) -> None:
        command = (sys.executable, "-c", "import sys; sys.stdin.read()")
        with Worker(request(path), {}, command) as worker, pytest.raises(WorkerFailure, match="no answer within 0 s"):
            worker.hear("ready", 0.0)
        with pytest.raises(ProcessLookupError):
            os.kill(worker.process_id, 0)

    def test_what_a_loader_prints_does_not_come_between(self, path: Path, tmp_path: Path) -> None:
        """The package is one that talks a lot, found by ``PYTHONPATH``."""
        (tmp_path / "runai_model_streamer.py").write_text("print('hello')\nclass SafetensorsStreamer: ...\n")
        with Worker(request(path, "runai"), {"PYTHONPATH": str(tmp_path)}) as worker:
            worker.hear("ready", SECONDS)

    def test_it_loads_as_often_as_it_is_told(self, path: Path) -> None:
        """What is streamed comes one by one; what the process did is told beside what the clock says."""
        with Worker(request(path), {}) as worker:
            worker.hear("ready", SECONDS)
            for _ in range(2):
                worker.say("go")
                told = worker.hear("loaded", SECONDS)
                assert told["first_tensor_seconds"] is None
                assert told["processor_seconds"] >= 0
                worker.say([])
                assert worker.hear("checked", SECONDS)["compared"] == 0


class TestSurroundings:
    def test_it_imports_the_standard_library_alone(self) -> None:
        """Other loaders have environments of their own, without what weightlift depends on."""
        script = """
            import sys
            sys.path.append(sys.argv[1])
            import weightlift.bench.worker
            roots = {name.partition(".")[0] for name in sys.modules}
            print(*sorted(roots - sys.stdlib_module_names - {"__main__"}))
        """
        source = str(Path(bench.__file__).parents[2])
        command = [sys.executable, "-S", "-I", "-c", textwrap.dedent(script), source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["weightlift"], done.stderr

    def test_the_current_folder_is_not_on_the_import_path(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("json", "weightlift", "xxhash", "numpy"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the model folder')\n")
        monkeypatch.chdir(tmp_path)
        with Worker(request(path), {}) as worker:
            worker.hear("ready", SECONDS)
            worker.say("go")
            worker.hear("loaded", SECONDS)

    def test_peers_are_not_patched_and_paths_are_as_asked_for(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WEIGHTLIFT_PATCH", "1")
        monkeypatch.setenv("WEIGHTLIFT_METHOD", "unheard-of")
        monkeypatch.setenv("SEEN", "yes")
        names = "{'WEIGHTLIFT_PATCH', 'WEIGHTLIFT_METHOD', 'SEEN', 'MORE'}"
        command = (sys.executable, "-c", f"import os, sys; sys.exit(str(sorted(set(os.environ) & {names})))")
        with (
            Worker(request(path), {"MORE": "1"}, command) as worker,
            pytest.raises(WorkerFailure, match=r"\['MORE', 'SEEN'\]"),
        ):
            worker.hear("ready", SECONDS)


class TestTouch:
    def test_through_the_mappings_of_a_file(self, path: Path) -> None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            assert touch_mappings([str(path)]) == -(-len(mapping) // 4096)
        if sys.platform == "linux":
            with pytest.raises(RuntimeError, match=f"nothing of {path} is mapped"):
                touch_mappings([str(path)])

    def test_two_times_are_told(self, path: Path) -> None:
        wanted = request(path, device="cpu", options={"method": "mmap", "framework": "numpy"}, touch="tensors")
        with Worker(wanted, {}) as worker:
            worker.hear("ready", SECONDS)
            worker.say("go")
            told = worker.hear("loaded", SECONDS)
        assert told["touched_seconds"] > told["seconds"]


class TestCheck:
    SPECS = (TensorSpec("a", "F32", (3,)), TensorSpec("b", "U8", (3 * MIB + 5,)), TensorSpec("none", "F32", (0, 4)))

    def loaded(self, tmp_path: Path, framework: str) -> tuple[dict[str, Any], list[list[Any]]]:
        path = write_checkpoint(tmp_path / "model.safetensors", self.SPECS)
        description = describe(path)
        samples = sample_parts(description, range(len(description)), thorough=True)
        load = LOADERS["weightlift"](request(path, device="cpu", options={"framework": framework}))
        return dict(load(FirstTensor())), samples

    @pytest.mark.parametrize("framework", ["numpy", "torch"])
    def test_right_and_wrong_bytes(self, tmp_path: Path, framework: str) -> None:
        if framework == "torch":
            pytest.importorskip("torch", reason="torch is not installed")
        tensors, samples = self.loaded(tmp_path, framework)
        assert [part[0] for part in samples] == ["a", "b", "b"]
        right = {"tensors": 3, "bytes": 12 + 3 * MIB + 5, "wrong": None, "compared": 3}
        assert compare_parts(tensors, samples) == right
        tensors["b"][-1] += 1
        assert compare_parts(tensors, samples)["wrong"] == "b"
        del tensors["b"]
        assert compare_parts(tensors, samples)["wrong"] == "b"

    def test_views_and_scalars(self) -> None:
        scalar = numpy.float64(1.0).reshape(())
        turned = numpy.arange(6, dtype="uint8").reshape(2, 3).T
        assert part_of(turned, 0, 6) == bytes([0, 3, 1, 4, 2, 5])
        assert (size_of(scalar), len(part_of(scalar, 0, 8))) == (8, 8)
        large = numpy.zeros(2 * 4096 + 1, dtype="uint8")
        assert touch_tensors({"turned": turned, "empty": numpy.zeros((0, 3)), "large": large}) == 1 + 0 + 3

    def test_a_bounded_number_of_parts_spread_over_the_model(self, tmp_path: Path) -> None:
        specs = [TensorSpec(f"t{number:04}", "U8", (8,)) for number in range(1000)]
        description = describe(write_checkpoint(tmp_path / "many.safetensors", specs))
        thorough = sample_parts(description, range(1000), thorough=True)
        assert len(thorough) == 256
        assert len({part[0] for part in thorough}) == 256
        few = sample_parts(description, range(1000), thorough=False)
        assert [part[0] for part in few[:2]] == ["t0000", "t0062"]
        assert len(few) == 16
