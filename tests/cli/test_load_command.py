"""``weightlift load``: its JSON as promised, its text, and what its options do."""

from __future__ import annotations

import json
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

import pytest

from weightlift.cli.main import main
from weightlift.testing import GGUFSpec, TensorSpec, make_checkpoint, tensor_digest, write_checkpoint, write_gguf

if TYPE_CHECKING:
    from pathlib import Path

# Every field that the command promises; bytes that the system may not tell are null.
FIELDS: Final[dict[str, tuple[type, ...]]] = {
    "schema": (int,),
    "tensors": (int,),
    "bytes": (int,),
    "seconds": (float,),
    "gigabytes_per_second": (float,),
    "device": (str,),
    "engine": (str,),
    "method": (dict,),
    "method.requested": (str,),
    "method.used": (dict,),
    "method.used.direct": (int,),
    "method.used.buffered": (int,),
    "method.used.mmap": (int,),
    "method.reason": (str,),
    "host_memory": (dict,),
    "host_memory.budget_bytes": (int,),
    "host_memory.staging_bytes": (int,),
    "host_memory.description_bytes": (int,),
    "host_memory.peak_anonymous_bytes": (int, NoneType),
    "host_memory.peak_pinned_bytes": (int,),
    "page_cache": (dict,),
    "page_cache.before_bytes": (int, NoneType),
    "page_cache.after_bytes": (int, NoneType),
    "swap": (dict,),
    "swap.in_bytes": (int, NoneType),
    "swap.out_bytes": (int, NoneType),
    "pressure_stall_seconds": (float, NoneType),
    "ceilings": (dict,),
    "ceilings.storage": (float, NoneType),
    "ceilings.memory_copy": (float, NoneType),
    "ceilings.link": (float, NoneType),
    "bottleneck": (str,),
    "digest": (dict,),
}


