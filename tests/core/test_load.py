"""What wl.load returns equals what the file holds, by every path, engine, cache policy and framework."""

from __future__ import annotations

import math
import sys
import threading
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy
import pytest
import safetensors.torch
import torch

import weightlift as wl
from weightlift.testing import (
    TensorSpec,
    every_dtype_specs,
    moe_specs,
    tensor_bytes,
    tensor_digest,
    write_checkpoint,
)
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

METHODS = ["auto", "direct", "buffered", "mmap"]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
SPECS = [
    *every_dtype_specs(),
    TensorSpec("large", "F32", (513, 1025)),
    TensorSpec("huge", "BF16", (1000, 1501)),
    TensorSpec("bytes", "U8", (77_777,)),
]


def stored_bytes(tensor: Any) -> bytes:
    if isinstance(tensor, torch.Tensor):
        flat = tensor.contiguous().reshape(-1)
        if flat.numel() == 0:
            return b""
        return bytes(flat.view(torch.uint8).numpy().tobytes())
    return bytes(tensor.tobytes())


def require_contents(state: dict[str, Any], specs: list[TensorSpec], seed: int = 0) -> None:
    assert sorted(state) == sorted(spec.name for spec in specs)
    for spec in specs:
        assert stored_bytes(state[spec.name]) == tensor_bytes(spec, seed=seed), spec


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cache", ["auto", "keep", "drop"])
@pytest.mark.parametrize("method", METHODS)
def test_every_way_delivers_the_same_tensors(
    tmp_path: Path, method: str, cache: str, engine: str, framework: str
) -> None:
    # Odd: data begins at a place that suits no data type wider than a byte.
    for number, (padding, shards) in enumerate([("reference", 1), (3, 3), ("none", 2)]):
        path = write_checkpoint(tmp_path / str(number), SPECS, shards=shards, padding=padding, seed=4)  # type: ignore[arg-type]
        state = wl.load(path, method=method, cache=cache, engine=engine, framework=framework)
        require_contents(state, SPECS, seed=4)
        for tensor in state.values():
            if framework == "torch":
                assert tensor.is_contiguous()
                assert tensor.data_ptr() % min(tensor.element_size(), 8) == 0
            else:
                assert tensor.flags.c_contiguous
                assert tensor.flags.aligned
                assert tensor.flags.writeable
        used = state.report.method_used
        assert sum(used.values()) == state.report.nbytes
        assert state.report.method_requested == method


def test_tensors_equal_those_of_the_reference_library(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    # The library knows neither F6 nor, in this version of torch, all of F8; it is asked for what it has.
    with safetensors.safe_open(path, framework="pt") as reference:
        names = []
        for name in reference.keys():  # noqa: SIM118 - it is no mapping
            try:
                expected = reference.get_tensor(name)
            except (KeyError, AttributeError, TypeError, safetensors.SafetensorError):
                continue
            names.append(name)
            (found,) = wl.load(path, names=name, framework="torch").values()
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert stored_bytes(found) == stored_bytes(expected), name
    assert len(names) > 60


def test_shapes_and_dtypes_of_numpy(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    state = wl.load(path, framework="numpy")
    assert state["BF16.matrix"].dtype == ml_dtypes.bfloat16
    assert state["F8_E4M3.matrix"].dtype == ml_dtypes.float8_e4m3fn
    assert state["F32.scalar"].shape == ()
    assert state["F64.empty"].shape == (3, 0, 2)
    assert state["C64.matrix"].dtype == numpy.complex64
    assert state["F4.matrix"].shape == (5, 4)
    assert state["F6_E2M3.matrix"].shape == (5, 6)


def test_a_selection_is_in_file_order_and_reads_only_itself(tmp_path: Path) -> None:
    specs = [TensorSpec(f"layer.{n}.weight", "F32", (64, 1024)) for n in range(9)]
    path = write_checkpoint(tmp_path, specs, shards=3)
    state = wl.load(path, names=["layer.7.*", "layer.1.weight"], framework="numpy")
    assert list(state) == ["layer.1.weight", "layer.7.weight"]
    require_contents(state, [specs[1], specs[7]])
    assert state.report.nbytes == 2 * specs[0].nbytes
    assert state.report.tensors == 2
    assert len(state.report.files) == 2
    assert sum(state.report.method_used.values()) == 2 * specs[0].nbytes
    assert wl.load(path, names=[], framework="numpy") == {}
    with pytest.raises(wl.errors.SelectionError, match=r"layer\.99"):
        wl.load(path, names=["layer.99"])


@pytest.mark.parametrize("gap_bytes", [100, 70 * KIB])
@pytest.mark.parametrize("padding", ["reference", 1])
def test_small_tensors_with_gaps_between_them(tmp_path: Path, padding: Any, gap_bytes: int) -> None:
    specs = [
        spec
        for n in range(40)
        for spec in (TensorSpec(f"want.{n}", "F64", (n * 7 + 1,)), TensorSpec(f"skip.{n}", "U8", (gap_bytes,)))
    ]
    path = write_checkpoint(tmp_path / "model.safetensors", specs, padding=padding, sort=False)
    for method in METHODS:
        state = wl.load(path, names="want.*", method=method, framework="numpy")
        require_contents(state, specs[::2])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_floating_point_tensors_are_converted_chunk_by_chunk(
    tmp_path: Path, framework: str, method: str, engine: str
) -> None:
    specs = [
        TensorSpec("half", "F16", (333, 1001)),
        TensorSpec("brain", "BF16", (77, 3)),
        TensorSpec("eight", "F8_E4M3", (1001,)),
        TensorSpec("double", "F64", (201,)),
        TensorSpec("same", "F32", (4001,)),
        TensorSpec("whole", "I32", (55,)),
        TensorSpec("none", "F16", (0, 4)),
    ]
    path = write_checkpoint(tmp_path / "model.safetensors", specs, padding=1)
    plain = wl.load(path, framework=framework)
    with numpy.errstate(all="ignore"):
        state = wl.load(
            path, framework=framework, dtype="float32", method=method, engine=engine, chunk_bytes=64 * KIB, workers=2
        )
    assert list(state) == list(plain)
    for name, tensor in state.items():
        if name == "whole":
            assert tensor.dtype == plain[name].dtype
        elif framework == "torch":
            assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(plain[name].to(torch.float32))), name
            assert tensor.dtype == torch.float32
        else:
            with numpy.errstate(all="ignore"):
                numpy.testing.assert_array_equal(tensor, plain[name].astype(numpy.float32), err_msg=name)
            assert tensor.dtype == numpy.float32


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["direct", "buffered"])
@pytest.mark.parametrize("device", ["cpu", "null"])
def test_a_tensor_of_eight_budgets_loads_within_one(tmp_path: Path, device: str, method: str, engine: str) -> None:
    spec = TensorSpec("embedding", "F16", (32, MIB))
    path = write_checkpoint(tmp_path / "model.safetensors", [spec], padding=1)
    state = wl.load(path, device=device, host_memory="8MiB", method=method, engine=engine, digest=device == "null")
    memory = state.report.host_memory
    assert sum(term.nbytes for term in memory.terms) <= memory.budget_bytes == 8 * MIB
    assert memory.staging_bytes <= 8 * MIB
    # The kernel's counters lag, and without the interpreter lock every thread of Python's has a heap of its own.
    slack = 2 * MIB if getattr(sys, "_is_gil_enabled", lambda: True)() else 4 * MIB
    assert memory.peak_anonymous_bytes is None or memory.peak_anonymous_bytes <= 8 * MIB + slack
    if device == "null":
        assert state == {}
        assert state.report.digests == {"embedding": tensor_digest(spec)}
    else:
        require_contents(state, [spec])


