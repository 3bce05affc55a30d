"""Running the guard as a user does, inside a control group that plays a small machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.testing.cgroup import CgroupUnavailable, memory_cgroup
from weightlift.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from weightlift.testing.cgroup import MemoryCgroup

GUARD = [sys.executable, "-m", "weightlift", "guard"]


@dataclass(frozen=True)
class Guarded:
    """How a guarded command ended.

    Attributes:
        code: the exit code.
        out: what it printed.
        err: what the guard said.
        events: the log.
    """

    code: int
    out: str
    err: str
    events: list[dict[str, Any]]

    def actions(self) -> list[str]:
        return [event["action"] for event in self.events if event["event"] == "action"]


def read_log(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def guarded(log: Path, *words: str, group: MemoryCgroup | None = None, **keywords: Any) -> Guarded:
    """Run ``weightlift guard`` with a log, in a control group or not."""
    command = [*GUARD, "--log", str(log), *words]
    if group is not None:
        command = group.command(command)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **keywords)
    return Guarded(done.returncode, done.stdout, done.stderr, read_log(log) if log.exists() else [])


@pytest.fixture
def guard() -> Any:
    """The function :func:`guarded`."""
    return guarded


@pytest.fixture
def machine() -> Iterator[MemoryCgroup]:
    """A control group of 512 MiB."""
    try:
        with memory_cgroup(512 * MIB) as group:
            yield group
    except CgroupUnavailable as err:
        pytest.skip(str(err))
