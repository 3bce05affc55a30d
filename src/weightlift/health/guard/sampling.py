"""Looking at the command: its memory now and then, its mappings and files more rarely.

Owns nothing but what it has seen. A look into mappings makes the kernel walk page tables, so it is taken only as often
as costs a twentieth of the time.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from weightlift.health.guard.consumed import FILE_BYTES_MIN, Seen, SeenFile, most_read, see
from weightlift.health.guard.culprits import growths, page_growths
from weightlift.health.guard.facts import Sample
from weightlift.host.groups import ROOT, available_memory
from weightlift.host.mappings import Mappings, joined, mappings_of
from weightlift.host.memory import pressure_stall_seconds
from weightlift.host.processes import ProcessUse, descendants, open_descriptors, process_use

if TYPE_CHECKING:
    from pathlib import Path

    from weightlift.health.guard.culprits import Growth
    from weightlift.health.guard.launch import Scope
    from weightlift.host.groups import Available, GroupUse

_MAPPINGS_SECONDS_MIN: Final = 1.0
_FILES_SECONDS_MIN: Final = 0.1
_LOOK_COST_SHARE: Final = 20
_TREE_SECONDS: Final = 0.5
_NEVER: Final = float("-inf")


@dataclass(slots=True)
class _Remembered:
    """What was seen: ``mappings`` of the last look that found any, ``mapped`` of the last look."""

    mappings: Mappings = field(default_factory=dict)
    earlier: Mappings = field(default_factory=dict)
    mapped: Mappings = field(default_factory=dict)
    mappings_due: float = _NEVER
    files: Seen = field(default_factory=dict)
    files_before: Seen = field(default_factory=dict)
    files_due: float = _NEVER
    tree: list[int] = field(default_factory=list)
    tree_at: float = _NEVER


class Sampler:
    """Takes samples of one command.

    Args:
        process_id: the command.
        scope: what holds it together.
        root: root of the file system to read.
    """

    def __init__(self, process_id: int, scope: Scope, root: Path = ROOT) -> None:
        self._process_id = process_id
        self._scope = scope
        self._root = root
        self._started = time.monotonic()
        self._seen = _Remembered()
        self.peak_lasting_bytes = 0

    @property
    def seconds(self) -> float:
        """Since the command was started."""
        return time.monotonic() - self._started

    def process_ids(self, *, afresh: bool = False) -> list[int]:
        """The command's processes.

        Args:
            afresh: look for children born since the last half second, too.
        """
        if self._scope.group is not None:
            return self._scope.group.process_ids()
        now = self.seconds
        if afresh or now - self._seen.tree_at >= _TREE_SECONDS:
            # Orphans of the command are adopted by this process, so they are found here and not below the command.
            own = os.getpid()
            self._seen.tree = [one for one in descendants((own,), self._root) if one != own]
            self._seen.tree_at = now
        return self._seen.tree

    def sample(self) -> Sample | None:
        """What is known now; ``None`` if the machine does not tell, or the group is gone."""
        machine = available_memory(self._root)
        use = self._scope.group.use() if self._scope.group is not None else None
        if machine is None or (use is None and self._scope.group is not None):
            return None
        sample = self._of_group(use, machine) if use is not None else self._of_tree(machine)
        self.peak_lasting_bytes = max(self.peak_lasting_bytes, sample.lasting_bytes)
        return sample

    def _of_group(self, use: GroupUse, machine: Available) -> Sample:
        others = None
        if use.stalled_seconds is not None:
            stalled = pressure_stall_seconds(self._root)
            # Somebody waited on the machine while nobody in the group did: that was another program.
            others = None if stalled is None else max(0.0, stalled - use.stalled_seconds)
        return Sample(
            seconds=self.seconds,
            anonymous_bytes=use.anonymous_bytes,
            file_bytes=use.file_bytes,
            shared_bytes=use.shared_bytes,
            swapped_bytes=use.swapped_bytes,
            ceiling_bytes=self._scope.ceiling_bytes,
            charged_bytes=use.charged_bytes,
            available_bytes=machine.available_bytes,
            free_bytes=machine.free_bytes,
            swap_free_bytes=machine.swap_free_bytes,
            others_stalled_seconds=others,
            held=use.held,
            kills=use.kills,
        )

    def _of_tree(self, machine: Available) -> Sample:
        use = sum(
            (found for one in self.process_ids() if (found := process_use(one, self._root)) is not None), ProcessUse()
        )
        return Sample(
            seconds=self.seconds,
            anonymous_bytes=use.anonymous_bytes,
            file_bytes=use.file_bytes,
            shared_bytes=use.shared_bytes,
            swapped_bytes=use.swapped_bytes,
            ceiling_bytes=None,
            charged_bytes=None,
            available_bytes=machine.available_bytes,
            free_bytes=machine.free_bytes,
            swap_free_bytes=machine.swap_free_bytes,
        )

    def look(self, *, at_once: bool = False) -> None:
        """Look into mappings and open files, unless that was done a moment ago.

        Args:
            at_once: look in any case.
        """
        seen, now = self._seen, self.seconds
        if at_once or now >= seen.mappings_due:
            found = [
                one for process_id in self.process_ids(afresh=True) if (one := mappings_of(process_id, self._root))
            ]
            if found:
                seen.earlier, seen.mappings = seen.mappings, joined(found)
            seen.mapped = joined(found)
            seen.mappings_due = self._due(now, _MAPPINGS_SECONDS_MIN)
        if at_once or now >= seen.files_due:
            begin = self.seconds
            descriptors = [
                entry for one in self.process_ids() for entry in open_descriptors(one, FILE_BYTES_MIN, self._root)
            ]
            seen.files_before, seen.files = seen.files, see(seen.files, descriptors, seen.mapped)
            seen.files_due = self._due(begin, _FILES_SECONDS_MIN)

    def _due(self, begin: float, seconds_min: float) -> float:
        """When something that was begun then may be done again."""
        return self.seconds + max(seconds_min, _LOOK_COST_SHARE * (self.seconds - begin))

    @property
    def files(self) -> Seen:
        """The command's large files, as of the last look."""
        return self._seen.files

    def grown(self) -> list[Growth]:
        """What grew since the start, most first; of a command that has ended, as of the last look."""
        return growths(self._seen.mappings, {})

    def growing(self) -> list[Growth]:
        """What grew between the last two looks, most first."""
        return growths(self._seen.mappings, self._seen.earlier)

    def file_activity(self) -> tuple[Growth | None, SeenFile | None]:
        """Between the last two looks: the mapped file that most came into memory of, and the one most was read of."""
        mapped = page_growths(self._seen.mappings, self._seen.earlier)
        return (mapped[0] if mapped else None), most_read(self._seen.files, self._seen.files_before)
