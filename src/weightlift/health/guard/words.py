"""What the guard says to people: lines and the last word. Pure functions; text from outside is made harmless here."""

from __future__ import annotations

import shlex
import signal
from typing import TYPE_CHECKING, Final

from weightlift.errors import printable
from weightlift.health.guard.culprits import advice, describe, describe_pages
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightlift.health.guard.consumed import SeenFile
    from weightlift.health.guard.culprits import Growth
    from weightlift.health.guard.facts import Sample
    from weightlift.health.guard.judge import Verdict

NAME: Final = "weightlift guard"
_COMMAND_CHARACTERS: Final = 120
_PATH_CHARACTERS: Final = 200
_NAMED: Final = 3
_WORTH_NAMING_SHARE: Final = 0.05
_BAR_CELLS: Final = 24

READONLY_WARNING: Final = (
    "--readonly-mappings: checkpoints that torch maps are read-only for this command; if it changes such a tensor in "
    "place on the CPU, it crashes (segmentation fault)"
)
_READONLY_CRASH: Final = (
    "hint: with --readonly-mappings a segmentation fault most likely means that the program changed a mapped tensor in "
    "place; run it without the option, or have it copy the tensors first (tensor.clone())"
)


def shown_command(command: Sequence[str]) -> str:
    """A command line fit for a message."""
    return printable(shlex.join(command), _COMMAND_CHARACTERS)


def opening(command: Sequence[str], scope: str, limit_bytes: int | None, reserve_bytes: int) -> str:
    """What is watched, and within which bounds."""
    bound = f"at most {format_bytes(limit_bytes)}, and " if limit_bytes is not None else ""
    return (
        f"{NAME}: {shown_command(command)} in a {scope}; {bound}{format_bytes(reserve_bytes)} kept for everything else"
    )


def last_word(what: str, verdict: Verdict, sample: Sample, growths: Sequence[Growth]) -> list[str]:
    """Why the command was frozen or stopped, because of which mappings, and what would help.

    Args:
        what: what was done, as ``stopped python load.py (process 17)``.
        verdict: the decision.
        sample: the figures behind it.
        growths: what grew since the start, most first.
    """
    return [f"{NAME}: {what} after {sample.seconds:.1f} s: {verdict.reason}", *culprit_lines(growths)]


def culprit_lines(growths: Sequence[Growth]) -> list[str]:
    """What grew, most first, and advice about the first."""
    worth = growths[0].grown_bytes * _WORTH_NAMING_SHARE if growths else 0
    lines = [f"  {describe(growth)}" for growth in growths[:_NAMED] if growth.grown_bytes >= worth]
    if not lines:
        return ["  what grew is unknown: its processes may not be looked into, or ended too soon"]
    return [*lines, f"hint: {advice(growths[0])}"]


def ending(seconds: float, exit_code: int, peak_bytes: int, growths: Sequence[Growth], *, readonly: bool) -> list[str]:
    """How the command ended, and what it needed."""
    grew = f"; most of it: {describe(growths[0])}" if growths else ""
    lines = [
        (
            f"{NAME}: the command ended after {seconds:.1f} s {_how(exit_code)}; at most "
            f"{format_bytes(peak_bytes)} of lasting memory{grew}"
        )
    ]
    return [*lines, _READONLY_CRASH] if readonly and exit_code == 128 + signal.SIGSEGV else lines


def _how(exit_code: int) -> str:
    if exit_code <= 128:
        return f"with code {exit_code}"
    try:
        return f"by {signal.Signals(exit_code - 128).name}"
    except ValueError:
        return f"with code {exit_code}"


def kernel_killed(kills: int, limit_bytes: int | None) -> str:
    """The kernel was faster."""
    limit = f"its limit of {format_bytes(limit_bytes)}" if limit_bytes is not None else "the limit of its group"
    return f"{NAME}: the kernel killed {kills} of the command's own processes at {limit}; nothing else was killed"


def growing_line(growing: Growth | None, mapped: Growth | None, read: SeenFile | None) -> str:
    """What grows now: lasting memory before pages of files, which the kernel can drop.

    Args:
        growing: the mapping that took most lasting memory.
        mapped: the mapped file of which most came into memory.
        read: the file of which most was read.
    """
    if growing is not None:
        return f"growing: {describe(growing)}"
    if mapped is not None:
        return f"page cache: {describe_pages(mapped)}"
    if read is not None:
        done, path = max(read.positions, default=0), printable(read.path, _PATH_CHARACTERS)
        return f"page cache: {path}, read up to {format_bytes(done)} of {format_bytes(read.size_bytes)}"
    return "growing: nothing to speak of"


def status_lines(
    command: Sequence[str],
    sample: Sample,
    verdict: Verdict,
    growing: str,
    *,
    phase: str,
    pressure: float | None,
) -> list[str]:
    """Four lines that show how things stand now."""
    scope = sample.ceiling_bytes or sample.lasting_bytes + max(0, verdict.room_bytes)
    filled = min(_BAR_CELLS, round(_BAR_CELLS * sample.lasting_bytes / scope)) if scope else 0
    grows = f" +{format_bytes(int(verdict.growth))}/s" if verdict.growth >= 1 << 20 else ""
    waits = "unknown" if pressure is None else f"{pressure:.0%}"
    return [
        f"── {NAME} ── {phase} ── {sample.seconds:.0f} s ── {shown_command(command)}",
        (
            f"anonymous {format_bytes(sample.anonymous_bytes)}{grows}  file {format_bytes(sample.file_bytes)}  "
            f"shared {format_bytes(sample.shared_bytes)}  swap {format_bytes(sample.swapped_bytes)}  pressure {waits}"
        ),
        (
            f"[{'█' * filled}{'·' * (_BAR_CELLS - filled)}] room for {format_bytes(max(0, verdict.room_bytes))}; the "
            f"machine has {format_bytes(sample.available_bytes)}"
        ),
        growing,
    ]
