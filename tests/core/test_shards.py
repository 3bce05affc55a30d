"""Open shards: descriptors come and go together, and a shard is the file whose header was read."""

from __future__ import annotations

import ctypes
import os
import resource
from typing import TYPE_CHECKING

import pytest

from weightlift.errors import FileChangedError, ReadError, TruncatedFileError
from weightlift.formats import describe
from weightlift.host.probes import Probe, run_probes
from weightlift.operations import Sink
from weightlift.plan import Wanted
from weightlift.shards import OpenShards
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import KIB, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weightlift.description import Description


@pytest.fixture
def description(tmp_path: Path) -> Description:
    specs = [TensorSpec(f"t{n}", "U8", (50_001,)) for n in range(3)]
    return describe(write_checkpoint(tmp_path / "model", specs, shards=3))


def test_only_the_shards_used_are_opened(description: Description, tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path):
        with OpenShards(description, [2, 0], want_direct=True, want_mapping=True) as shards:
            assert shards.sources[1].descriptor == shards.sources[1].direct_descriptor == -1
            assert sorted(shards.mappings) == [0, 2]
            for index in (0, 2):
                source, path = shards.sources[index], description.shards[index].path
                assert os.path.samestat(os.fstat(source.descriptor), path.stat())
                assert ctypes.string_at(source.mapping_address, source.size_bytes) == path.read_bytes()
                assert source.direct_descriptor >= 0 or not shards.facts[index].direct
            with pytest.raises(TypeError):
                shards.mappings[0][0] = 1
            assert "1 more" in shards.names
        with OpenShards(description, [], want_direct=True) as shards:
            assert (shards.cached_before(), shards.cached_now()) == (0, 0)


def test_a_shard_that_changed_closes_those_already_open(description: Description, tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path):
        os.truncate(description.shards[2].path, 1000)
        with pytest.raises(TruncatedFileError, match="shrank from 50,") as caught:
            OpenShards(description, [0, 1, 2], want_direct=True, want_mapping=True)
        assert (caught.value.path, caught.value.offset) == (description.shards[2].path, 1000)


def test_a_change_while_reading_is_noticed_in_used_shards_only(description: Description) -> None:
    with OpenShards(description, [0, 1], want_direct=False) as shards:
        shards.check_unchanged()
        description.shards[2].path.write_bytes(b"")
        shards.check_unchanged()
        status = description.shards[1].path.stat()
        os.utime(description.shards[1].path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        with pytest.raises(FileChangedError, match="written to while it was being read"):
            shards.check_unchanged()


def test_detached_shards_outlive_the_block(description: Description, tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path):
        with OpenShards(description, [0], want_direct=False) as shards:
            descriptor = shards.sources[0].descriptor
            kept = shards.detach()
        os.fstat(descriptor)
        kept.close()
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(descriptor)


@pytest.mark.needs("O_DIRECT")
def test_too_many_open_files_is_a_read_error_with_a_hint(description: Description, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with nothing_left_behind(tmp_path):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 1, hard))
        try:
            with pytest.raises((ReadError, OSError)) as caught:
                OpenShards(description, [0, 1, 2], want_direct=True)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert isinstance(caught.value, ReadError), repr(caught.value)
        assert "ulimit -n" in caught.value.hint


def test_alignment_is_at_most_a_page(description: Description) -> None:
    with OpenShards(description, [0], want_direct=True) as shards:
        assert PAGE_BYTES % shards.sources[0].offset_alignment == 0


def test_reading_ahead_asks_for_no_more_at_once_than_the_kernel_gives(description: Description) -> None:
    asked: list[Probe] = []

    def ask(probes: Sequence[Probe]) -> list[int]:
        asked.extend(probes)
        return run_probes(probes)

    with OpenShards(description, [0, 1, 2], want_direct=False, look_at_cache=False, ask=ask) as shards:
        shards.fetch([])
        assert not asked
        shards.fetch([Wanted(1, 4096, 300 * KIB, Sink.DISCARD), Wanted(2, 0, 4096, Sink.DISCARD)])
        fd, other = (shards.sources[index].descriptor for index in (1, 2))
        assert [probe[:2] for probe in asked] == [(fd, 4096 + 128 * KIB * n) for n in range(3)] + [(other, 0)]
    assert all(probe.ahead and probe.length == 128 * KIB for probe in asked)


@pytest.mark.needs("preadv")
@pytest.mark.parametrize("want_direct", [True, False])
def test_all_shards_are_asked_in_one_go(tmp_path: Path, *, want_direct: bool) -> None:
    specs = [TensorSpec(f"t{n}", "U8", (40 << 20,)) for n in range(3)]
    description = describe(write_checkpoint(tmp_path / "model", specs, shards=3, sparse=True))
    asked: list[int] = []

    def ask(probes: Sequence[Probe]) -> list[int]:
        asked.append(len(probes))
        return run_probes(probes)

    with OpenShards(description, [0, 1, 2], want_direct=want_direct, ask=ask) as shards:
        trials = sum(want_direct and shards.facts[index].direct for index in range(3))
        # Three blocks of 16 MiB in each shard.
        assert asked == [9 + trials]
        assert shards.cached_now() == shards.cached_before()
        assert asked == [9 + trials, 3]
    asked.clear()
    # Little is counted as it is needed; only reads that wait are worth asking for together.
    with OpenShards(description, [1], want_direct=want_direct, ask=ask) as shards:
        assert not asked
        shards.cached_now()
        assert not asked


@pytest.mark.needs("preadv")
def test_a_file_is_tried_once_as_long_as_it_is_the_same(tmp_path: Path) -> None:
    asked: list[int] = []

    def ask(probes: Sequence[Probe]) -> list[int]:
        asked.append(len(probes))
        return run_probes(probes)

    def look(description: Description) -> tuple[bool, str, int]:
        with OpenShards(description, [0], want_direct=True, ask=ask) as shards:
            # Little is counted as it is needed; only reads that wait are worth asking for together.
            shards.cached_now()
            facts, source = shards.facts[0], shards.sources[0]
            assert (source.direct_descriptor >= 0) is facts.direct
            return facts.direct, facts.direct_reason, source.offset_alignment

    for size in (1000, 2000):
        spec = TensorSpec("t", "U8", (size,))
        description = describe(write_checkpoint(tmp_path / "model.safetensors", [spec]))
        found = look(description)
        if not found[0]:
            pytest.skip(f"no direct reads here: {found[1]}")
        assert asked == [1]
        assert look(description) == found
        assert asked == [1]
        asked.clear()
