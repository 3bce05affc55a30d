"""Checks of the machine itself: memory, control groups, limits, kernel, containers, WSL2."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from weightlift.health.findings import Check, Finding, Level, Rule
from weightlift.host.machine import Ability
from weightlift.units import GIB, MIB, align_up, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.health.facts import Facts
    from weightlift.host.memory import Room

_LOW_SHARE: Final = 0.1
_LOCK_BYTES: Final = 64 * MIB
_SHARED_BYTES: Final = 1 * GIB
_BESIDE_BYTES: Final = 2 * GIB

MEMORY_LOW = Rule(
    id="memory-low",
    level=Level.WARNING,
    when="less than a tenth of the memory this process may use is available",
    why="a load takes the rest and the machine starts swapping or killing programs",
    mend="close what uses memory; `ps -eo rss,comm --sort=-rss | head` lists it",
)
MEMORY_LESS_THAN_GPU = Rule(
    id="memory-less-than-gpu",
    level=Level.ADVICE,
    when="the GPUs have more memory than the machine",
    why="a model that fills the GPUs cannot stay in the page cache, so loaders that map files push out everything else",
    mend="load straight to the GPU past the page cache: `--method direct` or `--cache drop`",
)
CGROUP_LIMIT = Rule(
    id="cgroup-limit",
    level=Level.ADVICE,
    when="a control group (container, systemd unit, job) allows this process less memory than the machine has",
    why="programs that judge by the machine's memory are killed; the page cache of the files read counts too",
    mend="raise the limit: `docker update --memory={size} {container}`, `sudo systemctl set-property {unit} "
    "MemoryMax={size}`",
)
MODEL_EXCEEDS_MEMORY = Rule(
    id="model-exceeds-memory",
    level=Level.ADVICE,
    when="the model named is larger than the memory available",
    why="it cannot be loaded into host memory as a whole, nor stay in the page cache",
    mend="load it to a GPU or stream it: `weightlift load {path} --device cuda:0 --method direct`",
)
OVERCOMMIT_STRICT = Rule(
    id="overcommit-strict",
    level=Level.WARNING,
    when="vm.overcommit_memory is 2",
    why="private mappings of checkpoints count in full against the commit limit, so that mapped loads fail although "
    "memory is free",
    mend="`sudo sysctl vm.overcommit_memory=0`, or load with `--method direct`",
)
MEMLOCK_SMALL = Rule(
    id="memlock-small",
    level=Level.ADVICE,
    when="RLIMIT_MEMLOCK is under 64 MiB",
    why="llama.cpp's mlock and registered io_uring buffers fail beyond it; pinned memory for GPUs does not count, so "
    "weightlift does not mind",
    mend="`ulimit -l unlimited` in the shell, or `* - memlock unlimited` in /etc/security/limits.conf",
)
CACHESTAT_MISSING = Rule(
    id="cachestat-missing",
    level=Level.ADVICE,
    when="the kernel has no cachestat call, or a sandbox forbids it",
    why="what the page cache holds is then asked page by page through a mapping, which takes longer on large files",
    mend="run Linux 6.5 or later; in a container, a seccomp profile that allows cachestat",
)
HUGEPAGES_NEVER = Rule(
    id="hugepages-never",
    level=Level.ADVICE,
    when="transparent huge pages are switched off",
    why="the first touch of fresh memory is what makes loads to the CPU slow, and small pages make it slower",
    mend="`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`",
)
WSL2 = Rule(
    id="wsl2",
    level=Level.WARNING,
    when="this is the Windows Subsystem for Linux",
    why="it gets half of the machine's memory unless told otherwise, pins only part of that for the GPU, and reads "
    "Windows' drives (/mnt/c) over a slow protocol",
    mend="memory= and swap= under [wsl2] in %UserProfile%\\.wslconfig, then `wsl --shutdown`; keep models inside the "
    "Linux file system; where pinning fails, `--staging pageable`",
)
SHM_SMALL = Rule(
    id="shm-small",
    level=Level.WARNING,
    when="the shared memory of a container (/dev/shm) is smaller than 1 GiB",
    why="programs that share tensors between processes (vLLM, data loaders) die there with a bus error",
    mend="`docker run --shm-size=8g` or `--ipc=host`",
)

RULES: Final = (
    MEMORY_LOW,
    MEMORY_LESS_THAN_GPU,
    CGROUP_LIMIT,
    MODEL_EXCEEDS_MEMORY,
    OVERCOMMIT_STRICT,
    MEMLOCK_SMALL,
    CACHESTAT_MISSING,
    HUGEPAGES_NEVER,
    WSL2,
    SHM_SMALL,
)


def check_memory(facts: Facts) -> Iterator[Finding]:
    """How much memory there is, and who else has a say."""
    room = facts.machine.room if facts.machine else None
    if room is None:
        return
    if room.available_bytes < _LOW_SHARE * room.total_bytes:
        yield MEMORY_LOW.found(f"only {room.sentence}")
    total = facts.machine.memory_bytes if facts.machine else None
    if total is not None and facts.gpu_bytes > total and not facts.unified:
        yield MEMORY_LESS_THAN_GPU.found(
            f"the GPUs have {format_bytes(facts.gpu_bytes)} of memory, the machine {format_bytes(total)}"
        )
    groups = room.rooms[1:]
    if groups and total is not None:
        tightest = min(groups, key=lambda group: group.limit_bytes)
        yield CGROUP_LIMIT.found(
            f"the control group {tightest.group} (version {tightest.version}) allows "
            f"{format_bytes(tightest.limit_bytes)} of the machine's {format_bytes(total)}, "
            f"{format_bytes(tightest.available_bytes)} of it available",
            _raise_limit(facts, tightest),
        )


def _raise_limit(facts: Facts, group: Room) -> str:
    """The command that gives a group room for the model named, or for half of the machine."""
    total = facts.machine.memory_bytes if facts.machine else None
    wanted = facts.place.model_bytes + _BESIDE_BYTES if facts.place else (total or 0) // 2
    gib = max(align_up(wanted, GIB), 2 * group.limit_bytes) // GIB
    last = group.group.rsplit("/", 1)[-1]
    container = facts.machine.container if facts.machine else ""
    if container in {"docker", "podman"}:
        return f"`{container} update --memory={gib}g {shlex.quote(last) if last else 'CONTAINER'}`"
    if last.endswith((".service", ".scope", ".slice")):
        return f"`sudo systemctl set-property {shlex.quote(last)} MemoryMax={gib}G`"
    file = (
        f"/sys/fs/cgroup/memory{group.group}/memory.limit_in_bytes"
        if group.version == 1
        else f"/sys/fs/cgroup{group.group}/memory.max"
    )
    return f"`echo {gib * GIB} | sudo tee {shlex.quote(file)}`, or whatever set the limit"


def check_model_against_memory(facts: Facts) -> Iterator[Finding]:
    """Whether the model named fits into what is available."""
    room = facts.machine.room if facts.machine else None
    place = facts.place
    if room is None or place is None or place.model_bytes <= room.available_bytes:
        return
    device = "cuda:0" if facts.has_gpu else "null"
    yield MODEL_EXCEEDS_MEMORY.found(
        f"the model has {format_bytes(place.model_bytes)}, and {room.sentence}",
        f"load it to a GPU or stream it: `weightlift load {shlex.quote(place.path)} --device {device} --method direct`",
    )


def check_limits(facts: Facts) -> Iterator[Finding]:
    """Limits other than the amount of memory."""
    machine = facts.machine
    if machine is None:
        return
    if machine.overcommit == 2:
        left = machine.commit_left_bytes
        rest = f", and {format_bytes(max(left, 0))} may still be promised" if left is not None else ""
        yield OVERCOMMIT_STRICT.found(f"the kernel promises no more memory than it has{rest}")
    if machine.memlock_bytes is not None and machine.memlock_bytes < _LOCK_BYTES:
        yield MEMLOCK_SMALL.found(f"this process may lock {format_bytes(machine.memlock_bytes)} in memory")
    if machine.container and machine.shared_bytes is not None and machine.shared_bytes < _SHARED_BYTES:
        yield SHM_SMALL.found(
            f"this container ({machine.container}) has {format_bytes(machine.shared_bytes)} of shared memory (/dev/shm)"
        )


def check_kernel(facts: Facts) -> Iterator[Finding]:
    """What the kernel lacks."""
    machine = facts.machine
    if machine is None:
        return
    if machine.wsl2:
        yield WSL2.found(f"this is WSL2 (kernel {machine.release})")
    features = machine.features
    if features is not None and features.cachestat in {Ability.MISSING, Ability.FORBIDDEN}:
        yield CACHESTAT_MISSING.found(f"the call cachestat is {features.cachestat.value}")
    if machine.hugepages == "never":
        yield HUGEPAGES_NEVER.found("transparent huge pages are set to never")


CHECKS: Final[tuple[Check, ...]] = (check_memory, check_model_against_memory, check_limits, check_kernel)
