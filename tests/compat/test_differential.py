"""The face and the library it stands for, asked the same: results, refusals and their classes."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weightlift.compat.safetensors as ours
import weightlift.compat.safetensors.numpy
import weightlift.compat.safetensors.torch
from weightlift.dtypes import SAFETENSORS
from weightlift.testing.differential import Outcome, outcome
from weightlift.testing.factory import write_checkpoint
from weightlift.testing.shapes import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLES = int(os.environ.get("WEIGHTLIFT_TEST_EXAMPLES", "800"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

NINE = hasattr(safetensors.safe_open, "prefetch")
KINDS = [("pt", "mmap"), ("pt", "pread"), ("np", "mmap"), ("np", "pread")]


def both(call: Callable[..., Any]) -> tuple[Outcome, Outcome]:
    """What a call does with our ``safe_open`` and with the library's."""
    return outcome(lambda: call(ours.safe_open)), outcome(lambda: call(safetensors.safe_open))


def same(call: Callable[..., Any]) -> Outcome:
    mine, theirs = both(call)
    assert mine == theirs
    return mine


def is_reversed(index: object) -> bool:
    """The index has a slice that ends before it begins."""
    parts = index if isinstance(index, tuple) else (index,)
    bounds = [(part.start, part.stop) for part in parts if isinstance(part, slice)]
    return any(type(start) is type(stop) is int and stop < start for start, stop in bounds)


NAMES = ["cube", "wide", "long", "bytes", "number", "empty", "flags", "complex"]


