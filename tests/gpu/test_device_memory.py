"""Torch tensors made without the interpreter lock are tensors like any other."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from weightlift.targets.device_memory import MANY, QuickTensors, QuickViews, TorchMemory, quick_tensors
from weightlift.targets.storages import OwnStorages

TYPES = [
    torch.uint8,
    torch.bool,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.uint16,
]


@pytest.fixture(params=["quick", "plain"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TorchMemory:
    if request.param == "plain":
        monkeypatch.setattr("weightlift.targets.device_memory.quick_tensors", lambda _: None)
    return TorchMemory(torch, "cpu", 0, 1 << 40)


def test_the_installed_torch_has_the_quick_way() -> None:
    assert quick_tensors(torch) is not None


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (2, 3, 5)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_allocated_tensors_are_what_torch_makes(memory: TorchMemory, dtype: Any, shape: tuple[int, ...]) -> None:
    made, expected = memory.allocate(dtype, shape), torch.empty(shape, dtype=dtype)
    assert (made.dtype, made.shape, made.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert made.untyped_storage().nbytes() == math.prod(shape) * dtype.itemsize
    assert memory.address(made) == made.data_ptr()


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 5)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_parts_lie_in_the_slab_with_storages_of_their_own(
    memory: TorchMemory, dtype: Any, shape: tuple[int, ...]
) -> None:
    slab = memory.allocate(torch.uint8, (4096,))
    slab.copy_(torch.arange(4096).to(torch.uint8))
    part = memory.views(slab).tensor(128, dtype, shape)
    nbytes = math.prod(shape) * dtype.itemsize
    assert part.dtype == dtype
    assert tuple(part.shape) == shape
    assert part.is_contiguous()
    assert (part._base, part.requires_grad) == (None, False)
    # What is empty lies nowhere.
    place = slab.data_ptr() + 128 if nbytes else 0
    assert (part.storage_offset(), part.untyped_storage().data_ptr()) == (0, place)
    assert part.untyped_storage().nbytes() == nbytes
    assert torch.equal(part.reshape(-1).view(torch.uint8), slab[128 : 128 + nbytes])
    part.reshape(-1).view(torch.uint8).fill_(7)
    assert bool((slab[128 : 128 + nbytes] == 7).all())


@pytest.mark.parametrize("count", [MANY // 2, MANY, 5 * MANY])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_neighbours_fill_the_slab_without_gaps(memory: TorchMemory, dtype: Any, count: int) -> None:
    shapes = [((), (7,), (2, 3, 5))[number % 3] for number in range(count)]
    slab = memory.allocate(torch.uint8, (1 << 16,))
    slab.copy_((torch.arange(1 << 16) % 251).to(torch.uint8))
    parts = memory.views(slab).tensors(64, dtype, shapes)
    place = 64
    for part, shape in zip(parts, shapes, strict=True):
        end = place + math.prod(shape) * dtype.itemsize
        assert (part.dtype, tuple(part.shape), part.is_contiguous()) == (dtype, shape, True)
        assert part.data_ptr() == slab.data_ptr() + place
        assert part.untyped_storage().nbytes() == end - place
        assert torch.equal(part.reshape(-1).view(torch.uint8), slab[place:end])
        place = end


def test_tensors_made_together_have_no_base_that_autograd_knows() -> None:
    memory = TorchMemory(torch, "cpu", 0, 1 << 40)
    slab = memory.allocate(torch.uint8, (1 << 16,)).zero_()
    parts = memory.views(slab).tensors(0, torch.float32, [(4, 4)] * (2 * MANY))
    assert all(part._base is None and not part._is_view() for part in parts)
    first = parts[0].requires_grad_()
    (first * 3).sum().backward()
    with torch.no_grad():
        first += first.grad
    assert first.tolist() == [[3.0] * 4] * 4
    assert parts[1].tolist() == [[0.0] * 4] * 4
    assert not parts[1].requires_grad


@pytest.mark.parametrize("come_back", ["refused", "as another"])
def test_a_torch_that_cannot_give_a_type_a_storage_of_its_own_shares_the_slabs(
    monkeypatch: pytest.MonkeyPatch, come_back: str
) -> None:
    def take_back(capsule: Any) -> Any:
        if come_back == "refused":
            raise BufferError("no such type")
        return torch.utils.dlpack.from_dlpack(capsule).view(torch.int16)

    storages = OwnStorages(torch)
    monkeypatch.setattr(storages, "_take_back", take_back)
    slab = torch.arange(64, dtype=torch.uint8)
    part = slab[16:32].view(torch.bfloat16)
    assert storages.of(part, part.dtype) is part
    assert list(map(id, storages.of_all([part, part], part.dtype))) == [id(part), id(part)]


def test_a_view_keeps_its_slab_alive(memory: TorchMemory) -> None:
    slab = memory.allocate(torch.uint8, (1 << 20,))
    slab.fill_(9)
    part = memory.views(slab).tensor(4096, torch.uint8, (1000,))
    del slab
    gc.collect()
    assert bool((part == 9).all())


@pytest.mark.parametrize("shapes", [[(16, 16)], [(4,)] * (2 * MANY)], ids=["one", "many"])
def test_nothing_is_kept_of_what_was_made(shapes: list[tuple[int, ...]]) -> None:
    quick = quick_tensors(torch)
    assert quick is not None

    def make() -> None:
        for _ in range(2000):
            slab = quick.empty(torch.uint8, (1 << 16,), 0, 0)
            QuickViews(quick, slab, OwnStorages(torch)).tensors(64, torch.float32, shapes)

    make()
    before = resident_bytes()
    make()
    # One kept slab of each round would be 125 MiB.
    assert resident_bytes() - before < 16 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_short_memory_goes_torchs_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = TorchMemory(torch, "cpu", 0, (512 << 20) + 1000)
    calls: list[Any] = []
    plain = torch.empty

    def noted(*arguments: Any, **rest: Any) -> Any:
        calls.append(arguments)
        return plain(*arguments, **rest)

    monkeypatch.setattr(torch, "empty", noted)
    memory.allocate(torch.uint8, (900,))
    assert not calls
    memory.allocate(torch.uint8, (900,))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("free", "held", "expected"),
    [(1 << 40, 0, [256 << 20]), (1 << 40, (256 << 20) - 1, [256 << 20]), (1 << 40, 256 << 20, []), (700 << 20, 0, [])],
    ids=["nothing held", "too little held", "enough held", "too little free"],
)
def test_one_large_piece_is_asked_for_where_it_is_new(
    monkeypatch: pytest.MonkeyPatch, free: int, held: int, expected: list[int]
) -> None:
    memory, quick = TorchMemory(torch, "cpu", 0, free), quick_tensors(torch)
    asked: list[int] = []
    monkeypatch.setattr(memory, "reusable_bytes", lambda: held)
    monkeypatch.setattr(quick, "empty", lambda _dtype, shape, *_: asked.append(shape[0]))
    memory.expect(256 << 20)
    assert [nbytes >> 20 << 20 for nbytes in asked] == [nbytes + (1 << 20) for nbytes in expected]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_codes_of_data_types(dtype: Any) -> None:
    quick = QuickTensors(torch)
    assert quick._code(dtype) == quick._code_of_sample(dtype)


def test_a_torch_without_a_code_is_asked_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = QuickTensors(torch)
    monkeypatch.setattr(quick, "_library", object())
    assert quick.empty(torch.bfloat16, (3,), 0, 0).dtype == torch.bfloat16


def no_such_thing(*_: Any) -> Any:
    raise RuntimeError("not implemented for this device")


@pytest.mark.parametrize(
    "divide",
    [lambda flat, like: [flat[: one.numel()].view(one.shape) for one in like], no_such_thing],
    ids=["all at the beginning", "refused"],
)
def test_a_torch_that_divides_otherwise_is_not_made_to(monkeypatch: pytest.MonkeyPatch, divide: Any) -> None:
    quick = QuickTensors(torch)
    monkeypatch.setattr(quick, "_divide", divide)
    slab = quick.empty(torch.uint8, (2 * MANY,), 0, 0)
    slab.copy_(torch.arange(2 * MANY))
    made = QuickViews(quick, slab, OwnStorages(torch)).tensors(0, torch.uint8, [(2,)] * MANY)
    assert not quick.divides
    assert torch.equal(torch.cat(list(made)), slab)


def test_few_tensors_need_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = QuickTensors(torch)
    monkeypatch.setattr(quick, "_divides_a_sample", no_such_thing)
    made = QuickViews(quick, quick.empty(torch.uint8, (64,), 0, 0), OwnStorages(torch)).tensors(
        0, torch.uint8, [(2,)] * (MANY - 1)
    )
    assert len(made) == MANY - 1
    assert quick._divides is None