def test_digests_are_those_of_the_bytes_as_stored(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, SPECS, shards=2, padding=3)
    expected = {spec.name: tensor_digest(spec) for spec in SPECS}
    for device in ("null", "cpu"):
        for method in METHODS:
            report = wl.load(path, device=device, method=method, digest=True, framework="torch").report
            assert report.digests == expected, (device, method)
    converted = wl.load(path, names="F16.*", digest=True, framework="numpy").report.digests
    assert converted == {name: digest for name, digest in expected.items() if name.startswith("F16.")}


def test_many_tiny_tensors(tmp_path: Path) -> None:
    specs = moe_specs(experts=64, layers=6)
    path = write_checkpoint(tmp_path, specs, shards=2)
    require_contents(wl.load(path, framework="numpy"), specs)


def test_the_report_is_plausible(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, SPECS, shards=2)
    seen: list[tuple[int, int]] = []
    report = wl.load(path, method="buffered", progress=lambda done, total: seen.append((done, total))).report
    total = sum(spec.nbytes for spec in SPECS)
    assert (report.tensors, report.nbytes) == (len(SPECS), total)
    assert report.method_used == {"direct": 0, "buffered": total, "mmap": 0}
    assert 0 < sum(report.phases.values()) <= report.seconds * 1.01
    assert set(report.phases) == {"open", "plan", "read", "finish"}
    assert report.gigabytes_per_second == pytest.approx(total / report.seconds / 1e9)
    assert seen[-1] == (total, total)
    assert all(0 <= done <= of == total for done, of in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    files = sum((path / file.path).stat().st_size for file in report.files)
    assert total < files
    for pages in (report.page_cache_before_bytes, report.page_cache_after_bytes):
        assert pages is None or 0 <= pages <= files
    json = report.to_json()
    assert (json["schema"], json["bytes"], json["tensors"]) == (1, total, len(SPECS))
    assert json["method"]["used"] == report.method_used


def test_an_opened_checkpoint_can_be_loaded_again_and_again(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, SPECS, shards=2, metadata={"format": "pt"})
    checkpoint = wl.open(path)
    assert (len(checkpoint), checkpoint.total_bytes) == (len(SPECS), sum(spec.nbytes for spec in SPECS))
    assert checkpoint.metadata == {"format": "pt"}
    assert math.prod(checkpoint["large"].shape) == 513 * 1025
    with nothing_left_behind(tmp_path):
        for count in range(50):
            engine = ("native", "python")[count % 2] if isinstance_native() else "python"
            wl.load(checkpoint, framework="numpy", engine=engine, method=METHODS[count // 2 % 4])


def isinstance_native() -> bool:
    from weightlift.engines.native import native_library

    return not isinstance(native_library(), str)


def test_eight_threads_load_at_once(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, SPECS, shards=2)
    failures: list[BaseException] = []
    start = threading.Barrier(8)

    def load(number: int) -> None:
        try:
            start.wait(20)
            engine = "auto" if number % 2 else "python"
            for method in METHODS[number % 4 :]:
                require_contents(wl.load(path, framework="numpy", method=method, engine=engine), SPECS)
        except BaseException as err:  # noqa: BLE001 - told to the test's own thread
            failures.append(err)

    with nothing_left_behind(tmp_path):
        threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert failures == []


def test_an_unknown_header_rule_is_an_option_error(tmp_path: Path) -> None:
    with pytest.raises(wl.errors.OptionError, match="'lenient'") as caught:
        wl.open(tmp_path, header="lenient")
    assert "'strict'" in caught.value.hint
