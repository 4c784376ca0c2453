"""How far a job is, for whoever watches it."""

from __future__ import annotations

import logging
import sys
import time

from preprocessing.parallel import Tasks

_log = logging.getLogger(__name__)

_SHARE_SECONDS = 1.0
_TERMINAL_SECONDS, _FILE_SECONDS = 5.0, 60.0  # from line to line, where someone watches or not


class Progress:
    """Logs on rank 0, every few seconds, how far all ranks are."""

    def __init__(self, tasks: Tasks, phase: str, expected_bytes: int | None = None) -> None:
        """Begin.

        Args:
            tasks: of this rank.
            phase: what is done.
            expected_bytes: what all ranks have to do, about; None: all tasks are about equal.
        """
        self._tasks = tasks
        self._phase = phase
        self._expected_bytes = expected_bytes
        self._waiting = [0, 0]  # records and bytes that the other ranks do not know of
        self._started = self._shared = self._logged = time.monotonic()
        self._seconds = _TERMINAL_SECONDS if sys.stderr.isatty() else _FILE_SECONDS

    def add(self, records: int, size: int) -> None:
        """Take note of what this rank has done, in records and bytes."""
        self._waiting[0] += records
        self._waiting[1] += size
        now = time.monotonic()
        if now - self._shared < _SHARE_SECONDS:
            return
        self._tasks.dealer.share(*self._waiting)
        self._waiting, self._shared = [0, 0], now
        if self._tasks.rank == 0 and now - self._logged >= self._seconds:
            self._log(now - self._started)
            self._logged = now

    def _log(self, seconds: float) -> None:
        records, size = self._tasks.dealer.totals()
        share = self._tasks.current / self._tasks.count
        if self._expected_bytes is not None:
            share = min(size / self._expected_bytes, 1.0)
        left = f"{_duration(seconds / share - seconds)} left" if share else "just begun"
        _log.info(
            "%s: %.0f %%, %s records, %s records/s, %.0f MB/s, %s",
            self._phase, 100 * share, f"{records:,}", f"{records / seconds:,.0f}",
            size / 1e6 / seconds, left,
        )  # fmt: skip


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
