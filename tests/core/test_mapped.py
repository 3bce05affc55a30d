"""Mappings that are handed out: what the kernel is told of them, and that nothing is read before it is touched."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.api import load
from weightlift.compat.safetensors import mapping as of_handles
from weightlift.compat.safetensors import safe_open
from weightlift.formats import describe
from weightlift.host import kernel
from weightlift.host.memory import Headroom, headroom, process_memory
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.mapped import map_shards, mappable_rows, mapped_tensors
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.types import Framework
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Map = Callable[..., mmap.mmap]

SPECS = [
    TensorSpec("large", "F32", (8, 256, 1024)),
    TensorSpec("small", "BF16", (3, 5)),
    TensorSpec("empty", "F32", (0, 4)),
    TensorSpec("odd", "U8", (7,)),
]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors", SPECS)


@pytest.fixture
def descriptor(checkpoint: Path) -> Iterator[int]:
    """The checkpoint, open."""
    fd = os.open(checkpoint, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def map_it(checkpoint: Path, descriptor: int) -> Iterator[Map]:
    made = []

    def make(*, readonly: bool = False, keep: bool) -> mmap.mmap:
        mapping = map_shards(describe(checkpoint), [0], {0: descriptor}, readonly=readonly, keep=keep)[0]
        made.append(mapping)
        return mapping

    yield make
    for mapping in made:
        mapping.close()


def cached_bytes(descriptor: int) -> int:
    found = kernel.cachestat(descriptor, 0, 0)
    if found is None:
        pytest.skip("this system has no cachestat")
    return found.cached * kernel.PAGE_SIZE


def require_cold(descriptor: int) -> None:
    # Dirty pages, and those that read-ahead is still bringing in, would escape.
    os.fsync(descriptor)
    os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    kernel.advise_dont_need(descriptor, 0, 0)
    if cached_bytes(descriptor):
        pytest.skip("the file system under the temporary folder keeps pages it is asked to drop (tmpfs?)")


def mapping_flags(path: Path) -> list[str]:
    """The kernel's two-letter flags of the one mapping of a file."""
    inside, found = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("VmFlags:"):
            found.append(line.split()[1:])
    (flags,) = found
    return flags


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("readonly", [True, False])
def test_the_tensors_are_those_of_the_file(checkpoint: Path, map_it: Map, *, readonly: bool, keep: bool) -> None:
    description = describe(checkpoint)
    rows = mappable_rows(description, range(len(description)))
    mapping = map_it(readonly=readonly, keep=keep)
    tensors: dict[str, Any] = dict(mapped_tensors(description, rows, {0: mapping}, pick_framework(Framework.NUMPY)))
    assert {name: tensor.tobytes() for name, tensor in tensors.items()} == {
        spec.name: tensor_bytes(spec) for spec in SPECS
    }
    assert all(tensor.flags.writeable != readonly for tensor in tensors.values() if tensor.size)
    tensors.clear()


@linux_only
@pytest.mark.parametrize("readonly", [True, False])
def test_only_files_that_may_stay_cached_are_read_in_large_units(checkpoint: Path, map_it: Map, readonly: bool) -> None:
    with map_it(readonly=readonly, keep=False):
        assert "hg" not in mapping_flags(checkpoint)
    with mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as err:
            pytest.skip(f"this kernel has no transparent huge pages: {err}")
    with map_it(readonly=readonly, keep=True):
        assert "hg" in mapping_flags(checkpoint)


@linux_only
@pytest.mark.parametrize(("cache", "large_units"), [("keep", True), ("drop", False)])
def test_the_cache_policy_of_a_load_decides_about_large_units(
    checkpoint: Path, map_it: Map, cache: str, *, large_units: bool
) -> None:
    with map_it(keep=True):
        if "hg" not in mapping_flags(checkpoint):
            pytest.skip("this kernel has no transparent huge pages")
    state = load(checkpoint, method="mmap", cache=cache, framework="numpy")
    assert state["large"].size
    assert ("hg" in mapping_flags(checkpoint)) == large_units


