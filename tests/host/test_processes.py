from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.host import processes
from weightlift.host.processes import OpenDescriptor, ProcessUse
from weightlift.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Plant = Callable[[Mapping[str, str]], Path]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

STATUS = "Name:\tload) er\nRssAnon:\t  100 kB\nRssFile:\t  20 kB\nRssShmem:\t  3 kB\nVmSwap:\t  7 kB\n"
TREE = {
    "proc/1/stat": "1 (init) S 0 1 1 0\n",
    "proc/10/stat": "10 (sh) S 1 10 10 0\n",
    "proc/11/stat": "11 (a) b (c) R 10 10 10 0\n",
    "proc/12/stat": "12 (python 3) S 11 10 10 0\n",
    "proc/20/stat": "20 (other) S 1 20 20 0\n",
    "proc/12/status": STATUS,
    "proc/meminfo": "",
}


def test_descendants_whatever_their_names(plant: Plant) -> None:
    root = plant(TREE)
    assert processes.descendants((10,), root) == [10, 11, 12]
    assert processes.descendants((12, 20, 99), root) == [12, 20]


def test_memory_by_kind(plant: Plant) -> None:
    root = plant(TREE)
    assert processes.process_use(12, root) == ProcessUse(100 * KIB, 20 * KIB, 3 * KIB, 7 * KIB)
    assert processes.process_use(13, root) is None
    assert ProcessUse(1, 2, 3, 4) + ProcessUse(10, 20, 30, 40) == ProcessUse(11, 22, 33, 44)


def test_a_system_without_proc(tmp_path: Path) -> None:
    assert processes.process_ids(tmp_path) == []
    assert processes.descendants((1,), tmp_path) == []
    assert list(processes.open_descriptors(1, 0, tmp_path)) == []
    assert processes.command_name(1, tmp_path) is None
    assert processes.holders_of(tmp_path / "nothing", tmp_path) == []


@linux_only
def test_large_open_files_with_their_positions(tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(2 * MIB))
    small.write_bytes(bytes(1 * MIB))
    with large.open("rb", buffering=0) as first, small.open("rb"), large.open("rb", buffering=0):
        first.seek(12345)
        found = [entry for entry in processes.open_descriptors(os.getpid(), 2 * MIB) if entry.path == str(large)]
        everything = [entry.path for entry in processes.open_descriptors(os.getpid(), MIB)]
    status = large.stat()
    expected = [OpenDescriptor(str(large), status.st_dev, status.st_ino, 2 * MIB, position) for position in (0, 12345)]
    assert sorted(found) == expected
    assert str(small) in everything


@linux_only
def test_who_has_a_file_mapped(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(MIB))
    code = (
        "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=1);"
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert processes.holders_of(path) == [child.pid]
        assert processes.parent_of(child.pid) == os.getpid()
        child.communicate(b"\n")
    assert processes.holders_of(path) == []


@linux_only
def test_staying_alive_asks_for_what_it_may() -> None:
    code = (
        "from weightlift.host.processes import stay_alive; print(stay_alive());"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmLck')][0],"
        " open('/proc/self/oom_score_adj').read().strip())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refused, state = done.stdout.splitlines()
    locked, score = state.split()
    assert ("locking" in refused) == (locked == "0")
    assert ("spared" in refused) == (score != "-900")
    assert "adopting" not in refused
