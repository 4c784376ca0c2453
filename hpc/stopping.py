"""What asks a run to save and end: a signal, or the clock. Imports nothing heavy, to be in time."""

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

from preprocessing.errors import InputError

REQUEUE_EXIT_CODE = 85
"""Exit code that asks the scheduler to run the job again."""

END_AT, LEAD = "PROTHPC_END_AT", "PROTHPC_LEAD"
"""Variables of job scripts: when the job will be ended, in seconds since 1970, and how many seconds
before that to save and end."""

SLURM_END = "SLURM_JOB_END_TIME"
"""Variable of newer Slurms: when the job will be ended."""

MARGIN_SECONDS = 60.0
"""What has to be left besides the time that a checkpoint takes."""

SIGNALS = ("USR2", "USR1")


class StopSignals:
    """Remembers a signal and watches the clock; the trainer looks at it at step boundaries.

    SIGUSR2 is what LSF sends at the run limit and what a Slurm script asks for; SIGTERM is what
    both send before they kill. Python runs handlers between instructions, so a step ends whole.

    Args:
        warning: name of the warning signal: USR2, or USR1.
        seconds: end so many seconds from now; None: before the job script's or Slurm's end.
        environ: where these two say so.

    Raises:
        InputError: no such signal, or no such time.
    """

    def __init__(
        self,
        *,
        warning: str = "USR2",
        seconds: float | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        if warning not in SIGNALS:
            raise InputError(f"--stop-signal {warning}: choose one of {', '.join(SIGNALS)}")
        self._received: str | None = None
        self._end, self._lead = _times(seconds, environ)
        for number in (signal.Signals[f"SIG{warning}"], signal.SIGTERM):
            signal.signal(number, self._remember)

    def reason(self, save_seconds: float) -> str | None:
        """Return why to save and end now, or None.

        Args:
            save_seconds: how long a checkpoint takes.
        """
        if self._received is not None:
            return self._received
        lead = max(self._lead, save_seconds + min(self._lead, MARGIN_SECONDS))
        if self._end is not None and time.time() >= self._end - lead:
            return "time is nearly up"
        return None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name


def _times(seconds: float | None, environ: Mapping[str, str]) -> tuple[float | None, float]:
    """Return when the time is up, as far as that is known, and how long before that to save."""
    if seconds is not None:
        return time.time() + seconds, 0.0
    if END_AT in environ:
        return _number(END_AT, environ), _number(LEAD, environ)
    if SLURM_END in environ:
        return _number(SLURM_END, environ), MARGIN_SECONDS
    return None, 0.0


def _number(name: str, environ: Mapping[str, str]) -> float:
    try:
        return float(environ.get(name, ""))
    except ValueError as error:
        raise InputError(f"{name}={environ.get(name)!r} is no number of seconds") from error
