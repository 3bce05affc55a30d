"""The fast disk and the memory control group of the public test kit."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weightlift.host import residency, storage, sweeping
from weightlift.testing.cgroup import CgroupUnavailable, memory_cgroup
from weightlift.testing.fast_disk import FastDiskUnavailable, fast_disk
from weightlift.units import MIB

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")


def mounted() -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "weightlift-fast-disk" in line]


@pytest.mark.root
class TestFastDisk:
    @pytest.fixture(autouse=True)
    def available(self) -> None:
        """Make sure that this machine can mount at all; what it then cannot do is a failure."""
        try:
            with fast_disk(16 * MIB):
                pass
        except FastDiskUnavailable as err:
            pytest.skip(f"no fast disk: {err}")

    def test_direct_reads_are_honest_and_leave_no_pages(self) -> None:
        with fast_disk(32 * MIB) as disk:
            path = disk / "file"
            content = os.urandom(MIB) * 32
            with path.open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())
                sweeping.sweep(file.fileno(), [(0, len(content))])
            assert storage.file_system(disk) == "ext4"
            access = storage.probe_direct(path)
            assert access.supported, access.reason
            plain = os.open(path, os.O_RDONLY)
            direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                with mmap.mmap(-1, 32 * MIB) as buffer:
                    assert os.preadv(direct, [buffer], 0) == len(content)
                    assert buffer[:] == content
                assert residency.residency(plain, len(content)) == 0
                assert storage.probe_dontcache(plain) in {True, False}
                assert len(os.pread(plain, 4 * MIB, 0)) == 4 * MIB
                cached = residency.residency(plain, len(content))
                assert cached is not None
                assert cached >= 4 * MIB
            finally:
                os.close(plain)
                os.close(direct)

    def test_nothing_is_left_after_an_exception(self) -> None:
        before = mounted()
        kept: list[Path] = []

        def fail() -> None:
            with fast_disk(16 * MIB) as disk:
                kept.append(disk)
                assert len(mounted()) == len(before) + 2
                raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
        assert mounted() == before
        assert not kept[0].parent.exists()

    def test_a_disk_whose_process_was_killed_is_removed_by_the_next(self) -> None:
        script = (
            "import os, signal\n"
            "from weightlift.testing.fast_disk import fast_disk\n"
            "with fast_disk(16 << 20) as disk:\n"
            "    print(disk, flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        left = Path(killed.stdout.strip())
        assert left.is_dir(), killed.stderr
        assert os.path.ismount(left)
        with fast_disk(16 * MIB):
            assert not left.exists()
            assert not left.parent.exists()

    def test_a_disk_larger_than_memory_is_refused(self) -> None:
        with pytest.raises(FastDiskUnavailable, match="available"), fast_disk(1 << 50):
            pass


def test_without_root_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    with pytest.raises(FastDiskUnavailable, match=r"needs (root|Linux)"), fast_disk(MIB):
        pass


@pytest.mark.root
class TestMemoryCgroup:
    @pytest.fixture(autouse=True)
    def available(self) -> None:
        try:
            with memory_cgroup(16 * MIB):
                pass
        except CgroupUnavailable as err:
            pytest.skip(f"no memory control group: {err}")

    def test_a_child_inside_the_limit_is_measured(self) -> None:
        with memory_cgroup(256 * MIB) as group:
            # The child holds its memory until it has been looked at.
            command = [sys.executable, "-c", "block = bytearray(64 << 20); print('held', flush=True); input()"]
            with subprocess.Popen(group.command(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
                assert child.stdout is not None
                assert child.stdout.readline() == b"held\n"
                assert group.anonymous_bytes() >= 60 * MIB
                child.communicate(b"\n")
            assert child.returncode == 0
            assert 60 * MIB <= group.peak_anonymous_bytes < 128 * MIB
            usage = group.max_usage_bytes()
            assert usage is None or usage >= 60 * MIB
            assert group.oom_kills() == 0

    def test_a_child_beyond_the_limit_is_killed(self) -> None:
        with memory_cgroup(64 * MIB) as group:
            child = subprocess.Popen(group.command([sys.executable, "-c", "bytearray(256 << 20)"]))
            assert group.wait(child, timeout_seconds=30) == -9
            assert group.oom_kills() == 1
            assert 16 * MIB < group.peak_anonymous_bytes <= 64 * MIB

    def test_what_still_runs_at_the_end_is_killed(self) -> None:
        with memory_cgroup(64 * MIB) as group:
            child = subprocess.Popen(
                group.command([sys.executable, "-c", "print('in', flush=True); input()"]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert child.stdout is not None
            assert child.stdout.readline() == b"in\n"
        assert child.wait(timeout=10) == -9
        child.communicate()

    def test_a_running_process_can_be_added(self) -> None:
        with memory_cgroup(64 * MIB) as group:
            with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
                group.add(child.pid)
                groups = Path(f"/proc/{child.pid}/cgroup").read_text()
                child.communicate(b"\n")
            assert f"weightlift-{os.getpid()}-" in groups


def test_without_a_controller_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightlift.host.groups.cgroup_levels", lambda *_: [])
    with pytest.raises(CgroupUnavailable), memory_cgroup(MIB):
        pass