def field(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value[name]
    return value


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[str, list[TensorSpec]]:
    path, specs = make_checkpoint(tmp_path / "model", shape=(256, 300), count=6, shards=2, seed=3)
    return str(path), specs


@pytest.mark.parametrize("device", ["null", "cpu"])
@pytest.mark.parametrize("method", ["auto", "mmap", "direct", "buffered"])
def test_json_has_every_promised_field(
    checkpoint: tuple[str, list[TensorSpec]], capsys: pytest.CaptureFixture[str], method: str, device: str
) -> None:
    path, specs = checkpoint
    code, out, err = run(capsys, "load", path, "--device", device, "--method", method, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    wrong = {path: value for path, kinds in FIELDS.items() if type(value := field(report, path)) not in kinds}
    assert wrong == {}
    assert report["schema"] == 1
    assert (report["tensors"], report["bytes"]) == (len(specs), sum(spec.nbytes for spec in specs))
    assert (report["device"], report["method"]["requested"]) == (device, method)
    assert sum(report["method"]["used"].values()) >= report["bytes"]


@pytest.mark.parametrize("device", ["null", "cpu"])
def test_digests_are_those_of_the_stored_bytes(
    checkpoint: tuple[str, list[TensorSpec]], capsys: pytest.CaptureFixture[str], device: str
) -> None:
    path, specs = checkpoint
    expected = {spec.name: tensor_digest(spec, seed=3) for spec in specs}
    _, out, _ = run(capsys, "load", path, "--device", device, "--digest", "--json")
    assert json.loads(out)["digest"] == expected
    _, out, _ = run(capsys, "load", path, "--device", device, "--digest")
    assert out.splitlines()[-len(specs) :] == [f"{digest}  {name}" for name, digest in expected.items()]


def test_options_reach_the_load(checkpoint: tuple[str, list[TensorSpec]], capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = checkpoint
    words = "--device null --cache drop --host-memory 16MiB --engine python --workers 3 --chunk 128KiB --header strict"
    _, out, _ = run(capsys, "load", path, *words.split(), "--names", "tensor_000", "--names", "*_00[12]", "--json")
    report = json.loads(out)
    assert report["tensors"] == 3
    assert report["cache"] == {"requested": "drop", "decided": "drop"}
    assert report["host_memory"]["budget_bytes"] == 16 << 20
    assert (report["engine"], report["workers"], report["chunk_bytes"]) == ("python", 3, 128 << 10)


def test_the_environment_sets_what_is_not_given(
    checkpoint: tuple[str, list[TensorSpec]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = checkpoint
    monkeypatch.setenv("WEIGHTLIFT_METHOD", "buffered")
    requested = [
        json.loads(run(capsys, "load", path, "--device", "null", "--json", *words)[1])["method"]["requested"]
        for words in ((), ("--method", "direct"))
    ]
    assert requested == ["buffered", "direct"]


def test_dtype_and_framework_are_passed_on(
    checkpoint: tuple[str, list[TensorSpec]], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("numpy", reason="numpy is not installed")
    code, out, _ = run(capsys, "load", checkpoint[0], "--framework", "numpy", "--dtype", "float32", "--json")
    assert code == 0
    assert json.loads(out)["device"] == "cpu"
    code, _, err = run(capsys, "load", checkpoint[0], "--framework", "numpy", "--dtype", "float1")
    assert code != 0
    assert "float1" in err


def test_text_goes_to_stdout_plain(
    checkpoint: tuple[str, list[TensorSpec]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "load", checkpoint[0], "--device", "null")
    assert (code, err) == (0, "")
    assert out.startswith("loaded      6 tensors, 900 KiB in 2 files, read and discarded\n")
    assert "\x1b" not in out


def test_progress_goes_to_stderr(checkpoint: tuple[str, list[TensorSpec]], capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, "load", checkpoint[0], "--device", "null", "--json", "--progress")
    assert json.loads(out)["tensors"] == 6
    assert err.splitlines()[-1].startswith("loading: 100%, 900 KiB of 900 KiB")
    _, _, err = run(capsys, "load", checkpoint[0], "--device", "null", "--no-progress")
    assert err == ""


def test_an_empty_checkpoint_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "empty.safetensors", [])
    code, out, _ = run(capsys, "load", str(path), "--device", "null")
    assert code == 0
    assert "0 tensors, 0 B" in out


def test_hostile_names_stay_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "[red]\x1b[2Jé\n"
    path = write_checkpoint(tmp_path / "m.safetensors", [TensorSpec(name, "U8", (3,))])
    _, out, _ = run(capsys, "load", str(path), "--device", "null", "--digest")
    assert out.splitlines()[-1].endswith(r"  [red]\x1b[2Jé\n")
    _, out, _ = run(capsys, "load", str(path), "--device", "null", "--digest", "--json")
    assert list(json.loads(out)["digest"]) == [name]


def test_trace_and_page_are_written_beside_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", [TensorSpec("x", "F32", (1000, 300))])
    trace, page = tmp_path / "trace.json", tmp_path / "page.html"
    words = ["load", str(path), "--device", "null", "--trace", str(trace), "--report", str(page), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    reads = [event for event in events if event["ph"] == "X" and event["name"] == "read" and event["pid"] == 2]
    assert sum(event["args"]["bytes"] for event in reads) == report["bytes"]
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "model.safetensors" in page.read_text(encoding="utf-8")


def test_a_load_that_fails_leaves_a_trace_and_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, page, old = tmp_path / "trace.json", tmp_path / "page.html", tmp_path / "old.html"
    old.write_text("of another load")
    for target in (page, old):
        words = ["load", str(tmp_path / "nothing"), "--trace", str(trace), "--report", str(target)]
        assert main(words) == 1
    assert "traceEvents" in json.loads(trace.read_text(encoding="utf-8"))
    assert not page.exists()
    assert old.read_text() == "of another load"
    capsys.readouterr()


def test_a_place_that_cannot_be_written_ends_the_command_before_the_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", [TensorSpec("x", "F32", (1000, 300))])
    assert main(["load", str(path), "--device", "null", "--report", str(tmp_path / "no" / "page.html")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "page.html" in captured.err


def test_quantised_tensors_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "m.gguf", [GGUFSpec("t", "Q4_K", (16, 512))])
    assert main(["load", str(path), "--dequantize", "--dtype", "float16", "--verbose"]) == 0
    assert "dequantising" in capsys.readouterr().out
    assert main(["load", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == 16 * 2 * 144
    assert "dequantising" not in {term["name"] for term in found["host_memory"]["terms"]}
