"""Ranks share out every task once, and fail together."""

import subprocess
from collections.abc import Callable, Iterator

import pytest

from preprocessing.errors import InputError
from preprocessing.parallel import Serial, connect, on_first_rank, share_out

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_one_rank_does_all_tasks_in_order() -> None:
    assert share_out(Serial(), 5, list) == [[0, 1, 2, 3, 4]]
    assert share_out(Serial(), 0, list) == [[]]


def test_user_error_of_a_task_is_raised() -> None:
    def work(tasks: Iterator[int]) -> None:
        for task in tasks:
            if task == 3:
                raise InputError("task 3")

    with pytest.raises(InputError, match="task 3"):
        share_out(Serial(), 5, work)


def test_full_disk_is_the_users_error_and_a_bug_keeps_its_type() -> None:
    def full(tasks: Iterator[int]) -> None:
        raise OSError(28, "No space left on device", "/data/out")

    def bug(tasks: Iterator[int]) -> None:
        raise ZeroDivisionError

    with pytest.raises(InputError, match=r"/data/out: No space left on device"):
        share_out(Serial(), 1, full)
    with pytest.raises(ZeroDivisionError):
        share_out(Serial(), 1, bug)
    with pytest.raises(ZeroDivisionError):
        on_first_rank(Serial(), lambda: 1 // 0)


def test_one_process_needs_no_mpi() -> None:
    assert connect(1).size == 1


SHARE = """
import sys, time
from preprocessing.errors import InputError
from preprocessing.parallel import connect, on_first_rank, share_out
ranks = connect(3)
assert on_first_rank(ranks, lambda: ranks.rank) == 0

def work(tasks):
    done = []
    for task in tasks:
        time.sleep(0.2 if task == 0 else 0.001)  # whoever gets task 0 gets no other
        done.append(task)
    return done

shares = share_out(ranks, 60, work)
assert sorted(task for share in shares for task in share) == list(range(60)), shares
assert len(next(share for share in shares if 0 in share)) < 20, shares

def failing(tasks):
    for task in tasks:
        if task in (7, 8):  # the third rank has to stop
            time.sleep(0.1 * (10 - task))  # the lowest is the last to fail
            raise InputError(f"task {task} is wrong")
        time.sleep(0.001)

for attempt in range(2):
    try:
        share_out(ranks, 10**6, failing)
    except InputError as error:
        print(f"attempt {attempt}: {error}\\n", end="", flush=True)

def crashing(tasks):
    if ranks.rank == 1:
        raise ZeroDivisionError("oops")

try:
    share_out(ranks, 3, crashing)
except Exception as error:
    print(f"{type(error).__name__}: {error}\\n", end="", flush=True)
"""


def test_ranks_share_tasks_by_speed_and_fail_together(mpirun: Run) -> None:
    result = mpirun(3, "-c", SHARE)
    assert result.returncode == 0, result.stderr
    lines = sorted(result.stdout.splitlines())
    assert lines == [
        "RuntimeError: rank 1 failed: ZeroDivisionError: oops",
        "RuntimeError: rank 1 failed: ZeroDivisionError: oops",
        "ZeroDivisionError: oops",
        *["attempt 0: task 7 is wrong"] * 3,
        *["attempt 1: task 7 is wrong"] * 3,
    ]


SHARE_WITHOUT_RMA = """
import logging, time
from mpi4py import MPI
from preprocessing.errors import InputError
from preprocessing.parallel import connect, share_out
{break_it}
logging.basicConfig(format="%(message)s")
ranks = connect(3)
shares = share_out(ranks, 61, list)
assert shares == [list(range(rank, 61, 3)) for rank in range(3)], shares

def failing(tasks):
    for task in tasks:
        if task in (100, 101):
            time.sleep(0.2 if task == 100 else 0)  # the lowest is the last to fail
            raise InputError(f"task {{task}} is wrong")
        time.sleep(0.001)

for attempt in range(3):
    try:
        share_out(ranks, 10**6, failing)
    except InputError as error:
        print(f"attempt {{attempt}}: {{error}}\\n", end="", flush=True)

def report(tasks):
    for task in tasks:
        tasks.dealer.share(1, 10)
    return tasks.dealer.totals()

assert share_out(ranks, 30, report)[0] == (30, 300)
"""

ALLOCATION_FAILS = """
class Win:
    @staticmethod
    def Allocate(*arguments, **keywords):
        raise MPI.Exception(MPI.ERR_WIN)

MPI.Win = Win
"""


@pytest.mark.parametrize(
    ("variable", "break_it", "reason"),
    [("1", "", "PROTHPC_NO_RMA is set"), ("", ALLOCATION_FAILS, "MPI_ERR_WIN")],
)
def test_tasks_are_shared_out_where_there_is_no_rma(
    mpirun: Run, variable: str, break_it: str, reason: str
) -> None:
    script = SHARE_WITHOUT_RMA.format(break_it=break_it)
    result = mpirun(3, "-c", script, env={"PROTHPC_NO_RMA": variable}, timeout=60)
    assert result.returncode == 0, result.stderr
    lines = sorted(result.stdout.splitlines())
    assert lines == [
        f"attempt {attempt}: task 100 is wrong" for attempt in (0, 1, 2) for _ in "012"
    ]
    assert result.stderr.count("one-sided communication is not used") == 1
    assert reason in result.stderr


def test_ranks_that_do_not_see_each_other_are_refused(mpirun: Run) -> None:
    script = """
from preprocessing.errors import InputError
from preprocessing.parallel import connect
try:
    connect(4)
except InputError as error:
    print(f"{error}\\n", end="")
"""
    result = mpirun(2, "-c", script)
    assert result.stdout.count("the launcher started 4 ranks, but MPI sees 2") == 2
    assert "srun --mpi=pmix" in result.stdout
