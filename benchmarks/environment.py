"""The record of where and how figures were taken: hardware, kernel, memory, versions, command line.

Also has a virtual machine come to have its memory at all.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.bench.backed_memory import back_memory, is_virtual

if TYPE_CHECKING:
    from collections.abc import Sequence

GROWTH_BYTES = 1 << 30
PACKAGES = ("weightlift", "numpy", "torch", "safetensors", "msgspec", "xxhash", "ml_dtypes")


def record(folder: Path) -> dict[str, Any]:
    """Everything a reader needs to judge the figures; unknown values are ``None``."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": names_only(sys.argv),
        "git": _git_state(),
        "processor": _field("/proc/cpuinfo", "model name"),
        "logical_processors": os.cpu_count(),
        "usable_processors": len(os.sched_getaffinity(0)),
        "load_average_at_start": os.getloadavg(),
        "memory_bytes": _memory("MemTotal"),
        "memory_available_bytes": _memory("MemAvailable"),
        "swap_bytes": _memory("SwapTotal"),
        "kernel": platform.release(),
        "hypervisor": is_virtual(),
        "transparent_hugepages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "transparent_hugepages_defrag": _text("/sys/kernel/mm/transparent_hugepage/defrag"),
        "free_page_reporting": Path("/sys/module/page_reporting").exists(),
        "proactive_reclaim": _text("/sys/kernel/mm/damon/admin/kdamonds/0/state"),
        "dirty_ratio": _text("/proc/sys/vm/dirty_ratio"),
        "storage": storage(folder),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
        "compiler": _command("cc", "--version").partition("\n")[0] or None,
    }


def names_only(words: Sequence[str]) -> list[str]:
    """A command line without the folders of this machine: a file that was given whole is its name."""
    return [Path(word).name if word.startswith("/") else word for word in words]


def storage(folder: Path) -> dict[str, str | None]:
    """The file system that holds ``folder``, and what a loop device under it is backed by."""
    fields = _command("findmnt", "-no", "SOURCE,FSTYPE,OPTIONS", "--target", str(folder)).split()
    source, kind, options = (fields + [None] * 3)[:3]
    backing = _text(f"/sys/block/{Path(source).name}/loop/backing_file") if source else None
    below = _command("findmnt", "-no", "FSTYPE", "--target", backing).strip() if backing else None
    return {"device": source, "file_system": kind, "options": options, "loop_over": below}


def grow_memory(size: int) -> int:
    """Have a virtual machine that is given memory as it uses it come to have ``size`` bytes free, or what it can get.

    Such a machine starts with a small part and says so in ``MemTotal``; a program that asked what is free would be
    told too little. Returns the bytes that are free in the end.
    """
    free = _memory("MemAvailable") or 0
    while free < size:
        back_memory(size)
        before, free = free, _memory("MemAvailable") or 0
        if free < before + GROWTH_BYTES:
            break
    return free


def python_packages(python: str) -> dict[str, str]:
    """Name and version of every package that another interpreter has."""
    lines = _command(python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check").split()
    return dict(line.split("==", 1) for line in lines if "==" in line)


def _git_state() -> dict[str, Any]:
    root = Path(__file__).resolve().parent
    commit = _command("git", "-C", str(root), "rev-parse", "HEAD").strip()
    return {
        "commit": commit or None,
        "changed_files": len(_command("git", "-C", str(root), "status", "--porcelain").splitlines()),
    }


def _command(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _field(path: str, name: str) -> str | None:
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _memory(name: str) -> int | None:
    value = _field("/proc/meminfo", name)
    return int(value.split()[0]) * 1024 if value else None


def version(name: str) -> str | None:
    """The version of an installed package, or ``None``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
