"""``dequantize=True`` gives what the package ``gguf`` gives, by every path, within the budget."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING, Any

import gguf
import numpy
import pytest
import torch

import weightlift as wl
from weightlift.dtypes import GGML, GGML_QUANTISED
from weightlift.errors import OptionError, StateMismatchError, UnsupportedDtypeError
from weightlift.formats import describe
from weightlift.options import DEQUANTIZE_BYTES
from weightlift.targets.dequantize import Dequantizer
from weightlift.targets.frameworks import pick_framework
from weightlift.testing import GGUFSpec, write_gguf, write_llama_gguf
from weightlift.testing.leaks import nothing_left_behind
from weightlift.types import Framework
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

METHODS = ["auto", "direct", "buffered", "mmap"]
ENGINES = [pytest.param("native", marks=pytest.mark.native), "python"]
WITHOUT_ROUTINE = ("Q8_1", "Q8_K", "Q1_0")
KINDS = sorted(GGML_QUANTISED - set(WITHOUT_ROUTINE))
SPECS = [
    *(GGUFSpec(kind, kind, (37, 1024)) for kind in KINDS),
    GGUFSpec("large", "Q5_K", (900, 2048)),
    GGUFSpec("larger", "Q4_0", (1200, 1120)),
    GGUFSpec("block", "Q6_K", (256,)),
    GGUFSpec("cube", "Q5_1", (2, 3, 64)),
    GGUFSpec("half", "F16", (100, 100)),
    GGUFSpec("whole", "I32", (9,)),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", SPECS)


def expected(path: Path) -> dict[str, Any]:
    """Every tensor as the package has it, quantised ones as float32."""
    with numpy.errstate(all="ignore"):
        return {
            item.name: gguf.quants.dequantize(item.data, item.tensor_type)
            if item.tensor_type.name in GGML_QUANTISED
            else item.data
            for item in gguf.GGUFReader(path).tensors
        }


def require_the_same(state: dict[str, Any], values: dict[str, Any]) -> None:
    assert list(state) == list(values)
    for name, value in values.items():
        found = numpy.asarray(state[name])
        assert (found.dtype, found.shape) == (value.dtype, value.shape), name
        # Random scales may be no numbers.
        numpy.testing.assert_array_equal(found, value, err_msg=name)


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_every_way_gives_what_the_package_gives(path: Path, method: str, engine: str, framework: str) -> None:
    with nothing_left_behind(path.parent):
        state = wl.load(path, dequantize=True, method=method, engine=engine, framework=framework, host_memory="8MiB")
    require_the_same(state, expected(path))


@pytest.mark.parametrize("chunk_bytes", [64 * KIB, MIB])
def test_chunks_that_cut_blocks(path: Path, chunk_bytes: int) -> None:
    state = wl.load(path, dequantize=True, chunk_bytes=chunk_bytes, workers=3)
    require_the_same(state, expected(path))


def test_streams(path: Path) -> None:
    with wl.stream(path, dequantize=True, host_memory="8MiB") as stream:
        require_the_same(dict(stream), expected(path))


def test_another_type(path: Path) -> None:
    state = wl.load(path, dequantize=True, dtype="bfloat16")
    for name, value in expected(path).items():
        if name == "whole":
            continue
        assert state[name].dtype == torch.bfloat16
        wanted = torch.from_numpy(value.copy()).to(torch.bfloat16)
        assert torch.equal(state[name].nan_to_num(), wanted.nan_to_num()), name


def test_without_it_the_blocks_arrive(path: Path) -> None:
    assert wl.load(path, names=["large"])["large"].dtype == torch.uint8


def test_a_module_is_filled_with_numbers(path: Path) -> None:
    values = expected(path)
    target = {name: torch.empty(value.shape) for name, value in values.items() if name != "whole"}
    target["large"] = torch.empty(2048, 900).t()
    target["larger"] = torch.empty(1200, 1120, dtype=torch.float16)
    wl.load_into(target, path, dequantize=True, strict=False, host_memory="8MiB")
    for name, tensor in target.items():
        wanted = torch.from_numpy(values[name].astype("float32")).to(tensor.dtype)
        assert torch.equal(tensor.nan_to_num(), wanted.nan_to_num()), name
    with pytest.raises(StateMismatchError, match=r"blocks of Q5_K: pass dequantize=True"):
        wl.load_into({"large": target["large"]}, path, strict=False)


def test_the_budget_names_what_it_takes(path: Path) -> None:
    report = wl.load(path, dequantize=True, host_memory="8MiB").report
    terms = {term.name: term.nbytes for term in report.host_memory.terms}
    assert terms["dequantising"] == DEQUANTIZE_BYTES
    assert sum(terms.values()) <= 8 * MIB
    assert "dequantising" not in {term.name for term in wl.load(path).report.host_memory.terms}


@pytest.mark.parametrize("kind", KINDS)
def test_working_memory_stays_within_its_term(tmp_path: Path, kind: str) -> None:
    spec = GGUFSpec("t", kind, (512, 4096))
    description = describe(write_gguf(tmp_path / "m.gguf", [spec]))
    maker = pick_framework(Framework.NUMPY)
    work = Dequantizer(description, [0], maker)
    flat = numpy.empty(512 * 4096, "float32")
    stored = (tmp_path / "m.gguf").read_bytes()[description.offsets[0] :][: description.lengths[0]]
    tracemalloc.start()
    try:
        work.assign(0, flat, stored, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= DEQUANTIZE_BYTES


@pytest.mark.parametrize("seed", range(20))
def test_parts_in_any_order(path: Path, seed: int) -> None:
    """Cuts anywhere, also many within one block, and parts that come in any order."""
    order = random.Random(seed)
    description = describe(path)
    raw, values = path.read_bytes(), expected(path)
    rows = [row for row, name in enumerate(description.names) if name in {"block", "cube", "NVFP4", "TQ1_0"}]
    work = Dequantizer(description, rows, pick_framework(Framework.NUMPY))
    parts = []
    flat = {row: numpy.full(values[description.names[row]].size, -1.0, "float32") for row in rows}
    for row in rows:
        length = description.lengths[row]
        cuts = sorted({0, length, *(order.randrange(length) for _ in range(order.choice([0, 1, 5, 60])))})
        parts += [(row, begin, end) for begin, end in itertools.pairwise(cuts)]
    order.shuffle(parts)
    for row, begin, end in parts:
        start = description.offsets[row]
        work.assign(row, flat[row], raw[start + begin : start + end], begin)
    for row in rows:
        numpy.testing.assert_array_equal(flat[row], values[description.names[row]].reshape(-1))
    assert not work._torn


@pytest.mark.parametrize("kind", WITHOUT_ROUTINE)
def test_types_without_a_routine_are_named_before_anything_is_read(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", [GGUFSpec("t", kind, (2, 256))])
    with pytest.raises(UnsupportedDtypeError, match=f"'t' is {kind}, which the gguf package has no routine"):
        wl.load(path, dequantize=True)
    assert wl.load(path)["t"].shape == (2, 256 // _kind(kind).block_elements * _kind(kind).block_bytes)


def _kind(name: str) -> Any:
    return next(dtype for dtype in GGML.values() if dtype.name == name)


def test_a_model_without_quantised_tensors_needs_no_package(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", [GGUFSpec("t", "F32", (2, 256))])
    program = (
        "import sys; sys.modules['gguf'] = None\n"
        "import weightlift as wl\n"
        f"print(wl.load({str(path)!r}, dequantize=True, framework='numpy')['t'].dtype)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        == "float32\n"
    )


def test_the_package_is_asked_for(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", [GGUFSpec("t", "Q4_0", (2, 256))])
    program = (
        "import sys; sys.modules['gguf'] = None\n"
        "import weightlift as wl\n"
        f"wl.load({str(path)!r}, dequantize=True, framework='numpy')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode
    assert "MissingExtraError: dequantize=True needs the package gguf" in result.stderr
    assert "weightlift[gguf]" in result.stderr


def test_the_option_is_a_switch() -> None:
    with pytest.raises(OptionError, match="dequantize=1 is not True or False"):
        wl.load("anything", dequantize=1)  # type: ignore[arg-type]


def test_digests_stay_those_of_the_bytes_as_stored(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "m.gguf", layers=1)
    assert wl.load(path, dequantize=True, digest=True).report.digests == wl.load(path, digest=True).report.digests
