"""How far a job is, for whoever watches it."""

from __future__ import annotations

import logging
import time

_log = logging.getLogger(__name__)

_LOG_SECONDS = 5.0


class Progress:
    """Logs how far the job is, on one rank, every few seconds."""

    def __init__(self, shown: bool, phase: str, tasks_name: str, tasks: int) -> None:
        self._shown = shown
        self._phase, self._tasks_name, self._tasks = phase, tasks_name, tasks
        self._handed_out = self._records = self._bytes = 0
        self._started = self._logged = time.monotonic()

    def handed_out(self, tasks: int) -> None:
        """Take note of how many tasks all ranks have taken."""
        self._handed_out = tasks

    def add(self, records: int, size: int) -> None:
        """Take note of what this rank has done, in records and bytes."""
        self._records += records
        self._bytes += size
        now = time.monotonic()
        if self._shown and now - self._logged >= _LOG_SECONDS:
            seconds = now - self._started
            _log.info(
                "%s: %d of %d %s taken; this rank: %s records, %s records/s, %.0f MB/s",
                self._phase, self._handed_out, self._tasks, self._tasks_name,
                f"{self._records:,}", f"{self._records / seconds:,.0f}",
                self._bytes / 1e6 / seconds,
            )  # fmt: skip
            self._logged = now
