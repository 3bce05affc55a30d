"""What the probes say on systems that are not Linux, played by this one without the calls they lack."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

LINUX_ONLY = [
    "O_DIRECT", "O_CLOEXEC", "preadv", "pread", "posix_fadvise", "geteuid", "sched_getaffinity", "major", "minor",
    "memfd_create", "statvfs",
]  # fmt: skip

SCRIPT = """
    import ctypes, mmap, os, pathlib, shutil, signal, subprocess, sys, tempfile
    path = sys.argv[2]
    for name in sys.argv[3:]:
        if hasattr(os, name):
            delattr(os, name)
    for name in ("PROT_READ", "MAP_SHARED", "MAP_PRIVATE"):
        if hasattr(mmap, name):
            delattr(mmap, name)
    sys.platform = sys.argv[1]

    from weightlift.bench import running, worker
    from weightlift.bench.cache_states import ModelFiles
    from weightlift.cli import main as _command_line
    from weightlift.health.cache import evict, files, warm
    from weightlift.host import groups, kernel, machine, memory, pci, place, processes, residency, storage, sweeping
    from weightlift.monitor import Monitor
    from weightlift.testing.cgroup import CgroupUnavailable, memory_cgroup
    from weightlift.testing.fast_disk import FastDiskUnavailable, fast_disk

    fd = os.open(path, os.O_RDONLY)
    nowhere = pathlib.Path(path, "nowhere")
    print(kernel.cachestat(fd, 0, 0), kernel.statx_direct_alignment(fd), kernel.resident_pages(fd, 0, 1))
    print(storage.probe_direct(path).supported, storage.probe_dontcache(fd), residency.may_see_residency(fd))
    print(residency.residency(fd, 10), residency.residency_map(fd, 10, 65536), storage.file_system(path, nowhere))
    sweeping.sweep(fd, [(0, 10)])
    print(memory.headroom(nowhere), memory.process_memory(nowhere), memory.available_processors(nowhere) >= 1)
    found = machine.machine_facts(nowhere)
    print(found.room, found.swap, found.features.cachestat.value, found.features.io_uring.value)
    print(pci.graphics_cards(nowhere), place.place_facts(path, nowhere).mount)
    model = ModelFiles(files.find_files([path]), may_drop=True, brought_in=[[]])
    print(model.cached_bytes(), "does not tell" in model.why_not_cold(), model.restore(read_again=True).after_bytes)
    for context in (memory_cgroup, fast_disk):
        try:
            with context(1 << 20):
                pass
        except (CgroupUnavailable, FastDiskUnavailable) as err:
            print(sys.platform in str(err))
"""


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_everything_imports_and_says_unknown(platform: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), platform, __file__, *LINUX_ONLY],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "None None None",
        "False False False",
        "None None unknown",
        "None None True",
        "None None unknown unknown",
        "() None",
        "None True None",
        "True",
        "True",
    ]
