"""What is read when: by opening nothing, by indexing what is needed, ahead of who asks for one after the other."""

from __future__ import annotations

import gc
import itertools
import math
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightlift.buffers import LeaseArena
from weightlift.compat.safetensors import SafetensorError, safe_open
from weightlift.compat.safetensors import opened as opened_module
from weightlift.compat.safetensors import sequence as sequence_module
from weightlift.compat.safetensors.indexing import strict_view, torch_view
from weightlift.compat.safetensors.ranges import View, pieces
from weightlift.compat.safetensors.tensors import _pick_slowly, pick
from weightlift.errors import InsufficientMemoryError
from weightlift.loading import load_rows
from weightlift.testing.factory import tensor_bytes, write_checkpoint
from weightlift.testing.shapes import TensorSpec
from weightlift.types import Method
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TABLE = TensorSpec("table", "F32", (64, 8192))
MANY = [TensorSpec(f"tensor_{number:02}", "BF16", (64, 1024)) for number in range(24)]


class Mapped(safe_open):
    __slots__ = ()
    load_keywords = {"method": "mmap"}  # noqa: RUF012 - a class variable there


def stored(spec: TensorSpec) -> Any:
    return torch.frombuffer(bytearray(tensor_bytes(spec)), dtype=torch.uint8)


def raw(tensor: Any) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "table.safetensors", [TABLE])


@pytest.mark.parametrize(
    ("index", "reads_wanted", "bytes_wanted"),
    [
        (slice(2, 4), 1, 2 * 8192 * 4),
        ((5, slice(10, 20)), 1, 10 * 4),
        ((slice(None), slice(10, 20)), 64, 64 * 10 * 4),
        ((slice(0, 64, 8), slice(100, None)), 8, 8 * 8092 * 4),
        ((slice(None), slice(0, 8000)), 13, 63 * 8192 * 4 + 8000 * 4),
        ((63, 8191), 1, 4),
        ((slice(3, 3), slice(None)), 0, 0),
    ],
    ids=str,
)
def test_only_the_bytes_of_a_slice_are_read(
    table: Path, reads: list[tuple[int, int]], index: Any, reads_wanted: int, bytes_wanted: int
) -> None:
    part = safe_open(table, framework="pt").get_slice("table")
    assert reads == []
    found = part[index]
    expected = stored(TABLE).view(torch.float32).view(64, 8192)[index]
    assert torch.equal(raw(found), raw(expected))
    assert found.is_contiguous()
    if reads_wanted == 13:
        # Rows with a gap under a page between them are read through, some 4 MiB at most at a time.
        assert len(reads) == 1
    else:
        assert len(reads) == reads_wanted
    assert sum(length for _, length in reads) == bytes_wanted


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    item=st.sampled_from([1, 2, 4, 8]),
    gap=st.integers(0, 40),
    block=st.integers(1, 200),
    data=st.data(),
)
def test_pieces_bring_together_what_indexing_gives(
    shape: list[int], item: int, gap: int, block: int, data: st.DataObject
) -> None:
    """Against numpy, for every way of cutting the reads."""
    index = tuple(
        slice(start, data.draw(st.integers(start, size)), data.draw(st.integers(1, 3)))
        for size, start in ((size, data.draw(st.integers(0, size - 1))) for size in shape)
    )
    content = numpy.frombuffer(numpy.random.default_rng(0).bytes(math.prod(shape) * item), "u1")
    whole = content.reshape(*shape, item)
    view = strict_view(tuple(shape), index)
    target = bytearray(view.elements * item)
    slowly = bytearray(view.elements * item)
    for piece in pieces(view, item, gap_bytes=gap, block_bytes=block):
        scratch = memoryview(bytearray(content[piece.offset : piece.offset + piece.length]))
        assert len(scratch) == piece.length
        if piece.whole:
            target[piece.place : piece.place + piece.length] = scratch
            slowly[piece.place : piece.place + piece.length] = scratch
        else:
            pick(scratch, piece, item, memoryview(target))
            _pick_slowly(scratch, piece, item, memoryview(slowly))
    assert bytes(target) == bytes(slowly) == whole[index].tobytes()


