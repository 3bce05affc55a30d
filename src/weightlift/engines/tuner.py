"""Finds concurrency and chunk size while loading: pure arithmetic on observed throughput, no clock and no threads.

A hill climb over two numbers. From a sensible start it tries one change at a time for one window of bytes, keeps it if
throughput grew clearly, takes it back otherwise, and rests for a while once no change helps. Windows are long enough
that one late chunk cannot decide, what was there is known by the faster of two of them, so that a moment in which the
machine stood still decides neither, and the rest grows, so that a settled load is hardly disturbed. A trial that turns
out badly costs up to three windows, one of more workers less, since what was there goes on beside them; none is begun
that could not be earned back in the rest of the load: short loads keep the start they were given.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from weightlift.units import KIB, PAGE_BYTES, align_down

_WINDOW_SECONDS: Final = 0.03
_WINDOW_CHUNKS_PER_WORKER: Final = 4
_CLEAR_GAIN: Final = 1.08
_TRIAL_SECONDS: Final = 3 * _WINDOW_SECONDS
_TRIAL_SHARE_MAX: Final = 0.04
_REST_WINDOWS_FIRST: Final = 16
_REST_WINDOWS_MAX: Final = 512
_CHUNK_BYTES_MIN: Final = 256 * KIB


class Setting(NamedTuple):
    """How many workers claim, and chunks of which size."""

    workers: int
    chunk_bytes: int


class Tuner:
    """Climbs towards the setting with the highest throughput.

    Args:
        start: where to begin.
        workers_max: most workers.
        chunk_bytes_max: largest chunk.
        fixed_workers: never change the number of workers.
        fixed_chunk: never change the chunk size.
        total_bytes: how much there is to load; ``None`` where unknown.
    """

    def __init__(
        self,
        start: Setting,
        *,
        workers_max: int,
        chunk_bytes_max: int,
        fixed_workers: bool = False,
        fixed_chunk: bool = False,
        total_bytes: int | None = None,
    ) -> None:
        self.setting = start
        self._total_bytes = total_bytes
        self._workers_max = workers_max
        self._chunk_bytes_max = chunk_bytes_max
        self._fixed_workers = fixed_workers
        self._fixed_chunk = fixed_chunk
        self._window_start = (0.0, 0)
        self._settling = True
        self._best_rate = 0.0
        self._last_rate: float | None = None
        self._before: Setting | None = None
        self._untried = self._moves()
        self._rest = 0
        self._next_rest = _REST_WINDOWS_FIRST

    def observe(self, seconds: float, landed_bytes: int) -> Setting | None:
        """Tell how far the load is; returns a setting to change to, or ``None``.

        Args:
            seconds: time since the start, by any monotonic clock.
            landed_bytes: bytes landed since the start.
        """
        since, landed = self._window_start
        elapsed, moved = seconds - since, landed_bytes - landed
        chunks = self.setting.workers * _WINDOW_CHUNKS_PER_WORKER
        if elapsed < _WINDOW_SECONDS or moved < chunks * self.setting.chunk_bytes:
            return None
        self._window_start = (seconds, landed_bytes)
        if self._settling:
            # Chunks of the setting before were still under way in this window.
            self._settling = False
            return None
        return self._judge(moved / elapsed, landed_bytes)

    def _judge(self, rate: float, landed_bytes: int) -> Setting | None:
        if self._before is not None:
            before, self._before = self._before, None
            if rate > self._best_rate * _CLEAR_GAIN:
                self._best_rate = self._last_rate = rate
                self._untried = self._moves()
                self._next_rest = _REST_WINDOWS_FIRST
            else:
                self._last_rate = self._best_rate
                return self._change(before)
        else:
            # The faster of two windows: next to one in which the machine stood still, anything would look better.
            last, self._last_rate = self._last_rate, rate
            if last is None:
                return None
            self._best_rate = max(rate, last)
            if self._rest:
                self._rest -= 1
                return None
        left = None if self._total_bytes is None else (self._total_bytes - landed_bytes) / self._best_rate
        return self._try_next(left)

    def _pays(self, candidate: Setting, seconds_left: float | None) -> bool:
        """Whether enough of the load is left for a trial to be worth its risk."""
        more = candidate.workers > self.setting.workers
        cost = 2 * _WINDOW_SECONDS if more else _TRIAL_SECONDS
        return seconds_left is None or _TRIAL_SHARE_MAX * seconds_left > cost

    def _try_next(self, seconds_left: float | None) -> Setting | None:
        while self._untried:
            candidate = self._untried.pop(0)
            if candidate != self.setting and self._pays(candidate, seconds_left):
                self._before = self.setting
                return self._change(candidate)
        self._rest = self._next_rest
        self._next_rest = min(2 * self._next_rest, _REST_WINDOWS_MAX)
        self._untried = self._moves()
        return None

    def _change(self, setting: Setting) -> Setting:
        self.setting = setting
        self._settling = True
        return setting

    def _moves(self) -> list[Setting]:
        workers, chunk = self.setting
        moves: list[Setting] = []
        if not self._fixed_workers:
            moves.append(Setting(min(2 * workers, self._workers_max), chunk))
        if not self._fixed_chunk:
            moves.append(Setting(workers, min(2 * chunk, self._chunk_bytes_max)))
        if not self._fixed_workers:
            moves.append(Setting(max(1, workers // 2), chunk))
        if not self._fixed_chunk:
            moves.append(Setting(workers, min(chunk, max(_CHUNK_BYTES_MIN, align_down(chunk // 2, PAGE_BYTES)))))
        return moves
