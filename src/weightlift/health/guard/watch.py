"""The watch over one command: samples, asks the judge, acts, and ends with the command's exit code.

The thin part: it decides nothing. It has one thread, and sleeps in one place, waiting for signals.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from weightlift.health.guard import words
from weightlift.health.guard.consumed import droppable
from weightlift.health.guard.judge import Action, Phase, State, judge, next_look_seconds
from weightlift.health.guard.sampling import Sampler
from weightlift.host import kernel, residency, sweeping
from weightlift.host.groups import ROOT
from weightlift.host.memory import pressure_stall_seconds
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weightlift.health.guard.consumed import SeenFile
    from weightlift.health.guard.facts import Policy, Sample
    from weightlift.health.guard.judge import Verdict
    from weightlift.health.guard.launch import Scope
    from weightlift.health.guard.voice import Display, JsonLines

SIGNALS: Final = frozenset(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGCHLD") if hasattr(signal, name)
)
"""What the watch waits for; to be blocked before the command is started."""

_SENT_BY_KERNEL: Final = 0x80
_SHOW_SECONDS: Final = 0.5
_LOG_SECONDS: Final = 1.0
_STOP_ROUNDS: Final = 5
_NEVER: Final = float("-inf")


class Watch:
    """Watches a running command until it has ended.

    Args:
        process_id: the command, a child of this process.
        command: its command line, for messages.
        scope: what holds it together.
        policy: the rules.
        display: where people look.
        log: where events go.
        readonly: mapped checkpoints were made read-only.
        root: root of the file system to read.
    """

    def __init__(
        self,
        process_id: int,
        command: Sequence[str],
        scope: Scope,
        policy: Policy,
        *,
        display: Display,
        log: JsonLines,
        readonly: bool = False,
        root: Path = ROOT,
    ) -> None:
        self._process_id = process_id
        self._command = command
        self._scope = scope
        self._policy = policy
        self._display = display
        self._log = log
        self._readonly = readonly
        self._root = root
        self._sampler = Sampler(process_id, scope, root)
        self._state = State()
        self._exit_code: int | None = None
        self._stopped = False
        self._kills = 0
        self._shown_at = self._logged_at = _NEVER
        self._pressure: tuple[float, float] | None = None

    def run(self) -> int:
        """Watch until the command has ended, and leave nothing behind.

        Returns:
            Its exit code, or 128 and the number of the signal that ended it.
        """
        try:
            pause = 0.0
            while True:
                self._wait(pause)
                self._reap()
                if self._exit_code is not None:
                    break
                pause = self._round()
        finally:
            self._leave()
        self._report_end()
        return self._exit_code

    def _wait(self, seconds: float) -> None:
        got = signal.sigtimedwait(SIGNALS, seconds)
        if got is None or got.si_signo == signal.SIGCHLD:
            return
        if self._state.phase is Phase.FROZEN:
            # A frozen command cannot answer; whoever interrupts it wants it to end.
            self._kill()
        elif got.si_code != _SENT_BY_KERNEL:
            # What the terminal sends, it has sent to the command as well.
            self._signal(got.si_signo, (self._process_id,))

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                process_id, status = os.waitpid(-1, os.WNOHANG)
                if not process_id:
                    return
                if process_id == self._process_id:
                    code = os.waitstatus_to_exitcode(status)
                    self._exit_code = code if code >= 0 else 128 - code

    def _round(self) -> float:
        """Sample, judge, act; returns how long may be slept."""
        sample = self._sampler.sample()
        if sample is None:
            return next_look_seconds(0)
        self._state, verdict = judge(self._state, sample, self._policy)
        if verdict.action is not Action.NOTHING:
            self._act(verdict, sample)
        if sample.kills > self._kills:
            self._kills = sample.kills
            self._display.say([words.kernel_killed(self._kills, self._scope.limit_bytes)])
        self._tell(verdict, sample)
        return 0.0 if verdict.action is Action.FREEZE else next_look_seconds(verdict.room_bytes, self._state.phase)

    def _act(self, verdict: Verdict, sample: Sample) -> None:
        dropped = 0
        if verdict.action in {Action.DROP_CONSUMED, Action.DROP_ALL}:
            dropped = self._drop(everything=verdict.action is Action.DROP_ALL)
        elif verdict.action is Action.FREEZE:
            self._freeze()
            self._sampler.look(at_once=True)
        elif verdict.action is Action.RESUME:
            self._resume()
        elif verdict.action is Action.STOP:
            self._stop()
        elif verdict.action is Action.KILL:
            self._kill()
        self._say_action(verdict, sample, dropped)

    def _say_action(self, verdict: Verdict, sample: Sample, dropped: int) -> None:
        action, grown = verdict.action, self._sampler.grown()
        if action in {Action.DROP_CONSUMED, Action.DROP_ALL} and not dropped:
            return
        self._log.write(
            "action",
            seconds=sample.seconds,
            action=action.value,
            reason=verdict.reason,
            room_bytes=verdict.room_bytes,
            dropped_bytes=dropped,
            growths=[growth.to_json() for growth in grown[:5]] if action is Action.FREEZE else [],
        )
        name = f"{words.shown_command(self._command)} (process {self._process_id})"
        if action is Action.FREEZE:
            self._display.say(words.last_word(f"froze {name}", verdict, sample, grown))
        elif dropped:
            self._display.say([f"{words.NAME}: dropped {format_bytes(dropped)} of its page cache: {verdict.reason}"])
        else:
            done = {Action.RESUME: "lets it run on", Action.STOP: "stops it", Action.KILL: "kills it"}[action]
            self._display.say([f"{words.NAME}: {done}: {verdict.reason}"])

    def _drop(self, *, everything: bool) -> int:
        self._sampler.look(at_once=everything)
        return sum(
            _drop_file(file, *part)
            for file in self._sampler.files.values()
            if (part := droppable(file, everything=everything)) is not None
        )

    def _freeze(self) -> None:
        group = self._scope.group
        if group is not None and group.freeze(frozen=True):
            return
        stopped: set[int] = set()
        for _ in range(_STOP_ROUNDS):
            # A process that is not stopped yet may have had a child in the meantime.
            fresh = set(self._sampler.process_ids(afresh=True)) - stopped
            if not fresh:
                return
            self._signal(signal.SIGSTOP, sorted(fresh))
            stopped |= fresh

    def _resume(self) -> None:
        group = self._scope.group
        if group is None or not group.freeze(frozen=False):
            self._signal(signal.SIGCONT, self._sampler.process_ids(afresh=True))

    def _stop(self) -> None:
        self._stopped = True
        group = self._scope.group
        if group is not None and self._scope.limit_bytes is not None:
            # Asleep at its limit a program could not even end.
            group.raise_limit(self._scope.limit_bytes + self._policy.reserve_bytes // 2)
        self._signal(signal.SIGTERM, self._sampler.process_ids(afresh=True))
        self._resume()

    def _kill(self) -> None:
        self._stopped = True
        group = self._scope.group
        if group is not None:
            group.kill()
            group.freeze(frozen=False)
        self._signal(signal.SIGKILL, self._sampler.process_ids(afresh=True))

    @staticmethod
    def _signal(number: int, process_ids: Sequence[int]) -> None:
        for process_id in process_ids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process_id, number)

    def _tell(self, verdict: Verdict, sample: Sample) -> None:
        """Show and log how things stand, now and then."""
        if self._state.phase is Phase.RUNNING:
            self._sampler.look()
        growing = self._sampler.growing()
        mapped, read = self._sampler.file_activity()
        if sample.seconds - self._logged_at >= _LOG_SECONDS:
            self._logged_at = sample.seconds
            fields = asdict(sample) | {"lasting_bytes": sample.lasting_bytes}
            self._log.write(
                "sample",
                phase=self._state.phase.value,
                room_bytes=verdict.room_bytes,
                growth_bytes_per_second=round(verdict.growth),
                **fields,
                growing=[growth.to_json() for growth in growing[:3]],
                paging=mapped.to_json() if mapped else None,
                reading=asdict(read) if read else None,
            )
        if sample.seconds - self._shown_at >= _SHOW_SECONDS:
            pressure = self._pressure_share(sample.seconds)
            self._shown_at = sample.seconds
            self._display.show(
                words.status_lines(
                    self._command,
                    sample,
                    verdict,
                    words.growing_line(growing[0] if growing else None, mapped, read),
                    phase=self._state.phase.value,
                    pressure=pressure,
                )
            )

    def _pressure_share(self, seconds: float) -> float | None:
        stalled = pressure_stall_seconds(self._root)
        if stalled is None:
            return None
        before, self._pressure = self._pressure, (seconds, stalled)
        if before is None or seconds <= before[0]:
            return 0.0
        return min(1.0, (stalled - before[1]) / (seconds - before[0]))

    def _leave(self) -> None:
        """Undo what was done to the command's processes that live on; after a stop none may."""
        group = self._scope.group
        if self._stopped:
            self._kill()
        elif self._state.phase is Phase.FROZEN:
            self._resume()
        self._display.close()
        if group is None or self._scope.unit:
            return
        group.sleep_at_limit(enabled=False)
        self._kills = max(self._kills, used.kills if (used := group.use()) else 0)
        if self._stopped:
            group.remove()
        elif left := group.release():
            self._display.say([f"{words.NAME}: {len(left)} processes of the command live on, no longer watched"])

    def _report_end(self) -> None:
        assert self._exit_code is not None
        grown, peak, seconds = self._sampler.grown(), self._sampler.peak_lasting_bytes, self._sampler.seconds
        self._display.say(words.ending(seconds, self._exit_code, peak, grown, readonly=self._readonly))
        self._log.write(
            "end",
            seconds=seconds,
            exit_code=self._exit_code,
            stopped=self._stopped,
            kills=self._kills,
            peak_lasting_bytes=peak,
            growths=[growth.to_json() for growth in grown[:5]],
        )


def _drop_file(file: SeenFile, offset: int, length: int) -> int:
    """Drop a part of a file from the page cache, if it is still that file; returns the bytes that went."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        status = os.fstat(descriptor)
        # Of a file that this user does not own nothing is known, and others may use it.
        if status.st_ino != file.inode or not residency.may_see_residency(descriptor):
            return 0
        part = [(offset, length or status.st_size)]
        before = residency.cached_in(descriptor, part)
        sweeping.sweep(descriptor, part)
        after = residency.cached_in(descriptor, part)
        return 0 if before is None or after is None else max(0, before - after)
    except OSError:
        # A file system that fails must not end the watch.
        return 0
    finally:
        kernel.close_quickly(descriptor)
