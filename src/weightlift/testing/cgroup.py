"""A memory control group for a child process: a hard limit, and what the child really held.

Owns the group's folder and removes it. Works with version 1 and version 2, whichever this machine offers below the
group that the calling process is in, and changes no group that exists already.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

from weightlift.host.groups import GroupUnavailable, make_group

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightlift.host.cgroup import CgroupLevel

_POLL_SECONDS: Final = 0.01


class CgroupUnavailable(Exception):  # noqa: N818 - a state of the machine that tests skip on, not a failure
    """This machine lets the process make no memory control group; the message says why."""


class MemoryCgroup:
    """A control group with a memory limit.

    Attributes:
        limit_bytes: the limit on everything charged to the group, its page cache included.
    """

    def __init__(self, level: CgroupLevel, limit_bytes: int) -> None:
        self._level = level
        self._peak_anonymous_bytes = 0
        self.limit_bytes = limit_bytes

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs ``arguments`` inside the group, from its first instruction on."""
        script = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", script, str(self._level.folder / "cgroup.procs"), *arguments]

    def add(self, process_id: int) -> None:
        """Move a running process into the group; memory it holds already stays charged elsewhere."""
        (self._level.folder / "cgroup.procs").write_text(str(process_id))

    def anonymous_bytes(self) -> int:
        """Anonymous memory of the group now; also keeps the peak."""
        name = "total_rss" if self._level.version == 1 else "anon"
        now = self._level.read_table("memory.stat").get(name, 0)
        self._peak_anonymous_bytes = max(self._peak_anonymous_bytes, now)
        return now

    def page_cache_bytes(self) -> int:
        """File pages charged to the group now, without shared memory."""
        cache, shared = ("total_cache", "total_shmem") if self._level.version == 1 else ("file", "shmem")
        table = self._level.read_table("memory.stat")
        return max(0, table.get(cache, 0) - table.get(shared, 0))

    @property
    def peak_anonymous_bytes(self) -> int:
        """The largest figure that :meth:`anonymous_bytes` has seen."""
        return self._peak_anonymous_bytes

    def wait(self, process: subprocess.Popen[bytes], *, timeout_seconds: float) -> int:
        """Wait for a child while sampling its anonymous memory.

        Args:
            process: a child started with :meth:`command`; read its output from files, pipes are not emptied here.
            timeout_seconds: how long to wait.

        Returns:
            Its exit status.

        Raises:
            subprocess.TimeoutExpired: it did not end in time; it is still running.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            self.anonymous_bytes()
            try:
                return process.wait(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise

    def max_usage_bytes(self) -> int | None:
        """Most memory ever charged to the group, page cache included; ``None`` where the kernel does not keep it."""
        return self._level.read_int("memory.max_usage_in_bytes" if self._level.version == 1 else "memory.peak")

    def oom_kills(self) -> int:
        """How many processes of the group the kernel has killed for want of memory."""
        file = "memory.oom_control" if self._level.version == 1 else "memory.events"
        return self._level.read_table(file).get("oom_kill", 0)


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Make a memory control group for the duration of a ``with`` block; what still runs in it at the end is killed.

    Args:
        limit_bytes: the hard limit. Swap is forbidden where the kernel accounts for it.

    Yields:
        The group, still empty.

    Raises:
        CgroupUnavailable: there is no such controller, or this user may not use it.
    """
    if sys.platform != "linux":
        raise CgroupUnavailable(f"control groups need Linux, this is {sys.platform}")
    try:
        group = make_group("weightlift")
    except GroupUnavailable as err:
        raise CgroupUnavailable(str(err)) from err
    try:
        try:
            group.limit(limit_bytes, swap_bytes=0)
        except GroupUnavailable as err:
            raise CgroupUnavailable(str(err)) from err
        yield MemoryCgroup(group.level, limit_bytes)
    finally:
        group.remove()
