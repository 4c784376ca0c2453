"""Run code that may hang or crash in a process of its own, which its parent outlives.

A lost file system, a driver, or an MPI whose peers never come can stop a process so that neither
a signal handler nor another thread runs in it, or end it by a signal. The parent still tells.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NoReturn

from preprocessing.errors import InputError

_TAIL_BYTES = 4000  # kept of what a process printed before it died
_WORDS_SHOWN = 200  # and in its line of the report
_STACK = re.compile(r"\[[\w.-]+:\d+\] ")  # [host:process] before each line
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RAISED = 3  # exit status of a child that has sent its error


class ChildError(Exception):
    """The child raised an error, hung, or died: the message says which.

    Attributes:
        output: The end of what it and its libraries printed.
        refused: It raised an InputError, whose message says what to do.
    """

    def __init__(self, message: str, output: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.output = output
        self.refused = refused


class Child:
    """A process that runs a generator; a context manager, at whose end it is gone.

    It is forked, so it has the environment and the open files that a launcher has given this
    process, and can take its place in MPI. What it and its libraries print is kept out of the way.

    Args:
        work: Makes the generator, of what JSON can hold. It is given a function that waits for the
            next thing that the parent sends.
    """

    def __init__(self, work: Callable[[Callable[[], Any]], Iterator[Any]]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._words = os.memfd_create("words")
        self._reader, to_parent = os.pipe()
        from_parent, self._writer = os.pipe()
        self._pending = b""
        self._id = os.fork()
        if not self._id:
            os.close(self._writer)
            _live(work, from_parent, to_parent, self._words)
        os.close(from_parent)
        os.close(to_parent)
        with suppress(OSError):
            os.setpgid(self._id, self._id)  # the child does so as well: whoever is first

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        if self._id:
            with suppress(ProcessLookupError):
                os.killpg(self._id, signal.SIGKILL)
            # A process that waits for a lost file system cannot even be killed: don't wait.
            os.waitpid(self._id, os.WNOHANG)
        for descriptor in (self._reader, self._writer, self._words):
            os.close(descriptor)

    def send(self, item: Any) -> None:
        """Give the generator something that it waits for."""
        with suppress(BrokenPipeError):  # what it died of, `receive` tells
            _write(self._writer, item)

    def receive(self, limit: float) -> Any:
        """Wait for the next item.

        Args:
            limit: Seconds to wait.

        Returns:
            The item; None after the last.

        Raises:
            ChildError: The generator raised, or the process died, or nothing came in time.
        """
        deadline = time.monotonic() + limit
        while b"\n" not in self._pending:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], left)[0]:
                raise ChildError(f"no answer within {limit:g} s", self._tail())
            data = os.read(self._reader, 1 << 16)
            if not data:
                return self._ended()
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        message = json.loads(line)
        if "error" in message:
            raise ChildError(message["error"], self._tail(), refused=message["refused"])
        return message["item"]

    def _ended(self) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(self._id, 0)[1])
        self._id = 0
        if status:
            tail = self._tail()
            raise ChildError(_cause(status, tail), tail)

    def _tail(self) -> str:
        start = max(0, os.fstat(self._words).st_size - _TAIL_BYTES)
        # pread: the child writes at the offset that a seek would move.
        return os.pread(self._words, _TAIL_BYTES, start).decode(errors="replace")


def describe(error: Exception) -> str:
    """Say an error in one line; its type only where the message needs it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, InputError):
        return " ".join(str(error).split())  # it may quote a message of several lines
    message = str(error).strip().partition("\n")[0]  # torch adds a C++ stack
    source = re.match(r"\[\S+:\d+\] ", message)
    if source:  # and gloo the place in its code, and a sentence that does not help
        message = message[source.end() :].partition(". ")[0]
    return f"{type(error).__name__}: {message}"


def _live(
    work: Callable[[Callable[[], Any]], Iterator[Any]], reader: int, writer: int, words: int
) -> NoReturn:
    """Be the child."""
    status = 0
    try:
        os.setpgid(0, 0)  # to end the programs that it starts together with it
        # Nobody is left to end this process if its parent is killed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(words, 1)
        os.dup2(words, 2)
        lines = os.fdopen(reader, "rb")
        for item in work(lambda: json.loads(lines.readline())):
            _write(writer, {"item": item})
    except BaseException as error:
        status = _RAISED
        traceback.print_exc()
        if isinstance(error, Exception):
            refused = isinstance(error, InputError)
            _write(writer, {"error": describe(error), "refused": refused})
    finally:
        sys.stderr.flush()
        os._exit(status)


def _write(descriptor: int, message: Any) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def _cause(status: int, tail: str) -> str:
    # hpc.launch lets faulthandler end a process in which MPI_Init does not return.
    stuck = re.search(r"^Timeout \((\d+):(\d+):([\d.]+)\)!$", tail, re.MULTILINE)
    if stuck:
        seconds = 3600 * int(stuck[1]) + 60 * int(stuck[2]) + float(stuck[3])
        return f"MPI did not start within {seconds:g} s"
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
    # Open MPI prints the stack of a crash, after which nothing is left of what it said before.
    words = [line for line in tail.splitlines() if line.strip() and not _STACK.match(line)]
    last = words[-1:]
    return f"the process {how}" + "".join(f", after: {line[:_WORDS_SHOWN]}" for line in last)
