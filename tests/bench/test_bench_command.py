"""``weightlift bench`` as users run it: real loads in real processes, from a page cache that is really cold or warm."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_cache import kept

from weightlift.bench import cache_states, running
from weightlift.bench.contestants import PATHS
from weightlift.cli.main import main
from weightlift.host import residency, sweeping
from weightlift.host.processes import descendants
from weightlift.testing import make_checkpoint
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    Bench = Callable[..., tuple[int, dict[str, Any]]]
    Shards = Callable[[Path], list[Path]]
    Cached = Callable[[Path], int | None]

NULL = ("--device", "null")
CASE_FIELDS = {
    "name", "state", "package", "version", "options", "environment", "mapped", "seconds", "gigabytes_per_second",
    "fraction_of_ceiling", "baseline", "ratio_to_baseline", "peak_memory", "cached_after_bytes", "errors", "runs",
}  # fmt: skip


def spread_is_in_order(value: dict[str, float]) -> bool:
    return 0 < value["smallest"] <= value["median"] <= value["largest"]


class TestResults:
    def test_every_path_cold_and_warm(self, cold_model: Path, bench: Bench) -> None:
        code, found = bench(str(cold_model), *NULL, "--rounds", "3")
        assert code == 0
        assert (found["schema"], found["partial"], found["conclusive"]) == (1, False, True)
        assert (found["rounds_done"], found["files"], found["tensors"], found["bytes"]) == (3, 2, 8, 32 * MIB)
        assert [(case["state"], case["name"]) for case in found["cases"]] == [
            (state, path) for state in ("cold", "warm") for path in PATHS
        ]
        for case in found["cases"]:
            assert case.keys() == CASE_FIELDS
            assert case["errors"] == []
            assert spread_is_in_order(case["gigabytes_per_second"])
            assert spread_is_in_order(case["seconds"])
            assert (case["baseline"], case["ratio_to_baseline"] is None) == (
                (None, True) if case["name"] == "auto" else ("auto", False)
            )
            assert [run["round"] for run in case["runs"]] == [1, 2, 3]
            for run in case["runs"]:
                before = run["page_cache"]["before_bytes"]
                share = before / found["file_bytes"]
                assert share <= 0.005 if case["state"] == "cold" else share >= 0.995
        left = {case["name"]: case["cached_after_bytes"] for case in found["cases"] if case["state"] == "cold"}
        assert max(left["auto-drop"], left["direct"]) <= 128 * KIB
        assert left["buffered"] > 31 * MIB
        assert set(found["fastest"].values()) <= set(PATHS)
        assert found["recommendation"]["command"].startswith("weightlift load ")

    def test_ceilings_are_measured_every_round_and_fractions_taken_of_them(
        self, cold_model: Path, bench: Bench
    ) -> None:
        found = bench(str(cold_model), *NULL, "--rounds", "3", "--paths", "buffered")[1]
        cached = found["ceilings"]["cached"]
        assert len(cached["rounds"]) == 3
        assert spread_is_in_order(cached["gigabytes_per_second"])
        (warm,) = (case for case in found["cases"] if case["state"] == "warm")
        for run, ceiling in zip(warm["runs"], cached["rounds"], strict=True):
            assert run["ceiling"] == {"kind": "cached", "gigabytes_per_second": ceiling}
        assert spread_is_in_order(warm["fraction_of_ceiling"])

    def test_a_single_run_is_never_called_a_result(
        self, model: Path, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = (str(model), *NULL, "--rounds", "1", "--no-cold", "--paths", "auto,direct")
        found = bench(*words)[1]
        assert not found["conclusive"]
        for case in found["cases"]:
            assert case["runs"][0]["gigabytes_per_second"] > 0
            for figure in ("seconds", "gigabytes_per_second", "fraction_of_ceiling", "ratio_to_baseline"):
                assert case[figure] is None
        assert found["fastest"] == {"cold": None, "warm": None}
        assert all(ceiling["gigabytes_per_second"] is None for ceiling in found["ceilings"].values())
        assert main(["bench", *words]) == 0
        text = capsys.readouterr().out
        assert "these are single runs, not results" in text
        assert "×" not in text
        assert "fastest" not in text

    def test_names_pick_tensors(self, model: Path, bench: Bench) -> None:
        words = (*NULL, "--rounds", "1", "--no-cold", "--paths", "auto", "--names", "layers.0.*")
        found = bench(str(model), *words)[1]
        assert (found["tensors"], found["bytes"], found["files"]) == (1, 4 * MIB, 1)


class TestPageCache:
    def test_what_was_cached_is_cached_again_and_nothing_else(
        self, cold_model: Path, bench: Bench, shards: Shards, cached_bytes: Cached
    ) -> None:
        first, second = shards(cold_model)
        first.read_bytes()
        assert (cached_bytes(first), cached_bytes(second)) == (kept(first.stat().st_size), 0)
        found = bench(str(cold_model), *NULL, "--rounds", "1", "--paths", "buffered")[1]
        assert found["cases"][0]["runs"][0]["page_cache"]["before_bytes"] == 0
        assert (cached_bytes(first), cached_bytes(second)) == (kept(first.stat().st_size), 0)
        assert found["page_cache"]["before_bytes"] == found["page_cache"]["after_bytes"] == first.stat().st_size
        assert found["page_cache"]["note"] == ""

    def test_no_cold_drops_nothing(
        self, model: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, shards: Shards, cached_bytes: Cached
    ) -> None:
        dropped: list[object] = []
        monkeypatch.setattr(cache_states, "evict", dropped.extend)
        monkeypatch.setattr(sweeping, "sweep_until_settled", lambda _, ranges: dropped.extend(ranges))
        for file in shards(model):
            file.read_bytes()
        found = bench(str(model), *NULL, "--rounds", "1", "--no-cold")[1]
        assert dropped == []
        assert {case["state"] for case in found["cases"]} == {"warm"}
        assert found["not_measured"]["cold"] == "the files were not to be dropped from the page cache"
        if sys.platform == "linux":
            assert sum(cached_bytes(file) or 0 for file in shards(model)) == kept(found["file_bytes"])

    def test_other_files_stay_cached(
        self, cold_model: Path, bench: Bench, shards: Shards, cached_bytes: Cached
    ) -> None:
        other = cold_model.parent / "other.safetensors"
        other.write_bytes(shards(cold_model)[0].read_bytes())
        assert bench(str(cold_model), *NULL, "--rounds", "1", "--paths", "direct")[0] == 0
        assert cached_bytes(other) == kept(other.stat().st_size)

    def test_a_load_that_would_not_be_cold_is_not_measured_as_one(
        self, cold_model: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, shards: Shards
    ) -> None:
        """Another program reads the files between their eviction and the load."""

        def read(_: int) -> int:
            for file in shards(cold_model):
                file.read_bytes()
            return 0

        monkeypatch.setattr(running, "is_virtual", lambda: True)
        monkeypatch.setattr("weightlift.bench.rounds.back_memory", read)
        found = bench(str(cold_model), *NULL, "--rounds", "1", "--paths", "direct")[1]
        cold, warm = found["cases"]
        assert cold["errors"] == ["32.0 MiB of the files is in the page cache again"]
        assert "seconds" not in cold["runs"][0]
        assert warm["errors"] == []

    def test_cold_is_left_out_where_the_system_does_not_tell(
        self, model: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(residency, "residency", lambda *_: None)
        monkeypatch.setattr(residency, "residency_map", lambda *_: None)
        found = bench(str(model), *NULL, "--rounds", "1", "--paths", "auto")[1]
        assert [case["state"] for case in found["cases"]] == ["warm"]
        assert "could not be verified" in found["not_measured"]["cold"]
        assert any("does not confirm it" in note for note in found["notes"])
        assert found["cases"][0]["runs"][0]["page_cache"] == {"before_bytes": None, "after_bytes": None}

    def test_cold_is_left_out_where_pages_cannot_be_dropped(self, bench: Bench) -> None:
        shared = Path("/dev/shm")  # noqa: S108 - the one file system that keeps its pages; a folder of its own is made
        if not os.access(shared, os.W_OK):
            pytest.skip("this system has no /dev/shm to write to")
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            path, _ = make_checkpoint(Path(folder) / "model.safetensors")
            found = bench(str(path), *NULL, "--rounds", "1", "--paths", "buffered")[1]
        assert [case["state"] for case in found["cases"]] == ["warm"]
        assert "stayed in the page cache" in found["not_measured"]["cold"]


class TestPeers:
    def test_safetensors_beside_weightlift(self, model: Path, bench: Bench) -> None:
        words = ("--device", "cpu", "--rounds", "1", "--no-cold", "--paths", "auto,mmap", "--against", "all")
        code, found = bench(str(model), *words)
        assert code == 0
        own, mapped, peer, *others = found["cases"]
        assert all(case["name"].startswith("safetensors ") for case in (peer, *others))
        assert (peer["mapped"], peer["baseline"], peer["errors"]) == (True, "mmap", [])
        assert (own["mapped"], mapped["mapped"]) == (False, True)
        for case in found["cases"]:
            assert case["runs"][0]["parts_compared"] == 16, "begin and end of every tensor"
        if sys.platform == "linux":
            assert own["peak_memory"]["anonymous_bytes"] > 31 * MIB
            assert peer["peak_memory"]["file_bytes"] > 31 * MIB
        assert found["not_measured"]["instanttensor"] == "not installed in this Python"

    def test_other_formats_are_not_for_them(self, tmp_path: Path, bench: Bench) -> None:
        torch = pytest.importorskip("torch", reason="torch is not installed")
        path = tmp_path / "model.pt"
        torch.save({"weight": torch.arange(1 << 20)}, path)
        words = ("--device", "cpu", "--rounds", "1", "--no-cold", "--paths", "auto", "--against", "safetensors")
        found = bench(str(path), *words)[1]
        assert [case["name"] for case in found["cases"]] == ["auto"]
        assert any("reads safetensors files" in why for why in found["not_measured"].values())


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["{model}/nothing"], 1, "CheckpointNotFoundError"),
        (["{model}", "--rounds", "0"], 2, "OptionError"),
        (["{model}", "--rounds", "many"], 2, "UsageError"),
        (["{model}", "--device", "tpu"], 2, "OptionError"),
        (["{model}", "--paths", "auto,fast"], 2, "OptionError"),
        (["{model}", "--paths", ""], 2, "OptionError"),
        (["{model}", "--host-memory", "1MiB"], 4, "BudgetError"),
        (["{model}", "--names", "nothing"], 1, "SelectionError"),
        (["{model}", "--against", "nobody"], 2, "OptionError"),
        (["{model}", "--against", "fastsafetensors", "--device", "cpu"], 1, "MissingExtraError"),
        (["{model}", "--against", "all", "--device", "null"], 2, "OptionError"),
        (["{model}", "--against", "all", "--names", "layers.*"], 2, "OptionError"),
        (["{model}", "--plot", "{model}/plot.gif"], 2, "OptionError"),
        (["{model}", "--plot", "{model}/no/folder.svg"], 1, "FileNotFoundError"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    model: Path, bench: Bench, words: list[str], code: int, kind: str
) -> None:
    ending, answer = bench(*(word.format(model=model) for word in words))
    assert (ending, answer["error"]["type"]) == (code, kind)
    assert answer["error"]["hint"] or kind == "FileNotFoundError"


def test_a_device_that_is_not_there_is_the_commands_own_error(model: Path, bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    plot = tmp_path / "plot.svg"
    words = ("--device", "cuda:77", "--rounds", "2", "--no-cold", "--paths", "auto", "--plot", str(plot))
    code, answer = bench(str(model), *words)
    assert code == 1
    assert answer["error"]["type"].endswith("Error")
    assert answer["error"]["message"].startswith("no path could load the model: ")
    assert not plot.exists()


class TestInterrupt:
    def test_it_leaves_a_partial_result_and_nothing_else(
        self, cold_model: Path, shards: Shards, cached_bytes: Cached
    ) -> None:
        words = ["bench", str(cold_model), *NULL, "--rounds", "50", "--paths", "auto,buffered", "--progress", "--json"]
        with subprocess.Popen(
            [sys.executable, "-m", "weightlift", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            heard = []
            for line in process.stderr:
                heard.append(line)
                if line.startswith("measuring: 3 of "):
                    break
            workers = [one for one in descendants([process.pid]) if one != process.pid]
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.splitlines()[-1] == "interrupted"
        found: dict[str, Any] = json.loads(out)
        assert (found["partial"], found["conclusive"], found["rounds_done"]) == (True, False, 0)
        assert [case["name"] for case in found["cases"]][:2] == ["auto", "buffered"]
        assert all(case["gigabytes_per_second"] is None for case in found["cases"])
        assert [one for one in workers if alive(one)] == []
        assert sum(cached_bytes(file) or 0 for file in shards(cold_model)) == 0
        assert heard[0].startswith("measuring: 0 of 200, round 1: ")

    def test_before_anything_was_measured_it_is_an_interrupt_like_any(
        self, model: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("weightlift.bench.rounds.Worker", interrupt)
        code, answer = bench(str(model), *NULL, "--no-cold")
        assert (code, answer["error"]["message"]) == (130, "interrupted")


def alive(process_id: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, 0)
        return True
    return False
