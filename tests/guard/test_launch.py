"""The choice of what holds a command together, and systemd played by a script."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from weightlift.errors import UnsupportedError
from weightlift.health.guard import launch
from weightlift.health.guard.launch import ScopeWanted, choose_scope, slow_down_bytes, systemd_command
from weightlift.units import GIB, MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts programs under Linux")

SYSTEMD_RUN = """#!/bin/sh
# As systemd-run does with --scope: moves itself, then becomes the command.
echo "$@" >> "$FAKE_LOG"
[ -z "$FAKE_FAILURE" ] || { echo "$FAKE_FAILURE" >&2; exit 1; }
while [ "$1" != "--" ]; do case "$1" in --unit=*) unit="${1#--unit=}";; esac; shift; done
shift
[ "$*" = "/bin/sh -c cat /proc/self/cgroup" ] && { echo "0::/user.slice/$unit.scope"; exit 0; }
exec "$@"
"""


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root in which systemd runs, and a script that plays ``systemd-run``; returns the root."""
    programs = tmp_path / "programs"
    programs.mkdir()
    script = programs / "systemd-run"
    script.write_text(SYSTEMD_RUN)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.delenv("FAKE_FAILURE", raising=False)
    (tmp_path / "root/run/systemd/system").mkdir(parents=True)
    return tmp_path / "root"


def test_a_scope_of_systemd(systemd: Path) -> None:
    scope = choose_scope(ScopeWanted.AUTO, 16 * GIB, 1 * GIB, systemd)
    assert scope.kind == "systemd scope"
    assert scope.unit.endswith(".scope")
    assert (scope.limit_bytes, scope.ceiling_bytes) == (16 * GIB, 16 * GIB - 512 * MIB)
    assert scope.prefix[0] == "systemd-run"
    assert f"--unit={scope.unit.removesuffix('.scope')}" in scope.prefix
    assert f"--property=MemoryMax={16 * GIB}" in scope.prefix
    assert f"--property=MemorySwapMax={1 * GIB}" in scope.prefix
    assert scope.prefix[-1] == "--"


def test_systemd_that_refuses_is_quoted(systemd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAILURE", "Failed to connect to bus")
    scope = choose_scope(ScopeWanted.AUTO, 16 * GIB, 0, systemd)
    assert scope.kind == "process tree"
    assert "systemd-run failed (Failed to connect to bus)" in scope.reason
    assert "no memory controller is mounted" in scope.reason
    with pytest.raises(UnsupportedError, match="Failed to connect to bus"):
        choose_scope(ScopeWanted.GROUP, 16 * GIB, 0, systemd)


def test_a_user_asks_the_users_manager() -> None:
    assert systemd_command("u", GIB, 0, user=True)[:3] == ("systemd-run", "--user", "--scope")
    assert "--user" not in systemd_command("u", GIB, 0, user=False)


def test_the_tree_can_be_asked_for(tmp_path: Path) -> None:
    assert choose_scope(ScopeWanted.TREE, GIB, 0, tmp_path).group is None


def test_a_command_that_systemd_did_not_move_is_watched_as_a_tree(
    systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = choose_scope(ScopeWanted.AUTO, 16 * GIB, 0, systemd)
    (systemd / "proc/17").mkdir(parents=True)
    (systemd / "proc/17/cgroup").write_text("0::/elsewhere\n")
    (systemd / "proc/self").mkdir()
    monkeypatch.setattr(launch, "_MOVE_SECONDS", 0.0)
    launch.find_group(scope, 17, systemd)
    assert (scope.kind, scope.group, scope.limit_bytes, scope.ceiling_bytes) == ("process tree", None, None, None)


def test_the_group_of_the_scope_is_found(systemd: Path) -> None:
    scope = choose_scope(ScopeWanted.AUTO, 16 * GIB, 0, systemd)
    for folder in ("proc/17", "proc/self"):
        (systemd / folder).mkdir(parents=True)
        (systemd / folder / "cgroup").write_text(f"0::/user.slice/{scope.unit}\n")
    (systemd / "proc/self/mountinfo").write_text("41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    launch.find_group(scope, 17, systemd)
    assert scope.group is not None
    assert scope.group.level.folder == systemd / "sys/fs/cgroup/user.slice" / scope.unit


def test_a_command_starts_behind_its_prefix_with_signals_unblocked(systemd: Path, tmp_path: Path) -> None:
    scope = choose_scope(ScopeWanted.AUTO, 16 * GIB, 0, systemd)
    out = tmp_path / "out"
    command = ["/bin/sh", "-c", 'echo "$1" > "$2"; cat /proc/self/oom_score_adj >> "$2"; exit 7', "sh", "a b", str(out)]
    process_id = launch.start(command, scope, os.environ, frozenset())
    _, status = os.waitpid(process_id, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert out.read_text().splitlines() == ["a b", "500"]
    assert scope.unit.removesuffix(".scope") in (tmp_path / "log").read_text()


def test_slowing_down_begins_a_little_below_the_limit() -> None:
    assert slow_down_bytes(1 * GIB) == 960 * MIB
    assert slow_down_bytes(64 * GIB) == 64 * GIB - 512 * MIB


def test_the_hook_comes_first_on_the_path() -> None:
    paths = launch.with_readonly_mappings({"PYTHONPATH": "/mine"})["PYTHONPATH"].split(os.pathsep)
    assert (Path(paths[0]) / "sitecustomize.py").exists()
    assert paths[1:] == ["/mine"]
    assert os.pathsep not in launch.with_readonly_mappings({})["PYTHONPATH"]
