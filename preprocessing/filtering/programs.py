"""Programs as subprocesses: found, asked for their version, run, and heard when they fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from preprocessing.errors import InputError

Word = str | int | float
"""A part of a command."""

_SHOWN_LINES = 5
_LAUNCHERS_VARIABLES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "JSM_")


class ProgramError(InputError):
    """A program ended otherwise than it should."""


def find_program(name: str, given: Path | None, install: str) -> str:
    """Return the path of a program.

    Args:
        name: what it is called.
        given: its path, or that of a program of the same package, if the user named one.
        install: how to get it.

    Raises:
        InputError: if there is none.
    """
    if given is not None:
        beside = given.with_name(name)
        if os.access(given, os.X_OK) and os.access(beside, os.X_OK) and beside.is_file():
            return str(beside.absolute())
        raise InputError(f"--program {given}: there is no program {beside} that can be run")
    found = shutil.which(name)
    if found is None:
        raise InputError(
            f"{name} is not on PATH: {install}, load the site's module, or name it with --program"
        )
    return str(Path(found).absolute())


def ask(command: Sequence[str]) -> str:
    """Return what a short command prints.

    Raises:
        ProgramError: if it fails.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=_environment(),
        )
    except OSError as error:
        raise ProgramError(f"{command[0]}: cannot be run: {error.strerror or error}") from error
    if done.returncode:
        raise ProgramError(_complaint(command, done.returncode, done.stderr or done.stdout))
    return done.stdout


class Runner:
    """Runs programs in one directory and keeps the commands and what the programs say."""

    def __init__(self, directory: Path, on_command: Callable[[list[str]], None]) -> None:
        """Choose the working directory; `on_command` is told each command."""
        self.directory = directory
        self._on_command = on_command

    def run(self, *command: Word) -> None:
        """Run a program to its end; what it prints goes to a log beside its files.

        Raises:
            ProgramError: if it fails, with the end of what it said.
        """
        words = [str(word) for word in command]
        name = "-".join([Path(words[0]).name, *words[1:2]]).replace("--", "-")
        log = self.directory / f"{name}.log"
        self._on_command([Path(words[0]).name, *words[1:]])
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    words,
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                )
            except OSError as error:
                raise ProgramError(
                    f"{words[0]}: cannot be run: {error.strerror or error}"
                ) from error
            with process, _dying_with_us(process):
                code = process.wait()
        if code:
            raise ProgramError(_complaint(words, code, log.read_text(errors="replace")))


def _environment() -> dict[str, str]:
    """Return our environment without what would make an MPI build join our job, or call home."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHERS_VARIABLES)
    }
    return kept | {"BLAST_USAGE_REPORT": "false"}


@contextmanager
def _dying_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a program when a signal ends this process: a search would go on for hours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        process.kill()
        signal.signal(number, before)
        signal.raise_signal(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _complaint(command: Sequence[str], code: int, said: str) -> str:
    name = " ".join([Path(command[0]).name, *(command[1:2] if "mmseqs" in command[0] else ())])
    how = f"exit code {code}"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ": out of memory? use more and smaller chunks, fewer threads, or --split"
    lines = [line.strip() for line in said.splitlines() if line.strip()][-_SHOWN_LINES:]
    return f"{name} failed ({how}): {' / '.join(lines) or 'it said nothing'}"
