"""Starting the guarded command: in a control group of its own where this user may make one.

Owns the choice of the scope and the way into it. A way counts as possible once a trial worked, never because of a
version. The command keeps the guard's terminal, process group, descriptors and environment.
"""

from __future__ import annotations

import enum
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightlift.errors import UnsupportedError
from weightlift.host.groups import ROOT, GroupUnavailable, MemoryGroup, group_of, make_group

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SHELL: Final = "/bin/sh"
_JOIN: Final = 'echo $$ > "$0"'
# The command volunteers for the out-of-memory killer, which every process may do; so no other program is picked.
_ENTER: Final = '[ -z "$0" ] || echo $$ > "$0" || exit 126; echo 500 2>/dev/null > /proc/self/oom_score_adj; exec "$@"'
_TELL_GROUP: Final = "cat /proc/self/cgroup"
_TRIAL_SECONDS: Final = 10.0
_MOVE_SECONDS: Final = 5.0
_MOVE_PAUSE_SECONDS: Final = 0.005
_SLACK_SHARE: Final = 16
_SLACK_BYTES_MAX: Final = 512 << 20
_HOOK: Final = Path(__file__).parent / "readonly"


class ScopeWanted(enum.Enum):
    """How the command is to be held together."""

    AUTO = "auto"
    GROUP = "cgroup"
    TREE = "tree"


@dataclass(slots=True)
class Scope:
    """How the command is held together.

    Attributes:
        kind: what it is, in words.
        reason: why it is this one.
        group: the control group; made by a service manager it appears only with the command in it.
        unit: the name that a service manager gives the group; empty if it was made here.
        prefix: what the command line begins with.
        limit_bytes: the group's limit.
        ceiling_bytes: lasting memory at which the kernel slows the command down or puts it to sleep.
    """

    kind: str
    reason: str
    group: MemoryGroup | None = None
    unit: str = ""
    prefix: tuple[str, ...] = ()
    limit_bytes: int | None = None
    ceiling_bytes: int | None = None


def choose_scope(wanted: ScopeWanted, limit_bytes: int, swap_bytes: int, root: Path = ROOT) -> Scope:
    """Find the best way to hold the command together.

    Where systemd runs the machine, it is asked for a scope, since all groups are its own; elsewhere a group is made by
    hand. Where neither works, the process tree is watched.

    Args:
        wanted: what the user asked for.
        limit_bytes: limit of the control group.
        swap_bytes: most swap on top.
        root: root of the file system, for recorded trees.

    Raises:
        UnsupportedError: a control group was asked for and cannot be had.
    """
    if wanted is ScopeWanted.TREE:
        return Scope("process tree", "this was asked for")
    scope, refused = _systemd_scope(limit_bytes, swap_bytes, root)
    if scope is None:
        scope, why = _own_group(limit_bytes, swap_bytes, root)
        refused = "; ".join(part for part in (refused, why) if part)
    if scope is not None:
        return scope
    if wanted is ScopeWanted.GROUP:
        raise UnsupportedError(
            f"no control group can be had: {refused}",
            hint="run as root, or on a machine with systemd and control groups of version 2; --scope tree needs none",
        )
    return Scope("process tree", refused)


