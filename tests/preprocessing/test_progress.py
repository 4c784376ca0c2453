"""Progress tells what all ranks did and how long the rest takes, and not too often."""

import logging
import subprocess
from collections.abc import Callable

import pytest

from preprocessing import progress
from preprocessing.parallel import SerialDealer, Tasks
from preprocessing.progress import Progress

Run = Callable[..., "subprocess.CompletedProcess[str]"]


class Clock:
    """Stands for `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    caplog.set_level(logging.INFO)
    return clock


def work(clock: Clock, shown: Progress, seconds: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        shown.add(1000, 2_000_000)


@pytest.mark.parametrize(("terminal", "lines"), [(True, 25), (False, 2)])
def test_a_line_every_so_often(
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    lines: int,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    shown = Progress(Tasks(SerialDealer(), 5, 0), "map", 10**9)
    work(clock, shown, 125)
    assert len(caplog.messages) == lines
    assert caplog.messages[-1].endswith("1,000 records/s, 2 MB/s, " + (
        "6 min 15 s left" if terminal else "6 min 20 s left"
    ))  # fmt: skip


def test_other_ranks_add_to_the_totals_but_say_nothing(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    dealer = SerialDealer()
    first, second = (Progress(Tasks(dealer, 4, rank), "reduce") for rank in (0, 1))
    work(clock, second, 59)
    assert caplog.messages == []
    work(clock, first, 1)
    assert caplog.messages == ["reduce: 0 %, 60,000 records, 1,000 records/s, 2 MB/s, just begun"]


ALL_RANKS = """
from preprocessing.parallel import connect, share_out
ranks = connect(2)

def work(tasks):
    for task in tasks:
        tasks.dealer.share(3, 10)
    ranks.barrier()
    return tasks.dealer.totals()

assert share_out(ranks, 50, work) == [(150, 500)] * 2
"""


def test_totals_are_those_of_all_ranks(mpirun: Run) -> None:
    result = mpirun(2, "-c", ALL_RANKS)
    assert result.returncode == 0, result.stderr