@pytest.fixture(scope="module")
def file(specs: list[TensorSpec]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield write_checkpoint(Path(folder) / "file.safetensors", specs, metadata={"format": "pt"})


bounds = st.one_of(st.none(), st.integers(-7, 9))
usual = st.one_of(
    st.integers(-7, 9),
    st.builds(slice, bounds, bounds, st.one_of(st.none(), st.integers(-1, 3))),
    st.just(Ellipsis),
)
odd = st.sampled_from(
    [
        *(None, True, False, [], [0], [0, 1], 1.0, "x", 2**70, -(2**70), b"a", {}),
        *(numpy.int64(1), numpy.array(1), numpy.array([0]), torch.tensor(1), torch.tensor([0])),
        # A step beyond 2**62 makes torch's own arithmetic wrap around; see the test of one below.
        *(slice(1.0, 2), slice(0, 2**70), slice(2**70, None), slice(None, None, 2**62), slice("a", None)),
        *(slice(numpy.int64(1), None), slice(torch.tensor(1), None), slice(0, None, 0)),
    ]
)
parts = st.one_of(usual, usual, usual, odd)
indexes = st.one_of(parts, st.lists(parts, max_size=5).map(tuple))


@pytest.mark.parametrize(("framework", "backend"), KINDS)
def test_every_index(file: Path, framework: str, backend: str) -> None:
    seen = {True: 0, False: 0}

    @fuzz
    @given(name=st.sampled_from(NAMES), index=indexes)
    def agrees(name: str, index: object) -> None:
        if framework == "np" and name == "wide":
            name = "cube"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")

            def ask(opener: Any) -> Any:
                return opener(file, framework=framework, backend=backend).get_slice(name)[index]

            if is_reversed(index) and (framework, backend) != ("pt", "mmap"):
                # The library trips over itself while it words this refusal, up to ending the interpreter's thread.
                mine = outcome(lambda: ask(ours.safe_open))
                assert mine.refused
            else:
                mine = same(ask)
        seen[mine.refused] += 1

    agrees()
    assert min(seen.values()) >= EXAMPLES // 20


@pytest.mark.parametrize(("framework", "backend"), KINDS)
def test_a_step_beyond_all_numbers(file: Path, framework: str, backend: str) -> None:
    def ask(opener: Any) -> Any:
        return opener(file, framework=framework, backend=backend).get_slice("cube")[:: 2**70]

    same(ask)


@pytest.mark.parametrize(("framework", "backend"), KINDS)
@pytest.mark.parametrize("dtype", list(SAFETENSORS))
def test_every_data_type(tmp_path: Path, dtype: str, framework: str, backend: str) -> None:
    path = write_checkpoint(tmp_path / "one.safetensors", [TensorSpec("t", dtype, (4, 8))])

    def opened(opener: Any) -> Any:
        return opener(path, framework=framework, backend=backend)

    for index in (Ellipsis, slice(1, 3), (slice(None), slice(2, 6)), (slice(None), slice(1, 4)), (0, 0), ()):
        same(lambda opener, index=index: opened(opener).get_slice("t")[index])
    same(lambda opener: (opened(opener).get_slice("t").get_dtype(), opened(opener).get_slice("t").get_shape()))
    if dtype == "F4" and (framework, backend) == ("pt", "pread"):
        # The library reads such tensors by mapping only; here they are the same both ways.
        assert opened(ours.safe_open).get_tensor("t").dtype is torch.float4_e2m1fn_x2
        return
    same(lambda opener: opened(opener).get_tensor("t"))
    same(lambda opener: opened(opener).get_tensors())


@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("shape", [(2, 3), (4, 1, 2), (2,), (6, 0), (1, 6)])
def test_packed_types_of_other_shapes(tmp_path: Path, framework: str, shape: tuple[int, ...]) -> None:
    path = write_checkpoint(tmp_path / "one.safetensors", [TensorSpec("t", "F4", shape)])
    same(lambda opener: opener(path, framework=framework).get_tensor("t"))


@pytest.mark.parametrize(("framework", "backend"), KINDS)
def test_what_a_file_says_of_itself(path: Path, framework: str, backend: str) -> None:
    for method in ("keys", "offset_keys", "metadata"):
        result = same(
            lambda opener, method=method: getattr(opener(path, framework=framework, backend=backend), method)()
        )
        assert not result.refused


def test_no_metadata(tmp_path: Path, specs: list[TensorSpec]) -> None:
    cases: list[dict[str, str] | None] = [None, {}]
    for number, metadata in enumerate(cases):
        path = write_checkpoint(tmp_path / f"{number}.safetensors", specs[:1], metadata=metadata)
        same(lambda opener, path=path: opener(path, framework="pt").metadata())


def test_whole_files(tmp_path: Path, specs: list[TensorSpec]) -> None:
    numbers = [spec for spec in specs if spec.dtype != "BF16"]
    path = write_checkpoint(tmp_path / "file.safetensors", numbers)
    assert outcome(lambda: weightlift.compat.safetensors.torch.load_file(path)) == outcome(
        lambda: safetensors.torch.load_file(path)
    )
    assert outcome(lambda: weightlift.compat.safetensors.numpy.load_file(path)) == outcome(
        lambda: safetensors.numpy.load_file(path)
    )


FRAMEWORKS: list[Any] = ["pt", "torch", "pytorch", "np", "numpy", "tf", "flax", "jax", "mlx", "xx", "PT", "", None, 1]
BACKENDS: list[Any] = ["mmap", "pread", "PREAD", "", None, 1]
DEVICES: list[Any] = [
    *("cpu", "cuda", "cuda:0", "cuda:12", "cuda:x", "cuda:", "cuda:-1", "cuda:1:2", "cuda: 1", "CUDA", "cpu:0"),
    *("mps", "mps:0", "mps:1", "mps:x", "xpu", "xpu:3", "npu", "xla", "mlu", "musa", "hpu", "meta", "null", ""),
    *("cuda:99999999999999999999", "cuda:+1", 0, 7, -1, 2**64, 2**70, True, None, 1.0, b"cpu", []),
    *(torch.device("cpu"), torch.device("cuda", 0)),
]
ARGUMENTS: list[dict[str, Any]] = [
    *({"framework": framework} for framework in FRAMEWORKS),
    *({"backend": backend} for backend in BACKENDS),
    *({"device": device} for device in DEVICES),
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_arguments(path: Path, framework: str, arguments: dict[str, Any]) -> None:
    keywords = {"framework": framework, **arguments}
    same(lambda opener: opener(path, **keywords).keys())


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "xpu", "npu", "xla", "hpu", "mlu", 0, 1])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, where the devices exist")
def test_devices_that_are_not_there(path: Path, device: object) -> None:
    """Opening works and reading does not, with the class of error that torch has for the device."""
    mine, theirs = both(lambda opener: opener(path, framework="pt", device=device).get_tensor("cube"))
    assert mine.error is not None
    assert theirs.error is not None
    assert issubclass(mine.error, theirs.error)


