from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.host import kernel, residency, sweeping
from weightlift.host.kernel import PAGE_SIZE, QUICK_RANGE_BYTES
from weightlift.host.probes import Probe, run_probes
from weightlift.host.residency import Residency

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.host.conftest import CachedFile

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
GRANULE = 16 * PAGE_SIZE


def as_another_user(answer: Callable[[], str]) -> str:
    """What a function finds when a user asks who neither owns nor may write the file."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            text = answer()
        except BaseException as err:  # noqa: BLE001 - whatever happens has to reach the parent
            text = repr(err)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@linux_only
class TestResidency:
    def test_whole_file(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(10 * PAGE_SIZE + 1)
        assert residency.residency(file.fd, file.size_bytes) == 0
        file.warm(2 * PAGE_SIZE, 3 * PAGE_SIZE)
        assert residency.residency(file.fd, file.size_bytes) == 3 * PAGE_SIZE
        file.warm(0, file.size_bytes)
        assert residency.residency(file.fd, file.size_bytes) == file.size_bytes

    def test_an_empty_file_holds_nothing(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(0)
        assert residency.residency(file.fd, 0) == 0
        found = residency.residency_map(file.fd, 0, GRANULE)
        assert found is not None
        assert found.runs() == []

    def test_only_parts_are_looked_at(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(100 * GRANULE + 5)
        file.warm(0, 2 * GRANULE)
        file.warm(50 * GRANULE, 20 * GRANULE)
        parts = [(GRANULE, 3 * GRANULE), (60 * GRANULE, 40 * GRANULE + 5)]
        found = residency.residency_map(file.fd, file.size_bytes, GRANULE, None, parts)
        assert found is not None
        assert [(run.offset // GRANULE, run.length, run.state) for run in found.runs()] == [
            (0, GRANULE, Residency.UNSEEN),
            (1, GRANULE, Residency.RESIDENT),
            (2, 2 * GRANULE, Residency.ABSENT),
            (4, 56 * GRANULE, Residency.UNSEEN),
            (60, 10 * GRANULE, Residency.RESIDENT),
            (70, 30 * GRANULE + 5, Residency.ABSENT),
        ]
        assert (found.cached_bytes, found.looked_bytes) == (11 * GRANULE, 43 * GRANULE + 5)
        assert [offset for offset, _ in residency.absent_ranges(file.fd, found)] == [2 * GRANULE, 70 * GRANULE]
        warm = residency.residency_map(file.fd, file.size_bytes, GRANULE, None, [(50 * GRANULE, 20 * GRANULE)])
        assert warm is not None
        assert [run.state for run in warm.runs()] == [Residency.UNSEEN, Residency.RESIDENT, Residency.UNSEEN]
        assert warm.cached_bytes == warm.looked_bytes == 20 * GRANULE

    def test_mincore_gives_the_same_where_cachestat_is_missing(
        self, make_file: Callable[[int], CachedFile], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = make_file(10 * PAGE_SIZE + 1)
        file.warm(2 * PAGE_SIZE, 3 * PAGE_SIZE)
        monkeypatch.setattr(kernel, "cachestat", lambda *_: None)
        monkeypatch.setattr(residency, "_VECTOR_WINDOW_BYTES", 4 * PAGE_SIZE)
        assert residency.residency(file.fd, file.size_bytes) == 3 * PAGE_SIZE

    @pytest.mark.root
    def test_someone_elses_file_is_unknown(
        self, make_file: Callable[[int], CachedFile], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = make_file(4 * GRANULE)
        fd = os.open(file.path, os.O_RDONLY)

        def answer() -> str:
            known = residency.residency_map(fd, file.size_bytes, GRANULE)
            return f"{residency.may_see_residency(fd)} {residency.residency(fd, file.size_bytes)} {known}"

        try:
            assert as_another_user(answer) == "False None None"
            # On a kernel without cachestat, mincore would call every page resident.
            monkeypatch.setattr(kernel, "cachestat", lambda *_: None)
            assert as_another_user(answer) == "False None None"
            file.path.chmod(0o666)
            assert as_another_user(answer).startswith("True 0 ")
            file.path.chmod(0o444)
            os.chown(file.path, 65534, 65534)
            assert as_another_user(answer).startswith("True 0 ")
        finally:
            os.close(fd)

    def test_an_absent_and_a_resident_file_cost_one_call(
        self, make_file: Callable[[int], CachedFile], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = make_file(8 * GRANULE)
        calls: list[int] = []
        ask = kernel.cachestat

        def counting(fd: int, offset: int, length: int) -> kernel.CacheStat | None:
            calls.append(offset)
            return ask(fd, offset, length)

        monkeypatch.setattr(kernel, "cachestat", counting)
        absent = residency.residency_map(file.fd, file.size_bytes, GRANULE)
        file.warm(0, file.size_bytes)
        resident = residency.residency_map(file.fd, file.size_bytes, GRANULE)
        assert calls == [0, 0]
        assert absent is not None
        assert absent.runs() == [(0, 8 * GRANULE, Residency.ABSENT)]
        assert resident is not None
        assert resident.runs() == [(0, 8 * GRANULE, Residency.RESIDENT)]
        assert resident.cached_bytes == 8 * GRANULE

    def test_files_are_counted_together_with_trial_reads(self, make_file: Callable[[int], CachedFile]) -> None:
        one, none, two = make_file(3 * GRANULE + 5), make_file(0), make_file(GRANULE)
        one.warm(GRANULE, 2 * PAGE_SIZE)
        one.warm(3 * GRANULE, 5)
        buffer = ctypes.create_string_buffer(PAGE_SIZE)
        asked: list[Probe] = []

        def ask(probes: Sequence[Probe]) -> list[int]:
            asked.extend(probes)
            return run_probes(probes)

        files = [(file.fd, residency.whole_file(file.size_bytes)) for file in (one, none, two)]
        trial = Probe(two.fd, 0, PAGE_SIZE, ctypes.addressof(buffer))
        counts, answers = residency.count_together(files, GRANULE, ask, [trial])
        # The read comes first, so that its page is cached by the time it is looked for.
        assert counts == [[0, 2 * PAGE_SIZE, 0, 5], [], [PAGE_SIZE]]
        assert answers == [PAGE_SIZE]
        assert buffer.raw == os.pread(two.fd, PAGE_SIZE, 0)
        assert len(asked) == 6
        assert residency.count_together([], GRANULE, ask) == ([], [])

    def test_an_empty_file_has_no_steps_of_any_size(self, make_file: Callable[[int], CachedFile]) -> None:
        for step in (0, GRANULE):
            assert residency.count_together([(make_file(0).fd, [])], step, run_probes) == ([[]], [])

    @pytest.mark.parametrize("pieces", [1, 2, 3, 7])
    def test_pieces_of_many_steps_are_counted_first(
        self, make_file: Callable[[int], CachedFile], monkeypatch: pytest.MonkeyPatch, pieces: int
    ) -> None:
        monkeypatch.setattr(residency, "_PIECES", pieces)
        one, two = make_file(31 * GRANULE + 5), make_file(9 * GRANULE)
        one.warm(GRANULE, PAGE_SIZE)
        one.warm(12 * GRANULE, 9 * GRANULE)
        one.warm(31 * GRANULE, 5)
        two.warm(0, 9 * GRANULE)
        parts = [(one.fd, [(0, 4 * GRANULE), (11 * GRANULE, 20 * GRANULE + 5)]), (two.fd, [(0, 9 * GRANULE)])]
        asked: list[int] = []

        def ask(probes: Sequence[Probe]) -> list[int]:
            asked.append(len(probes))
            return run_probes(probes)

        counts, _ = residency.count_together(parts, GRANULE, ask)
        assert counts == [
            [count for part in found for count in residency.count_cached(fd, *part, GRANULE)] for fd, found in parts
        ]
        # A second look at what is mixed, and no third.
        assert len(asked) == 2
        assert asked[0] <= pieces + len(parts) + 1

    def test_a_refused_count_is_left_to_the_careful_one(
        self, make_file: Callable[[int], CachedFile], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = make_file(2 * GRANULE)
        file.warm(0, PAGE_SIZE)

        def refuse(probes: Sequence[Probe]) -> list[int]:
            return [-errno.EPERM for _ in probes]

        assert residency.count_together([(file.fd, residency.whole_file(file.size_bytes))], GRANULE, refuse)[0] == [
            [PAGE_SIZE, 0]
        ]
        monkeypatch.setattr(residency, "count_cached", lambda *_: [None, None])
        assert residency.count_together([(file.fd, residency.whole_file(file.size_bytes))], GRANULE, refuse)[0] == [
            [None, None]
        ]

    def test_absent_pages_under_a_part(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(8 * PAGE_SIZE + 9)
        assert residency.absent_in(file.fd, 100, PAGE_SIZE) == [(0, 2 * PAGE_SIZE)]
        file.warm(PAGE_SIZE, PAGE_SIZE)
        file.warm(3 * PAGE_SIZE, PAGE_SIZE)
        assert residency.absent_in(file.fd, 100, 4 * PAGE_SIZE) == [
            (0, PAGE_SIZE),
            (2 * PAGE_SIZE, PAGE_SIZE),
            (4 * PAGE_SIZE, PAGE_SIZE),
        ]
        assert residency.absent_in(file.fd, PAGE_SIZE, 7) == []
        assert residency.absent_in(file.fd, 0, 0) == []
        assert residency.absent_in(-1, 0, 9) is None

    @pytest.mark.parametrize("size", [3 * PAGE_SIZE, QUICK_RANGE_BYTES + 3 * PAGE_SIZE])
    def test_pages_of_short_and_long_ranges(self, make_file: Callable[[int], CachedFile], size: int) -> None:
        file = make_file(3 * PAGE_SIZE)
        os.truncate(file.path, size)
        os.fsync(file.fd)
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        file.warm(PAGE_SIZE, PAGE_SIZE)
        vector = kernel.resident_pages(file.fd, 0, size)
        assert vector is not None
        assert (len(vector), vector[:3], sum(vector)) == (size // PAGE_SIZE, bytes([0, 1, 0]), 1)

    def test_the_map_of_a_mixed_file(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(8 * GRANULE + 3 * PAGE_SIZE + 5)
        file.warm(2 * GRANULE, 2 * GRANULE)
        file.warm(5 * GRANULE + 4 * PAGE_SIZE, PAGE_SIZE)
        file.warm(8 * GRANULE, 3 * PAGE_SIZE + 5)
        found = residency.residency_map(file.fd, file.size_bytes, GRANULE)
        assert found is not None
        assert (found.granule_bytes, found.size_bytes) == (GRANULE, file.size_bytes)
        assert found.cached_bytes == 2 * GRANULE + PAGE_SIZE + 3 * PAGE_SIZE + 5
        assert found.runs() == [
            (0, 2 * GRANULE, Residency.ABSENT),
            (2 * GRANULE, 2 * GRANULE, Residency.RESIDENT),
            (4 * GRANULE, GRANULE, Residency.ABSENT),
            (5 * GRANULE, GRANULE, Residency.PARTIAL),
            (6 * GRANULE, 2 * GRANULE, Residency.ABSENT),
            (8 * GRANULE, 3 * PAGE_SIZE + 5, Residency.RESIDENT),
        ]
        assert found.state(2 * GRANULE, 2 * GRANULE) is Residency.RESIDENT
        assert found.state(3 * GRANULE + 5, 7) is Residency.RESIDENT
        assert found.state(GRANULE, 1) is Residency.ABSENT
        assert found.state(2 * GRANULE - 1, 2) is Residency.PARTIAL
        assert found.state(5 * GRANULE, GRANULE) is Residency.PARTIAL

    def test_absent_ranges_are_exact_to_the_page(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(4 * GRANULE + 2 * PAGE_SIZE + 5)
        file.warm(GRANULE + 2 * PAGE_SIZE, PAGE_SIZE)
        file.warm(2 * GRANULE, GRANULE)
        file.warm(4 * GRANULE, PAGE_SIZE)
        found = residency.residency_map(file.fd, file.size_bytes, GRANULE)
        assert found is not None
        assert residency.absent_ranges(file.fd, found) == [
            (0, GRANULE + 2 * PAGE_SIZE),
            (GRANULE + 3 * PAGE_SIZE, 13 * PAGE_SIZE),
            (3 * GRANULE, GRANULE),
            (4 * GRANULE + PAGE_SIZE, PAGE_SIZE + 5),
        ]

    def test_pages_that_cannot_be_looked_at_count_as_cached(
        self, make_file: Callable[[int], CachedFile], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = make_file(4 * GRANULE)
        file.warm(GRANULE, PAGE_SIZE)
        found = residency.residency_map(file.fd, file.size_bytes, GRANULE)
        assert found is not None
        monkeypatch.setattr(residency, "may_see_residency", lambda *_: False)
        assert residency.absent_ranges(file.fd, found) == [(0, GRANULE), (2 * GRANULE, 2 * GRANULE)]


def test_ranges_are_united() -> None:
    assert residency.united([]) == []
    assert residency.united([(10, 5), (0, 4), (4, 2), (12, 1), (14, 9), (30, 1)]) == [(0, 6), (10, 13), (30, 1)]


@linux_only
class TestSweep:
    def test_a_load_in_between_leaves_the_cache_as_it_was(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(16 * GRANULE + 9)
        file.warm(3 * GRANULE + 5 * PAGE_SIZE, 2 * GRANULE)
        file.warm(9 * GRANULE, PAGE_SIZE)
        found = residency.residency_map(file.fd, file.size_bytes, GRANULE)
        assert found is not None
        absent = residency.absent_ranges(file.fd, found)
        before = kernel.resident_pages(file.fd, 0, file.size_bytes)
        # A load reads with read-ahead, which brings in units of many pages.
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        file.warm(0, file.size_bytes)
        assert residency.residency(file.fd, file.size_bytes) == file.size_bytes
        sweeping.sweep(file.fd, absent)
        assert kernel.resident_pages(file.fd, 0, file.size_bytes) == before

    def test_pages_covered_in_part_stay_but_for_the_last_of_the_file(
        self, make_file: Callable[[int], CachedFile]
    ) -> None:
        file = make_file(8 * PAGE_SIZE + 9)
        for page in range(9):
            file.warm(page * PAGE_SIZE, min(PAGE_SIZE, file.size_bytes - page * PAGE_SIZE))
        sweeping.sweep(file.fd, [(PAGE_SIZE + 1, 3 * PAGE_SIZE), (7 * PAGE_SIZE, PAGE_SIZE + 9)])
        assert kernel.resident_pages(file.fd, 0, file.size_bytes) == bytes([1, 1, 0, 0, 1, 1, 1, 0, 0])

    def test_ranges_that_touch_go_as_one(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(16 * PAGE_SIZE))
        calls: list[tuple[int, int]] = []
        monkeypatch.setattr(kernel, "advise_dont_need", lambda _, *where: calls.append(where))
        with path.open("rb") as file:
            half = PAGE_SIZE // 2
            sweeping.sweep(file.fileno(), [(PAGE_SIZE, half), (PAGE_SIZE + half, half), (4 * PAGE_SIZE, 8 * PAGE_SIZE)])
            assert calls == [(PAGE_SIZE, PAGE_SIZE), (4 * PAGE_SIZE, 8 * PAGE_SIZE)]
            calls.clear()
            sweeping.sweep(file.fileno(), [])
            sweeping.sweep(file.fileno(), [(5, 10), (PAGE_SIZE + 5, 0)])
            assert calls == []

    def test_a_mapped_page_stays_and_residency_tells(self, make_file: Callable[[int], CachedFile]) -> None:
        file = make_file(4 * PAGE_SIZE)
        with mmap.mmap(file.fd, file.size_bytes, prot=mmap.PROT_READ) as mapped:
            assert len(bytes(mapped)) == file.size_bytes
            sweeping.sweep(file.fd, [(0, file.size_bytes)])
            assert residency.residency(file.fd, file.size_bytes) == file.size_bytes
        sweeping.sweep(file.fd, [(0, file.size_bytes)])
        assert residency.residency(file.fd, file.size_bytes) == 0
