"""The bug that weightlift exists for: checkpoint mappings that turn into memory nobody can take back.

Drivers that take a mapping's permission for the intent to write (HIP on amdgpu, and unified memory on NVIDIA) break
copy-on-write on every page of a private writable mapping when a copy to the device only reads it. The kernel's own
write-intent population does the same without any GPU, so both the bug and its absence can be shown anywhere.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import weightlift as wl
from weightlift.formats import describe
from weightlift.host.kernel import MADV_POPULATE_WRITE, advise_dont_need
from weightlift.host.memory import process_memory
from weightlift.shards import OpenShards
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.testing.fake_devices import FakeDevices
from weightlift.testing.fake_gpu import FakeGpu, FakeGpuUnavailable, build
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="shows what the Linux kernel does"),
    pytest.mark.needs("proc"),
]

SIZE: Final = 64 * MIB
SLACK: Final = 4 * MIB
SPEC: Final = TensorSpec("weight", "U8", (SIZE,))


def populate_for_writing(address: int, nbytes: int) -> None:
    """What those drivers do to the source of a copy: fault its pages in as if they were to be written.

    Raises:
        OSError: the mapping does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), MADV_POPULATE_WRITE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@pytest.fixture
def populating() -> None:
    """Skip where the kernel lacks the call: it answers as for a mapping that does not allow it."""
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(MADV_POPULATE_WRITE)
        except OSError:
            pytest.skip("this kernel has no MADV_POPULATE_WRITE (Linux 5.14)")


def anonymous_bytes() -> int:
    memory = process_memory()
    assert memory is not None
    return memory.anonymous_bytes


def mappings_of(path: Path) -> list[str]:
    """The permissions of all mappings of a file in this process."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return [line.split()[1] for line in lines if line.endswith(str(path))]


def anonymous_in_mappings_of(path: Path) -> int:
    """Bytes of a file's mappings that have become private memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            ours = line.endswith(str(path))
        elif ours and name == "Anonymous:":
            total += int(rest.split()[0]) * 1024
    return total


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors", [SPEC])


def test_a_private_writable_mapping_turns_anonymous_for_good(checkpoint: Path, populating: None) -> None:
    with open(checkpoint, "rb") as file, mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY) as mapping:
        assert mappings_of(checkpoint) == ["rw-p"]
        before = anonymous_bytes()
        sum(mapping[::4096])
        assert anonymous_bytes() - before < SLACK, "reading alone does no harm"
        view = ctypes.c_ubyte.from_buffer(mapping)
        populate_for_writing(ctypes.addressof(view), SIZE)
        assert anonymous_bytes() - before > SIZE - SLACK
        assert anonymous_in_mappings_of(checkpoint) == SIZE
        advise_dont_need(file.fileno(), 0, 0)
        assert anonymous_bytes() - before > SIZE - SLACK, "dropping the page cache does not bring it back"
        del view


def test_the_mapping_that_weightlift_reads_from_refuses_it(checkpoint: Path, populating: None) -> None:
    with OpenShards(describe(checkpoint), [0], want_direct=False, want_mapping=True) as shards:
        assert mappings_of(checkpoint) == ["r--s"]
        before = anonymous_bytes()
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            populate_for_writing(shards.sources[0].mapping_address, SIZE)
        assert anonymous_bytes() - before < SLACK
        assert anonymous_in_mappings_of(checkpoint) == 0


def test_tensors_asked_for_read_only_refuse_it_too(checkpoint: Path, populating: None) -> None:
    state = wl.load(checkpoint, method="mmap", readonly=True, framework="numpy")
    assert mappings_of(checkpoint) == ["r--s"]
    before = anonymous_bytes()
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        populate_for_writing(state["weight"].ctypes.data & -4096, SIZE)
    assert anonymous_bytes() - before < SLACK


@pytest.fixture(params=["cuda", "hip"])
def gpu(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeGpu]:
    try:
        library = build(tmp_path)
    except FakeGpuUnavailable as err:
        pytest.skip(str(err))
    with FakeGpu(library, request.param, seed=1, memory_bytes=256 * MIB) as session, FakeDevices(session):
        yield session


@pytest.mark.parametrize("engine", [pytest.param("native", marks=pytest.mark.native), "python"])
@pytest.mark.parametrize("method", ["mmap", "direct", "buffered", "auto"])
def test_copies_to_devices_come_from_pinned_slots_whatever_is_read_from(
    checkpoint: Path, gpu: FakeGpu, method: str, engine: str
) -> None:
    seen: list[tuple[list[str], int]] = []

    def look(done: int, total: int) -> None:
        seen.append((mappings_of(checkpoint), anonymous_in_mappings_of(checkpoint)))

    report = wl.load(
        checkpoint, device="cuda:0", method=method, engine=engine, progress=look, host_memory="8MiB"
    ).report
    assert report.staging == "pinned"
    assert gpu.copied_bytes(0) == SIZE
    assert gpu.counters().unregistered_copies == 0, "a copy came from elsewhere than a registered slot"
    assert seen
    for permissions, anonymous in seen:
        assert permissions in ([], ["r--s"])
        assert anonymous == 0
    assert mappings_of(checkpoint) == []