@pytest.mark.parametrize("name", ["nothing", "", 1, None, b"cube", ["cube"]])
@pytest.mark.parametrize("method", ["get_tensor", "get_slice"])
def test_names_that_are_not_there(path: Path, method: str, name: object) -> None:
    assert same(lambda opener: getattr(opener(path, framework="pt"), method)(name)).refused


def test_how_arguments_are_passed(path: Path) -> None:
    same(lambda opener: opener(path, "pt", "cpu").keys())
    same(lambda opener: opener(filename=path, framework="pt", device="cpu", backend="mmap").keys())
    same(lambda opener: opener(path, "pt", "cpu", "mmap"))
    same(lambda opener: opener(path))
    same(lambda opener: opener())
    same(lambda opener: opener(path, framework="pt", nothing=1))
    same(lambda opener: opener(str(path).encode(), framework="pt"))
    same(lambda opener: opener(3, framework="pt"))
    same(lambda opener: opener(None, framework="pt"))
    same(lambda opener: opener(str(path), framework="pt").keys())


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"abc", (5).to_bytes(8, "little") + b"{}   ", (10**12).to_bytes(8, "little") + b"{}"),
        *(
            (2).to_bytes(8, "little") + b"[]",
            (2).to_bytes(8, "little") + b"{}x",
            (2).to_bytes(8, "little") + b"\xff\xff",
        ),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        *(b"<!doctype html><html></html>", b"PK\x03\x04" + bytes(60), b"GGUF" + bytes(60)),
    ],
    ids=range(11),
)
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    same(lambda opener: opener(path, framework="pt").keys())


def test_paths_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in ("missing.safetensors", "missing/file", "."):
        mine, theirs = both(lambda opener, path=path: opener(tmp_path / path, framework="pt"))
        assert mine.error is not None
        assert theirs.error is not None
        assert issubclass(mine.error, theirs.error)


def test_a_closed_handle(path: Path) -> None:
    for method, arguments in (
        *(("keys", ()), ("offset_keys", ()), ("metadata", ()), ("get_tensors", ())),
        *(("get_tensor", ("cube",)), ("get_slice", ("cube",)), ("get_tensor", (1,))),
    ):

        def call(opener: Any, method: str = method, arguments: tuple[Any, ...] = arguments) -> Any:
            handle = opener(path, framework="pt")
            with handle as entered:
                assert entered is handle
            return getattr(handle, method)(*arguments)

        assert same(call).refused


def test_slices_outlive_the_handle(path: Path) -> None:
    def call(opener: Any) -> Any:
        with opener(path, framework="pt") as handle:
            part = handle.get_slice("cube")
        handle.__exit__(None, None, None)
        return part[1:, 2], part.get_shape(), part.get_dtype()

    mine, theirs = call(ours.safe_open), call(safetensors.safe_open)
    assert torch.equal(mine[0], theirs[0])
    assert mine[1:] == theirs[1:]


def test_a_handle_is_neither_a_mapping_nor_a_sequence(path: Path) -> None:
    same(lambda opener: len(opener(path, framework="pt")))
    same(lambda opener: iter(opener(path, framework="pt")))
    same(lambda opener: "cube" in opener(path, framework="pt"))
    same(lambda opener: opener(path, framework="pt")["cube"])