@linux_only
@pytest.mark.needs("cachestat")
@pytest.mark.parametrize("cache", ["auto", "keep", "drop"])
def test_a_handle_decides_about_large_units_once_something_has_to_be_read(
    checkpoint: Path, descriptor: int, map_it: Map, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with map_it(keep=True):
        if "hg" not in mapping_flags(checkpoint):
            pytest.skip("this kernel has no transparent huge pages")
    asked: list[Headroom | None] = []

    def ask() -> Headroom | None:
        asked.append(headroom())
        return asked[-1]

    monkeypatch.setattr(of_handles, "headroom", ask)

    class Mapped(safe_open):
        load_keywords = {"method": "mmap", "cache": cache}  # noqa: RUF012 - a class variable there

    require_cold(descriptor)
    os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    warm = Mapped(checkpoint, framework="np")
    assert warm.get_tensor("large").size
    assert warm.get_tensor("small").size
    assert not asked
    assert "hg" not in mapping_flags(checkpoint)
    require_cold(descriptor)
    assert warm.get_tensor("small").size, "beside what was cached a moment ago"
    assert not asked
    del warm
    cold = Mapped(checkpoint, framework="np")
    assert cold.get_tensor("large").size
    assert len(asked) == (cache == "auto")
    assert ("hg" in mapping_flags(checkpoint)) == (cache != "drop")


@linux_only
@pytest.mark.needs("cachestat")
@pytest.mark.parametrize("keep", [True, False])
def test_nothing_is_read_before_it_is_touched(checkpoint: Path, descriptor: int, *, keep: bool) -> None:
    description = describe(checkpoint)
    require_cold(descriptor)
    mapping = map_shards(description, [0], {0: descriptor}, readonly=False, keep=keep)[0]
    assert cached_bytes(descriptor) == 0
    assert mapping[5 * MIB] == os.pread(descriptor, 1, 5 * MIB)[0]
    assert cached_bytes(descriptor) > 0


@linux_only
@pytest.mark.needs("cachestat", "posix_fadvise")
def test_a_touch_reads_twice_as_far_as_the_device_reads_ahead(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    setting = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/bdi/read_ahead_kb")
    if not setting.exists():
        pytest.skip(f"the file system under {tmp_path} is not on one device of its own")
    ahead = int(setting.read_text()) * KIB
    if not ahead:
        pytest.skip("read-ahead is switched off")
    path = write_checkpoint(tmp_path / "large.safetensors", [TensorSpec("x", "U8", (8 * ahead,))], sparse=True)
    fd = os.open(path, os.O_RDONLY)
    try:
        description = describe(path)
        with map_shards(description, [0], {0: fd}, readonly=False)[0] as mapping:
            require_cold(fd)
            mapping[4 * ahead]
            assert 1.5 * ahead < cached_bytes(fd) < 3 * ahead
    finally:
        os.close(fd)


@linux_only
@pytest.mark.needs("proc")
def test_writing_to_a_page_takes_memory_for_that_page_alone(checkpoint: Path, map_it: Map) -> None:
    before, start = checkpoint.read_bytes(), process_memory()
    mapping = map_it(keep=True)
    mapping[5 * MIB] ^= 0xFF
    now = process_memory()
    assert start is not None
    assert now is not None
    assert now.anonymous_bytes - start.anonymous_bytes < MIB
    assert checkpoint.read_bytes() == before


@linux_only
@pytest.mark.parametrize("keep", [True, False])
def test_advice_that_the_system_refuses_is_no_error(
    monkeypatch: pytest.MonkeyPatch, map_it: Map, checkpoint: Path, *, keep: bool
) -> None:
    unknown = 9999
    monkeypatch.setattr(os, "POSIX_FADV_SEQUENTIAL", unknown)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", unknown)
    mapping = map_it(keep=keep)
    assert mapping[:] == checkpoint.read_bytes()


@pytest.mark.parametrize("padding", ["reference", "1"])
def test_tensors_that_cannot_be_mapped_where_they_lie_keep_their_bytes(tmp_path: Path, padding: Any) -> None:
    specs = [TensorSpec(f"t{number}", "F32", (1 + 100_000 * number,)) for number in range(5)]
    path = write_checkpoint(tmp_path / "model.safetensors", specs, padding=padding)
    tensors = load(path, method="mmap", framework="numpy")
    # What the load itself still held of them is gone, and gives no memory back.
    gc.collect()
    for spec in specs:
        assert tensors[spec.name].tobytes() == tensor_bytes(spec), spec.name


def test_tensors_that_cannot_be_mapped_stand_among_the_others_in_file_order(tmp_path: Path) -> None:
    specs = [
        TensorSpec("first", "U8", (3,)),
        TensorSpec("misaligned", "F32", (4,)),
        TensorSpec("odd", "U8", (5,)),
        TensorSpec("none", "F32", (0,)),
        TensorSpec("last", "F32", (2, 2)),
    ]
    path = write_checkpoint(tmp_path / "model.safetensors", specs, sort=False)
    state = load(path, method="mmap", framework="numpy")
    assert "1 lie at addresses wrong for their data type" in state.report.reason
    assert list(state) == [spec.name for spec in specs]
    assert all(state[spec.name].tobytes() == tensor_bytes(spec) for spec in specs)
