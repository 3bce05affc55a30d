from __future__ import annotations

import mmap
import os
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.host.mappings import MappingKey, MappingKind, MappingUse, joined, mappings_of, parse_smaps
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

TAIL = "Size: 9 kB\nKernelPageSize: 4 kB\nPss: 1 kB\nLazyFree: 0 kB\nVmFlags: rd wr mr mw me ac \n"
SMAPS = (
    f"""\
7f0000000000-7f0040000000 rw-p 00000000 fe:00 2146370                    /models/a b.safetensors
Rss:             1000 kB
Anonymous:        600 kB
Swap:              40 kB
{TAIL}7f0040000000-7f0080000000 rw-p 40000000 fe:00 2146370                    /models/a b.safetensors
Rss:              500 kB
Anonymous:        500 kB
Swap:               0 kB
{TAIL}7f1000000000-7f1000100000 r--s 00000000 fe:00 77                         /models/gone.bin (deleted)
Rss:               16 kB
Anonymous:          0 kB
{TAIL}55550000-55560000 rw-p 00000000 00:00 0                          [heap]
Rss:               32 kB
Anonymous:         32 kB
{TAIL}7f2000000000-7f2000100000 rw-p 00000000 00:00 0
Rss:               64 kB
Anonymous:         64 kB
{TAIL}7f3000000000-7f3000100000 rw-s 00000000 00:01 5                          /dev/shm/torch_1 (deleted)
Rss:              128 kB
Anonymous:          0 kB
{TAIL}7f4000000000-7f4000100000 rw-s 00000000 00:05 9                          /dev/dri/renderD128
Rss:                8 kB
{TAIL}7fff00000000-7fff00100000 rw-p 00000000 00:00 0                          [stack]
Rss:               12 kB
Anonymous:         12 kB
"""
    "a line from the future\n"
)


def test_mappings_that_are_alike_are_added_up() -> None:
    found = parse_smaps(SMAPS)
    file = MappingKey("/models/a b.safetensors", MappingKind.FILE, private=True, writable=True)
    assert found[file] == MappingUse(
        mapped_bytes=2 << 30,
        resident_bytes=1500 * KIB,
        anonymous_bytes=1100 * KIB,
        swapped_bytes=40 * KIB,
        file=("fe:00", 2146370),
    )
    assert found[file].lasting_bytes == 1140 * KIB


def test_kinds() -> None:
    kinds = {(key.name, key.kind, key.private): use.resident_bytes // KIB for key, use in parse_smaps(SMAPS).items()}
    assert kinds == {
        ("/models/a b.safetensors", MappingKind.FILE, True): 1500,
        ("/models/gone.bin", MappingKind.FILE, False): 16,
        ("", MappingKind.ANONYMOUS, True): 96,
        ("/dev/shm/torch_1", MappingKind.SHARED_MEMORY, False): 128,  # noqa: S108 - a name in a recorded file
        ("/dev/dri/renderD128", MappingKind.DEVICE, False): 8,
        ("[stack]", MappingKind.ANONYMOUS, True): 12,
    }


def test_processes_are_added_up() -> None:
    one = parse_smaps(SMAPS)
    both = joined([one, one, {}])
    assert {key: use.resident_bytes for key, use in both.items()} == {
        key: 2 * use.resident_bytes for key, use in one.items()
    }


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    assert mappings_of(1, tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_pages_written_to_leave_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(8 * MIB))
    key = MappingKey(str(path), MappingKind.FILE, private=True, writable=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        mapping.madvise(22)  # MADV_POPULATE_READ
        read = mappings_of(os.getpid())
        for page in range(0, 3 * MIB, mmap.PAGESIZE):
            mapping[page] = 1
        written = mappings_of(os.getpid())
    assert read is not None
    assert written is not None
    # The kernel may take pages of the file back at any time, and may never take those that were written to.
    assert read[key].anonymous_bytes == 0
    assert 3 * MIB < read[key].resident_bytes <= 8 * MIB
    assert written[key].anonymous_bytes == 3 * MIB
    assert written[key].mapped_bytes == 8 * MIB