def test_lists_are_the_callers_own(path: Path) -> None:
    handle = ours.safe_open(path, framework="pt")
    handle.keys().clear()
    handle.offset_keys().clear()
    assert sorted(handle.offset_keys()) == handle.keys() == sorted(NAMES)


class Tied(torch.nn.Module):
    """Two names for one matrix, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("counter", torch.zeros(2))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "change", ["nothing", "without second", "without first", "both names", "no buffer", "one more", "other shape"]
)
def test_load_model(tmp_path: Path, change: str, strict: bool) -> None:
    path = tmp_path / "model.safetensors"
    state = {name: torch.full_like(value, 3.0) for name, value in Tied().state_dict().items()}
    if change in {"without second", "nothing"}:
        del state["second.weight"]
    elif change == "without first":
        del state["first.weight"]
    elif change == "no buffer":
        del state["counter"]
    elif change == "one more":
        state["more"] = torch.zeros(1)
    elif change == "other shape":
        state["counter"] = torch.zeros(5)
    safetensors.torch.save_file(state, path)

    def call(load_model: Any) -> Any:
        model = Tied()
        missing, unexpected = load_model(model, path, strict=strict)
        return {"missing": sorted(missing), "unexpected": sorted(unexpected), **model.state_dict()}

    assert outcome(lambda: call(weightlift.compat.safetensors.torch.load_model)) == outcome(
        lambda: call(safetensors.torch.load_model)
    )


def test_saving_and_bytes_in_memory_are_the_librarys_own(tmp_path: Path) -> None:
    face = weightlift.compat.safetensors.torch
    assert face.save_file is safetensors.torch.save_file
    assert face.save_model is safetensors.torch.save_model
    assert weightlift.compat.safetensors.numpy.save is safetensors.numpy.save
    assert ours.deserialize is safetensors.deserialize
    assert ours.SafetensorError is safetensors.SafetensorError
    state = {"a": torch.arange(4)}
    assert torch.equal(face.load(face.save(state))["a"], state["a"])


@pytest.mark.skipif(not NINE, reason="the safetensors installed has no get_tensor_meta: it came with 0.9")
def test_header_entries(path: Path) -> None:
    for name in NAMES:
        same(
            lambda opener, name=name: [
                getattr(opener(path, framework="pt").get_tensor_meta(name), field)
                for field in ("dtype", "shape", "data_offsets")
            ]
        )
        same(lambda opener, name=name: repr(opener(path, framework="pt").get_tensor_meta(name)))


PLANS: list[Any] = [
    *({}, {"nothing": None}, {"cube": 1}, ["cube"], {1: None}, {"number": slice(0, 1)}, {"number": slice(None)}),
    *({"cube": slice(0, 2, 2)}, {"cube": slice(5, 2)}, {"cube": slice(0, 100)}, {"cube": slice(4, None)}, None),
    *({"cube": slice(0, 2)}, {"cube": slice(-2, None)}, {"cube": slice(2, 1)}, {"cube": slice(3, 3)}, {"cube": None}),
]


@pytest.mark.skipif(not NINE, reason="the safetensors installed has no prefetch: it came with 0.9")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, where prefetching works")
@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps", 0])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_plans_for_prefetching_are_judged_alike(path: Path, device: object, plan: Any) -> None:
    """Without a GPU no plan can be carried out, which both say in the same class of error."""
    assert same(lambda opener: opener(path, framework="pt", device=device).prefetch(plan)).refused


@pytest.mark.skipif(not NINE, reason="the safetensors installed has no prefetch: it came with 0.9")
def test_other_arguments_of_prefetching(path: Path) -> None:
    same(lambda opener: opener(path, framework="np").prefetch())
    for keywords in ({"threads": -1}, {"threads": "8"}, {"device": "cpu"}, {"device": "foo"}, {"device": -1}):
        assert same(lambda opener, keywords=keywords: opener(path, framework="pt").prefetch(**keywords)).refused
