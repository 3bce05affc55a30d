"""Naming what grew, and what of its files a command has done with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weightlift.health.guard import words
from weightlift.health.guard.consumed import SeenFile, droppable, most_read, see
from weightlift.health.guard.culprits import advice, describe, growths, page_growths
from weightlift.host.mappings import MappingKey, MappingKind, MappingUse
from weightlift.host.processes import OpenDescriptor
from weightlift.units import GIB, MIB

COPIED = MappingKey("/m/a.safetensors", MappingKind.FILE, private=True, writable=True)
READ_ONLY = MappingKey("/m/b.safetensors", MappingKind.FILE, private=False, writable=False)
HEAP = MappingKey("", MappingKind.ANONYMOUS, private=True, writable=True)
SHARED = MappingKey("/dev/shm/torch_1", MappingKind.SHARED_MEMORY, private=False, writable=True)  # noqa: S108


NOW = {
    COPIED: MappingUse(mapped_bytes=8 * GIB, resident_bytes=5 * GIB, anonymous_bytes=3 * GIB, swapped_bytes=1 * GIB),
    READ_ONLY: MappingUse(mapped_bytes=8 * GIB, resident_bytes=8 * GIB),
    HEAP: MappingUse(mapped_bytes=9 * GIB, resident_bytes=1 * GIB, anonymous_bytes=1 * GIB),
    SHARED: MappingUse(mapped_bytes=2 * GIB, resident_bytes=2 * GIB),
}


class TestGrowths:
    def test_what_cannot_be_dropped_counts_most_first(self) -> None:
        found = growths(NOW, {})
        assert [(growth.key, growth.grown_bytes // GIB) for growth in found] == [(COPIED, 4), (SHARED, 2), (HEAP, 1)]

    def test_since_an_earlier_moment(self) -> None:
        before = {COPIED: MappingUse(anonymous_bytes=4 * GIB), HEAP: MappingUse(anonymous_bytes=1 * GIB - 2 * MIB)}
        assert [(growth.key, growth.grown_bytes // MIB) for growth in growths(NOW, before)] == [
            (SHARED, 2048),
            (HEAP, 2),
        ]

    def test_sentences_name_the_mapping_and_what_helps(self) -> None:
        copied, shared, heap = growths(NOW, {})
        assert describe(copied) == (
            "/m/a.safetensors, mapped private and writable: 4.00 GiB of 8.00 GiB turned into anonymous memory, "
            "1.00 GiB of it in swap"
        )
        assert "--readonly-mappings" in advice(copied)
        assert "--no-mmap" in advice(copied)
        assert describe(shared) == "shared memory /dev/shm/torch_1: 2.00 GiB"
        assert describe(heap) == "memory that the program allocated: 1.00 GiB"
        assert "--limit" in advice(heap)

    def test_names_cannot_steer_the_terminal(self) -> None:
        key = COPIED._replace(name="/m/\x1b[2Jx")
        (growth,) = growths({key: NOW[COPIED]}, {})
        assert "\x1b" not in describe(growth)
        assert growth.to_json()["name"] == "/m/\x1b[2Jx"

    def test_only_what_matters_beside_the_first_is_named(self) -> None:
        small = {HEAP: MappingUse(anonymous_bytes=100 * MIB), COPIED: NOW[COPIED]}
        lines = words.culprit_lines(growths(small, {}))
        assert len(lines) == 2
        assert lines[1].startswith("hint: ")
        assert "unknown" in words.culprit_lines([])[0]


class TestWhatGrowsNow:
    copied = growths(NOW, {})[0]
    mapped = page_growths(NOW, {})
    read = SeenFile(path="/m/c\x1b.bin", inode=1, size_bytes=8 * GIB, positions=(1 * GIB, 3 * GIB))

    def test_pages_of_files_are_told_apart_from_what_was_copied(self) -> None:
        assert [(growth.key, growth.grown_bytes // GIB) for growth in self.mapped] == [(READ_ONLY, 8), (COPIED, 2)]

    def test_what_cannot_be_dropped_comes_first(self) -> None:
        lines = [
            words.growing_line(*one)
            for one in (
                (self.copied, self.mapped[0], self.read),
                (None, self.mapped[0], self.read),
                (None, None, self.read),
                (None, None, None),
            )
        ]
        assert lines[0].startswith("growing: /m/a.safetensors, mapped private and writable: 4.00 GiB")
        assert lines[1] == "page cache: /m/b.safetensors, mapped: 8.00 GiB of 8.00 GiB in memory"
        assert lines[2] == "page cache: /m/c\\x1b.bin, read up to 3.00 GiB of 8.00 GiB"
        assert lines[3] == "growing: nothing to speak of"

    def test_names_of_mapped_files_cannot_steer_the_terminal(self) -> None:
        (growth,) = page_growths({READ_ONLY._replace(name="/m/\x1b[2J"): NOW[READ_ONLY]}, {})
        assert "\x1b" not in words.growing_line(None, growth, None)

    def test_the_file_most_was_read_of(self) -> None:
        other = replace(self.read, path="/m/d", positions=(2 * GIB,))
        now = {file.path: file for file in (self.read, other)}
        assert most_read(now, {}) is self.read
        assert most_read(now, {self.read.path: self.read}) is other
        assert most_read(now, now) is None
        assert most_read({}, {}) is None


def open_at(position: int, path: str = "/m/a", inode: int = 7) -> OpenDescriptor:
    return OpenDescriptor(path, 1, inode, 4 * GIB, position)


class TestConsumed:
    def only(self, *descriptors: OpenDescriptor, mapped: bool = False, before: SeenFile | None = None) -> SeenFile:
        key = MappingKey("/m/a", MappingKind.FILE, private=True, writable=False)
        mappings = {key: MappingUse(mapped_bytes=4 * GIB, file=("fe:00", 7))} if mapped else {}
        (file,) = see({before.path: before} if before else {}, descriptors, mappings).values()
        return file

    def test_read_from_front_to_back(self) -> None:
        file = self.only(open_at(100 * MIB), open_at(3 * GIB))
        assert droppable(file, everything=False) == (0, 84 * MIB)

    @pytest.mark.parametrize("position", [0, 8, 16 * MIB])
    def test_hardly_begun(self, position: int) -> None:
        assert droppable(self.only(open_at(position)), everything=False) is None

    def test_mapped(self) -> None:
        file = self.only(open_at(3 * GIB), mapped=True)
        assert droppable(file, everything=False) is None
        assert droppable(file, everything=True) == (0, 0)

    def test_closed_and_unmapped(self) -> None:
        file = self.only(before=self.only(open_at(8), mapped=True))
        assert (file.positions, file.mapped) == ((), False)
        assert droppable(file, everything=False) == (0, 0)

    def test_replaced_by_another_file_of_the_same_name(self) -> None:
        file = self.only(open_at(0, inode=8), before=self.only(open_at(3 * GIB)))
        assert (file.inode, file.positions) == (8, (0,))

    def test_small_mappings_do_not_count(self) -> None:
        key = MappingKey("/lib/libc.so", MappingKind.FILE, private=True, writable=False)
        assert see({}, [], {key: MappingUse(mapped_bytes=2 * MIB, file=("fe:00", 9))}) == {}
