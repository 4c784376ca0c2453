"""Signals that ask a run to save and end."""

import signal
from types import FrameType

REQUEUE_EXIT_CODE = 85
"""Exit code that asks the scheduler to run the job again."""


class StopSignals:
    """Remembers a warning signal; the trainer looks at it at step boundaries.

    SIGUSR2 is what LSF sends at the run limit and what a Slurm script asks for; SIGTERM is what
    both send before they kill. Python runs handlers between instructions, so a step ends whole.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
