"""Ranks that share out numbered tasks: one process alone, or the processes of an MPI job.

mpi4py is imported only by `connect`, and only for more than one rank.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from preprocessing.errors import InputError

T = TypeVar("T")

_REST_SECONDS = 0.01

_STOP = 2**40
"""Added to a counter, it passes every number of tasks."""


class Serial:
    """The only rank of a job."""

    rank = 0
    size = 1

    def barrier(self) -> None:
        """Wait for all ranks."""

    def rest(self) -> None:
        """Wait for all ranks, and leave the processor to others."""

    def bcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return value

    def allgather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order, on every rank."""
        return [value]

    @contextmanager
    def counter(self) -> Iterator[SerialCounter]:
        """Open a counter that starts at 0 and is shared by all ranks (all must call this)."""
        yield SerialCounter()


class SerialCounter:
    """A shared counter of one rank."""

    def __init__(self) -> None:
        self._next = 0

    def add(self, amount: int) -> int:
        """Add to the counter and return what it was before."""
        before = self._next
        self._next += amount
        return before


class Mpi:
    """A rank among those of an MPI communicator (`mpi4py.MPI.Comm`)."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank: int = communicator.Get_rank()
        self.size: int = communicator.Get_size()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._communicator.Barrier()

    def rest(self) -> None:
        """Wait for all ranks, and leave the processor to others."""
        request = self._communicator.Ibarrier()
        while not request.Test():
            time.sleep(_REST_SECONDS)

    def bcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return self._communicator.bcast(value)

    def allgather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order, on every rank."""
        return self._communicator.allgather(value)

    @contextmanager
    def counter(self) -> Iterator[MpiCounter]:
        """Open a counter that starts at 0 and is shared by all ranks (all must call this)."""
        counter = MpiCounter(self._communicator)
        self.barrier()
        yield counter
        counter.close()


class MpiCounter:
    """A counter in the memory of rank 0 that others raise without disturbing it (MPI RMA)."""

    def __init__(self, communicator: Any) -> None:
        import numpy as np
        from mpi4py import MPI

        self._mpi = MPI
        here = communicator.Get_rank() == 0
        item = MPI.INT64_T.Get_size()
        self._window = MPI.Win.Allocate(item if here else 0, item, comm=communicator)
        self._amount = np.zeros(1, np.int64)
        self._before = np.zeros(1, np.int64)
        if here:
            self._window.Lock(0)
            self._window.Put(self._amount, 0)
            self._window.Unlock(0)

    def add(self, amount: int) -> int:
        """Add to the counter and return what it was before."""
        self._amount[0] = amount
        self._window.Lock(0, self._mpi.LOCK_SHARED)
        self._window.Fetch_and_op(self._amount, self._before, 0, 0, self._mpi.SUM)
        self._window.Unlock(0)
        return int(self._before[0])

    def close(self) -> None:
        """Free it (all ranks must call this)."""
        self._window.Free()


Ranks = Serial | Mpi
Counter = SerialCounter | MpiCounter


def connect(expected_size: int) -> Ranks:
    """Join the job.

    Args:
        expected_size: ranks that the launcher says it started.

    Raises:
        InputError: if MPI is missing, or finds another number of ranks than the launcher started:
            then every process would take itself for the only one.
    """
    if expected_size == 1:
        return Serial()
    # Open MPI's UCX one-sided component fails or hangs for Fetch_and_op on hosts without a fast
    # network; the others serve everywhere.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"{expected_size} ranks were started, but mpi4py cannot be used ({error}): "
            "install mpi4py and an MPI library, or start one process"
        ) from error
    size = MPI.COMM_WORLD.Get_size()
    if size != expected_size:
        raise InputError(
            f"the launcher started {expected_size} ranks, but MPI sees {size}: the launcher and "
            "mpi4py's MPI library do not know each other; start with that library's mpirun, or "
            "under Slurm with 'srun --mpi=pmix'"
        )
    return Mpi(MPI.COMM_WORLD)


class _Failure(NamedTuple):
    task: int
    rank: int
    message: str
    kind: type[InputError] | None
    """None for a bug."""


def on_first_rank(ranks: Ranks, function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its value, or raise its error, on every rank."""
    result, failure, error = None, None, None
    if ranks.rank == 0:
        try:
            result = function()
        except Exception as caught:
            failure, error = _describe(caught, 0, 0), caught
    result, failure = ranks.bcast((result, failure))
    _raise_first([failure], error)
    return result  # type: ignore[return-value]


def share_out(ranks: Ranks, count: int, work: Callable[[Iterator[int]], T]) -> list[T]:
    """Let the ranks take the tasks 0 to count - 1 one by one, whoever is free first.

    Args:
        ranks: the job; all its ranks must call this.
        count: number of tasks.
        work: called once on each rank with an iterator over the tasks that the rank gets. When a
            rank fails, the iterators of the others end early.

    Returns:
        What `work` returned on each rank, the same list on every rank.

    Raises:
        InputError: on every rank, the user's error of the lowest task on which one happened.
    """
    with ranks.counter() as counter:
        tasks = _Tasks(counter, count)
        result, failure, error = None, None, None
        try:
            result = work(tasks)
        except Exception as caught:
            counter.add(_STOP)
            failure, error = _describe(caught, tasks.current, ranks.rank), caught
        ranks.rest()  # others may need more cores than their own
        outcomes = ranks.allgather((result, failure))
    _raise_first([failure for _, failure in outcomes], error)
    return [result for result, _ in outcomes]  # type: ignore[misc]


class _Tasks:
    """Iterator over the tasks of one rank."""

    def __init__(self, counter: Counter, count: int) -> None:
        self._counter = counter
        self._count = count
        self.current = 0

    def __iter__(self) -> _Tasks:
        return self

    def __next__(self) -> int:
        self.current = self._counter.add(1)
        if self.current >= self._count:
            raise StopIteration
        return self.current


def _describe(error: Exception, task: int, rank: int) -> _Failure:
    if isinstance(error, InputError):
        return _Failure(task, rank, str(error), type(error))
    if isinstance(error, OSError):  # a full disk, a missing permission, a lost file system
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        return _Failure(
            task, rank, f"{where}{reason} (rank {rank}, {socket.gethostname()})", InputError
        )
    return _Failure(task, rank, f"rank {rank} failed: {type(error).__name__}: {error}", None)


def _raise_first(failures: list[_Failure | None], own: Exception | None) -> None:
    found = [failure for failure in failures if failure is not None]
    if not found:
        return
    if own is not None and not isinstance(own, (InputError, OSError)):
        raise own  # a bug keeps its traceback
    first = min(found, key=lambda failure: (failure.task, failure.rank))
    if first.kind is not None:
        raise first.kind(first.message) from own
    raise RuntimeError(first.message)
