"""Control groups of both versions: recorded trees play version 2, the kernel plays version 1 where it is there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from weightlift.host import groups
from weightlift.host.groups import GroupUnavailable, MemoryGroup, available_memory, group_of, make_group
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Plant = Callable[[Mapping[str, str]], Path]

MEMINFO = "MemTotal: 33554432 kB\nMemFree: 1048576 kB\nMemAvailable: 16777216 kB\nSwapFree: 2097152 kB\n"
V2 = {
    "proc/meminfo": MEMINFO,
    "proc/self/mountinfo": "41 31 0:38 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
    "proc/self/cgroup": "0::/user.slice/app.scope\n",
    "sys/fs/cgroup/cgroup.procs": "",
    "sys/fs/cgroup/user.slice/cgroup.procs": "",
    "sys/fs/cgroup/user.slice/app.scope/cgroup.procs": "17\n",
}
V2_CONTROL = {
    "cgroup.procs": "",
    "cgroup.freeze": "0\n",
    "cgroup.kill": "",
    "memory.max": "max\n",
    "memory.high": "max\n",
    "memory.swap.max": "max\n",
    "memory.oom.group": "0\n",
}
V2_USE = {
    "memory.current": f"{3 * GIB}\n",
    "memory.swap.current": f"{5 * MIB}\n",
    "memory.stat": f"anon {2 * GIB}\nfile {1 * GIB}\nshmem {256 * MIB}\ninactive_file {512 * MIB}\n",
    "memory.events": "low 0\nhigh 7\nmax 3\noom 2\noom_kill 1\n",
    "memory.pressure": "some avg10=1.00 avg60=0.10 avg300=0.00 total=2500000\nfull avg10=0.00 total=1000\n",
}


def kernel(files: Mapping[str, str]) -> Callable[[Path], None]:
    """Makes folders as a kernel does: with control files in them."""

    def make_folder(folder: Path) -> None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)

    return make_folder


@pytest.fixture
def version_2(plant: Plant) -> MemoryGroup:
    return make_group("guard", plant(V2), kernel(V2_CONTROL | V2_USE))


def contents(group: MemoryGroup, name: str) -> str:
    return (group.level.folder / name).read_text()


class TestVersion2:
    def test_it_is_made_below_the_own_group(self, version_2: MemoryGroup) -> None:
        assert version_2.level.version == 2
        assert version_2.level.name.startswith("/user.slice/app.scope/guard-")
        assert version_2.members_file == version_2.level.folder / "cgroup.procs"

    def test_a_group_without_the_controller_is_left_for_one_above(self, plant: Plant) -> None:
        root = plant(V2)

        def make_folder(folder: Path) -> None:
            folder.mkdir()
            if folder.parent.name == "user.slice":
                (folder / "memory.max").write_text("max\n")

        made = make_group("guard", root, make_folder)
        assert made.level.folder.parent == root / "sys/fs/cgroup/user.slice"
        assert [entry.name for entry in (root / "sys/fs/cgroup/user.slice/app.scope").iterdir()] == ["cgroup.procs"]

    def test_what_the_user_may_not_make_is_named(self, plant: Plant) -> None:
        def refuse(folder: Path) -> None:
            raise PermissionError(13, "Permission denied", str(folder))

        with pytest.raises(GroupUnavailable, match=r"sys/fs/cgroup/guard-.* cannot be made: Permission denied"):
            make_group("guard", plant(V2), refuse)

    def test_limits(self, version_2: MemoryGroup) -> None:
        version_2.limit(4 * GIB, slow_down_bytes=3 * GIB, swap_bytes=0)
        assert contents(version_2, "memory.max") == str(4 * GIB)
        assert contents(version_2, "memory.high") == str(3 * GIB)
        assert contents(version_2, "memory.swap.max") == "0"
        assert contents(version_2, "memory.oom.group") == "1"

    def test_unlimited_swap_is_left_alone(self, version_2: MemoryGroup) -> None:
        version_2.limit(4 * GIB)
        assert contents(version_2, "memory.swap.max") == "max\n"
        assert contents(version_2, "memory.high") == "max\n"

    def test_room_to_end_in(self, version_2: MemoryGroup) -> None:
        version_2.limit(4 * GIB, slow_down_bytes=3 * GIB)
        version_2.raise_limit(5 * GIB)
        assert contents(version_2, "memory.max") == str(5 * GIB)
        assert contents(version_2, "memory.high") == "max"

    def test_a_refused_limit_is_an_error(self, plant: Plant) -> None:
        files = {name: text for name, text in V2_CONTROL.items() if name != "memory.high"}
        group = make_group("guard", plant(V2), kernel(files))
        group.limit(4 * GIB, slow_down_bytes=3 * GIB)
        assert not (group.level.folder / "memory.high").exists()
        (group.level.folder / "memory.max").unlink()
        with pytest.raises(GroupUnavailable, match="takes no limit"):
            group.limit(4 * GIB)

    def test_use(self, version_2: MemoryGroup) -> None:
        assert version_2.use() == groups.GroupUse(
            charged_bytes=3 * GIB,
            anonymous_bytes=2 * GIB,
            file_bytes=768 * MIB,
            inactive_file_bytes=512 * MIB,
            shared_bytes=256 * MIB,
            swapped_bytes=5 * MIB,
            held=False,
            kills=1,
            stalled_seconds=2.5,
        )

    def test_a_group_that_is_gone(self, plant: Plant) -> None:
        assert make_group("guard", plant(V2), kernel(V2_CONTROL)).use() is None

    def test_freezing_and_killing_are_writes(self, version_2: MemoryGroup) -> None:
        assert version_2.freeze(frozen=True)
        assert contents(version_2, "cgroup.freeze") == "1"
        assert version_2.freeze(frozen=False)
        assert contents(version_2, "cgroup.freeze") == "0"
        version_2.kill()
        assert contents(version_2, "cgroup.kill") == "1"
        assert not version_2.sleep_at_limit(enabled=True)

    def test_members_are_handed_to_the_group_above(self, version_2: MemoryGroup) -> None:
        (version_2.level.folder / "cgroup.procs").write_text("41\n42\n")
        assert version_2.release() == [41, 42]
        assert (version_2.level.folder.parent / "cgroup.procs").read_text() == "42"

    def test_the_group_of_a_service_manager(self, plant: Plant) -> None:
        root = plant(V2 | {"proc/99/cgroup": "0::/user.slice/guard-1.scope\n"})
        found = group_of(99, "guard-1.scope", root)
        assert found is not None
        assert found.level.folder == root / "sys/fs/cgroup/user.slice/guard-1.scope"
        assert group_of(99, "guard-2.scope", root) is None
        assert group_of(98, "guard-1.scope", root) is None


class TestAvailable:
    def test_all_page_cache_of_a_group_counts_as_available(self, plant: Plant) -> None:
        scope = "sys/fs/cgroup/user.slice"
        root = plant(
            V2
            | {
                f"{scope}/memory.max": f"{8 * GIB}\n",
                f"{scope}/memory.current": f"{7 * GIB}\n",
                f"{scope}/memory.stat": f"anon 5\ninactive_file {2 * GIB}\nactive_file {3 * GIB}\n",
            }
        )
        assert available_memory(root) == groups.Available(6 * GIB, 1 * GIB, 8 * GIB, 2 * GIB)

    def test_without_limits_the_machine_decides(self, plant: Plant) -> None:
        assert available_memory(plant(V2)) == groups.Available(16 * GIB, 1 * GIB, 32 * GIB, 2 * GIB)

    def test_a_system_without_proc_is_unknown(self, plant: Plant) -> None:
        assert available_memory(plant({})) is None


@pytest.fixture
def real() -> Iterator[MemoryGroup]:
    try:
        group = make_group("weightlift-test")
    except GroupUnavailable as err:
        pytest.skip(str(err))
    yield group
    group.remove()


@pytest.mark.root
class TestThisMachine:
    def test_a_child_is_counted_and_killed(self, real: MemoryGroup) -> None:
        real.limit(256 * MIB, swap_bytes=0)
        code = "b = bytearray(64 << 20); print(flush=True); import signal; signal.pause()"
        command = [sys.executable, "-c", code]
        join = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(real.members_file)]
        with subprocess.Popen([*join, *command], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            use = real.use()
            assert real.process_ids() == [child.pid]
            real.kill()
            assert child.wait(timeout=60) == -9
        assert use is not None
        assert 64 * MIB <= use.anonymous_bytes <= use.charged_bytes <= 256 * MIB
        assert (use.held, use.kills) == (False, 0)

    def test_a_member_survives_the_release(self, real: MemoryGroup) -> None:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
            real.members_file.write_text(str(child.pid))
            assert real.release() == [child.pid]
            assert not real.level.folder.exists()
            assert child.poll() is None
        assert child.returncode == 0
        assert os.path.isdir(real.level.folder.parent)