def slow_down_bytes(limit_bytes: int) -> int:
    """Where the kernel starts to slow a group down, a little below its limit."""
    return limit_bytes - min(limit_bytes // _SLACK_SHARE, _SLACK_BYTES_MAX)


def systemd_command(unit: str, limit_bytes: int, swap_bytes: int, *, user: bool) -> tuple[str, ...]:
    """The command line that runs what follows it in a scope of systemd, in place of itself."""
    properties = {
        "MemoryMax": limit_bytes,
        "MemoryHigh": slow_down_bytes(limit_bytes),
        "MemorySwapMax": swap_bytes,
    }
    return (
        "systemd-run",
        *(("--user",) if user else ()),
        "--scope",
        "--quiet",
        "--collect",
        f"--unit={unit}",
        *(f"--property={name}={value}" for name, value in properties.items()),
        "--",
    )


def _systemd_scope(limit_bytes: int, swap_bytes: int, root: Path) -> tuple[Scope | None, str]:
    if not (root / "run/systemd/system").is_dir():
        return None, ""
    if shutil.which("systemd-run") is None:
        return None, "systemd-run is not on PATH"
    unit = f"weightlift-guard-{os.getpid()}-{time.monotonic_ns()}"
    user = os.geteuid() != 0
    try:
        trial = subprocess.run(  # noqa: S603 - a fixed command line
            [*systemd_command(f"{unit}-trial", limit_bytes, swap_bytes, user=user), _SHELL, "-c", _TELL_GROUP],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None, f"systemd-run did not answer within {_TRIAL_SECONDS:g} s"
    if trial.returncode != 0:
        said = trial.stderr.strip().splitlines()
        return None, f"systemd-run failed ({said[-1] if said else f'code {trial.returncode}'})"
    if f"{unit}-trial.scope" not in trial.stdout:
        return None, "systemd-run left its trial where it was"
    return Scope(
        "systemd scope",
        f"{'the user' if user else 'the system'} manager of systemd keeps it",
        unit=f"{unit}.scope",
        prefix=systemd_command(unit, limit_bytes, swap_bytes, user=user),
        limit_bytes=limit_bytes,
        ceiling_bytes=slow_down_bytes(limit_bytes),
    ), ""


def _own_group(limit_bytes: int, swap_bytes: int, root: Path) -> tuple[Scope | None, str]:
    try:
        group = make_group("weightlift-guard", root)
    except GroupUnavailable as err:
        return None, str(err)
    ceiling = limit_bytes if group.level.version == 1 else slow_down_bytes(limit_bytes)
    try:
        _try_to_join(group)
        group.limit(limit_bytes, slow_down_bytes=ceiling, swap_bytes=swap_bytes)
    except GroupUnavailable as err:
        group.remove()
        return None, str(err)
    group.sleep_at_limit(enabled=True)
    kind = f"control group, version {group.level.version}"
    return Scope(kind, group.level.name, group, limit_bytes=limit_bytes, ceiling_bytes=ceiling), ""


def _try_to_join(group: MemoryGroup) -> None:
    joined = subprocess.run(  # noqa: S603 - a fixed command line
        [_SHELL, "-c", _JOIN, str(group.members_file)], stderr=subprocess.PIPE, text=True, check=False
    )
    if joined.returncode != 0:
        raise GroupUnavailable(f"{group.level.folder} takes no process: {joined.stderr.strip()}")


def start(command: Sequence[str], scope: Scope, environment: Mapping[str, str], signals: frozenset[int]) -> int:
    """Start the command; the caller has blocked ``signals``, the command gets them again.

    Args:
        command: program and arguments.
        scope: where it is to run.
        environment: its environment variables.
        signals: what the caller waits for.

    Returns:
        Its process id.
    """
    members = str(scope.group.members_file) if scope.group else ""
    words = [*scope.prefix, _SHELL, "-c", _ENTER, members, *command]
    program = shutil.which(words[0]) or words[0]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - signals
    # Python ignores these two, which a program started by a shell does not.
    defaults = (signal.SIGPIPE, signal.SIGXFSZ)
    return os.posix_spawn(program, words, dict(environment), setsigmask=mask, setsigdef=defaults)


def find_group(scope: Scope, process_id: int, root: Path = ROOT) -> None:
    """Wait until a service manager has moved the command into the scope, and note its group.

    If it never does, the scope becomes a process tree.
    """
    deadline = time.monotonic() + _MOVE_SECONDS
    while scope.unit and scope.group is None and (root / f"proc/{process_id}/cgroup").exists():
        scope.group = group_of(process_id, scope.unit, root)
        if scope.group is not None:
            return
        if time.monotonic() > deadline:
            scope.kind, scope.reason, scope.unit = "process tree", "systemd did not move the command into its scope", ""
            scope.limit_bytes = scope.ceiling_bytes = None
            return
        time.sleep(_MOVE_PAUSE_SECONDS)


def with_readonly_mappings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which Python programs turn mapped checkpoints read-only, see :mod:`.readonly`."""
    paths = [str(_HOOK), *filter(None, [environment.get("PYTHONPATH", "")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}