@given(shape=st.lists(st.integers(0, 4), max_size=4), data=st.data())
def test_both_sets_of_rules_mean_the_same_elements(shape: list[int], data: st.DataObject) -> None:
    index = tuple(
        data.draw(
            st.one_of(st.integers(0, size - 1), st.builds(slice, st.integers(0, size - 1), st.just(size)))
            if size
            else st.just(slice(None))
        )
        for size in shape[: data.draw(st.integers(0, len(shape)))]
    )
    ours, theirs = None, torch_view(torch.empty(shape, device="meta"), index)
    if 0 not in shape:
        ours = strict_view(tuple(shape), index)
        assert theirs is not None
        assert (ours.shape, ours.offset) == (theirs.shape, theirs.offset)


def test_views_know_whether_they_are_contiguous() -> None:
    assert View((2, 3), (3, 1), 4).contiguous
    assert View((2, 1, 3), (3, 99, 1), 0).contiguous
    assert View((0, 3), (9, 9), 0).contiguous
    assert View((), (), 7).contiguous
    assert not View((2, 3), (4, 1), 0).contiguous
    assert not View((3,), (2,), 0).contiguous


def test_small_tensors_are_read_at_once_and_large_ones_loaded(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    specs = [TensorSpec("large", "F32", (4097, 1024)), TensorSpec("small", "F32", (3,))]
    path = write_checkpoint(tmp_path / "m.safetensors", specs)
    with safe_open(path, framework="pt") as file:
        large, small = file.get_tensor("large"), file.get_tensor("small")
        assert [length for _, length in reads] == [12]
        assert [report.tensors for report in file.reports] == [1]
    assert torch.equal(raw(large), stored(specs[0]))
    assert torch.equal(raw(small), stored(specs[1]))


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that read-ahead pays for, small as it is."""
    monkeypatch.setattr(sequence_module, "_WORTHWHILE_BYTES", 1 << 20)
    monkeypatch.setattr("weightlift.host.residency.cached_in", lambda *_: 0)
    return write_checkpoint(tmp_path / "many.safetensors", MANY)


@pytest.mark.parametrize("form", ["tensors", "slices"])
def test_tensors_asked_for_in_order_come_out_of_a_stream(many: Path, reads: list[tuple[int, int]], form: str) -> None:
    with safe_open(many, framework="pt") as file:
        ask: Callable[[str], Any] = file.get_tensor if form == "tensors" else lambda name: file.get_slice(name)[...]
        for spec in MANY:
            assert torch.equal(raw(ask(spec.name)), stored(spec))
        # Two requests make no habit; the stream brings the rest, and its report.
        assert len(reads) == 2
        assert [report.tensors for report in file.reports] == [len(MANY) - 2]


def test_what_the_page_cache_holds_is_read_by_who_asks(
    many: Path, reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[int, int]] = []

    def cached_in(_: int, ranges: list[tuple[int, int]]) -> int:
        looked.extend(ranges)
        return sum(length for _, length in ranges)

    monkeypatch.setattr("weightlift.host.residency.cached_in", cached_in)
    monkeypatch.setattr(sequence_module, "_LOOK_BYTES", 1 << 20)
    with safe_open(many, framework="pt") as file:
        for spec in MANY:
            assert torch.equal(raw(file.get_tensor(spec.name)), stored(spec))
        assert not file.reports
    assert len(reads) == len(MANY)
    # Once for every so much of the file, not once for every tensor.
    assert 1 < len(looked) < len(MANY) / 4


def test_another_order_ends_the_stream(many: Path, reads: list[tuple[int, int]]) -> None:
    names = [spec.name for spec in MANY]
    order = [*names[:6], names[20], names[2], *names[6:12], *names[::-1]]
    specs = {spec.name: spec for spec in MANY}
    with safe_open(many, framework="pt") as file:
        for name in order:
            assert torch.equal(raw(file.get_tensor(name)), stored(specs[name]))
        assert len(reads) >= 2 + 2 + len(names) - 1
        assert not file.reports


def test_closing_ends_the_stream_and_slices_go_on(many: Path) -> None:
    before = threading.active_count()
    with safe_open(many, framework="pt") as file:
        for spec in MANY[:8]:
            file.get_tensor(spec.name)
        part = file.get_slice(MANY[8].name)
    assert threading.active_count() == before
    assert torch.equal(raw(part[...]), stored(MANY[8]))
    assert threading.active_count() == before


def test_a_handle_gives_everything_back(many: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = descriptors()
    for close in (True, False):
        file = safe_open(many, framework="pt")
        for spec in MANY[:6]:
            file.get_tensor(spec.name)
        if close:
            file.__exit__(None, None, None)
        del file
        gc.collect()
        assert descriptors() == before


def test_what_is_handed_out_is_the_callers_own(many: Path) -> None:
    file = safe_open(many, framework="pt")
    for _, name in zip(range(6), itertools.cycle([MANY[0].name]), strict=False):
        tensor = file.get_tensor(name)
        assert torch.equal(raw(tensor), stored(MANY[0]))
        tensor.zero_()
    whole = file.get_tensors()
    whole[MANY[0].name].zero_()
    assert torch.equal(raw(file.get_tensors()[MANY[0].name]), stored(MANY[0]))
    array = safe_open(many, framework="np").get_slice(MANY[0].name)
    assert array.get_dtype() == "BF16"


def test_mapped_views_where_the_method_says_so(many: Path, reads: list[tuple[int, int]]) -> None:
    file = Mapped(many, framework="pt")
    one = file.get_tensor(MANY[3].name)
    assert torch.equal(raw(one), stored(MANY[3]))
    part = file.get_slice(MANY[3].name)[1:3, ::2]
    assert torch.equal(raw(part), raw(one[1:3, ::2]))
    # Views of one mapping, as the library's own: an edit is seen through the other, and not in the file.
    one.zero_()
    assert not part.any()
    assert torch.equal(raw(safe_open(many, framework="pt").get_tensor(MANY[3].name)), stored(MANY[3]))
    assert len(reads) == 1
    assert set(file.get_tensors()) == {spec.name for spec in MANY}


def test_more_than_memory_holds_becomes_views(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(description: Any, rows: Any, options: Any) -> Any:
        if options.method is not Method.MMAP:
            raise InsufficientMemoryError("too little of it")
        return load_rows(description, rows, options)

    monkeypatch.setattr(opened_module, "load_rows", refuses)
    monkeypatch.setattr(opened_module, "SMALL_BYTES", 1000)
    file = safe_open(many, framework="pt")
    tensors = file.get_tensors()
    assert all(torch.equal(raw(tensors[spec.name]), stored(spec)) for spec in MANY)
    assert file.reports[-1].method_requested == "mmap"

    class Direct(safe_open):
        __slots__ = ()
        load_keywords = {"method": "direct"}  # noqa: RUF012 - a class variable there

    with pytest.raises(InsufficientMemoryError):
        Direct(many, framework="pt").get_tensors()


@pytest.mark.parametrize("how", ["small", "large", "slice", "sequence"])
def test_a_file_that_shrinks_is_refused(many: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "large":
        monkeypatch.setattr(opened_module, "SMALL_BYTES", 0)
    file = safe_open(many, framework="pt")
    last = MANY[-1].name
    if how == "sequence":
        for spec in MANY[:2]:
            file.get_tensor(spec.name)
    asked: dict[str, Callable[[], Any]] = {
        "slice": lambda: file.get_slice(last)[40:, 5:],
        "sequence": lambda: [file.get_tensor(spec.name) for spec in MANY[2:]],
    }
    os.truncate(many, many.stat().st_size - 200_000)
    with pytest.raises(SafetensorError, match=r"many\.safetensors"):
        asked.get(how, lambda: file.get_tensor(last))()


def test_a_file_that_is_replaced_stays_the_one_that_was_opened(many: Path, tmp_path: Path) -> None:
    file = safe_open(many, framework="pt")
    other = write_checkpoint(tmp_path / "other.safetensors", MANY, seed=5)
    other.replace(many)
    assert torch.equal(raw(file.get_tensor(MANY[0].name)), stored(MANY[0]))


@pytest.mark.parametrize(("given_mib", "budget_mib"), [(None, 8), (64, 64)])
def test_memory_is_cleared_ahead_within_the_budget(
    path: Path, monkeypatch: pytest.MonkeyPatch, given_mib: int | None, budget_mib: int
) -> None:
    """The budget of the environment counts where none is given."""
    seen: dict[str, Any] = {}

    def arena(*arguments: Any, **named: Any) -> LeaseArena:
        seen.update(named)
        return LeaseArena(*arguments, **named)

    class Given(safe_open):
        __slots__ = ()
        load_keywords = {} if given_mib is None else {"host_memory": f"{given_mib}MiB"}

    monkeypatch.setenv("WEIGHTLIFT_HOST_MEMORY", "8MiB")
    monkeypatch.setattr(opened_module, "LeaseArena", arena)
    with Given(path, framework="np"):
        assert seen == {"ahead_bytes": budget_mib * MIB // 4}
