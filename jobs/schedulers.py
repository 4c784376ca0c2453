"""What takes jobs: Slurm, LSF, or a process on this machine. Its programs get words, no shell."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.site import Site
from preprocessing.errors import InputError

_LSF_NAMES = {"pend": "pending", "run": "running", "done": "completed", "exit": "failed"}

_TIMEOUT_SECONDS = 120
"""A controller that needs longer has lost the request."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What the scheduler says of a job.

    Attributes:
        name: `pending`, `running`, or how it ended, in the scheduler's word, in small letters.
        reason: Why it waits, or anything else that it says.
    """

    name: str
    reason: str = ""


@dataclass(frozen=True)
class Submission:
    """A command that submits, and the script on its standard input, if that is how it goes."""

    words: tuple[str, ...]
    stdin: Path | None = None

    def __str__(self) -> str:
        return shlex.join(self.words) + (f" < {shlex.quote(str(self.stdin))}" if self.stdin else "")


class Slurm:
    """sbatch, squeue and scancel; no sacct, which many sites and this project's tests lack."""

    def check(self, script: Path) -> None:
        """Let Slurm itself say whether it would take the script.

        Raises:
            InputError: it would not; the message is its own.
        """
        _run(["sbatch", "--test-only", str(script)], "Slurm would not take this job")

    def submission(self, script: Path, after: Sequence[str]) -> Submission:
        """Return the command that submits a script, to start when other jobs have succeeded."""
        dependency = f"--dependency=afterok:{':'.join(after)}"
        wait = [dependency, "--kill-on-invalid-dep=yes"] if after else []
        return Submission(("sbatch", "--parsable", *wait, str(script)))

    def submit(self, submission: Submission) -> str:
        """Submit, and return the job's number."""
        answer = _run(submission.words, "Slurm did not take the job")
        return answer.partition(";")[0].strip()

    def states(self, ids: Sequence[str]) -> dict[str, State]:
        """Return what is known of jobs; Slurm forgets them some minutes after their end."""
        states: dict[str, State] = {}
        for job in ids:
            command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r"]
            try:
                lines = _run(command, "Slurm does not answer").splitlines()
            except InputError as error:
                if "Invalid job id" not in str(error):
                    raise
                continue  # forgotten
            for line in lines:
                name, _, reason = line.strip().partition("|")
                states[job] = _together(states.get(job), State(name=name.lower(), reason=reason))
        return states

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs, whatever they are at."""
        _run(["scancel", *ids], "Slurm did not cancel")


class Lsf:
    """bsub, bjobs and bkill.

    Args:
        stdin: whether the site takes scripts as `bsub < script`.
    """

    def __init__(self, stdin: bool) -> None:
        self._stdin = stdin

    def check(self, script: Path) -> None:
        """LSF has no trial submission."""

    def submission(self, script: Path, after: Sequence[str]) -> Submission:
        """Return the command that submits a script, to start when other jobs have succeeded."""
        wait = ["-w", " && ".join(f"done({job})" for job in after)] if after else []
        if self._stdin:
            return Submission(("bsub", *wait), script)
        return Submission(("bsub", *wait, str(script)))

    def submit(self, submission: Submission) -> str:
        """Submit, and return the job's number."""
        text = submission.stdin.read_text(encoding="utf-8") if submission.stdin else None
        answer = _run(submission.words, "LSF did not take the job", text)
        match = re.search(r"Job <(\d+)>", answer)
        if match is None:
            raise InputError(f"bsub answers {answer.strip()!r}, in which there is no Job <number>")
        return match[1]

    def states(self, ids: Sequence[str]) -> dict[str, State]:
        """Return what is known of jobs; LSF forgets them some time after their end."""
        command = ["bjobs", "-o", "JOBID STAT EXIT_REASON", "-json", "-a", *ids]
        states: dict[str, State] = {}
        with suppress(InputError, ValueError, KeyError):
            for record in json.loads(_run(command, "LSF does not answer"))["RECORDS"]:
                name = str(record.get("STAT", "")).lower()
                job = str(record["JOBID"]).partition("[")[0]
                one = State(name=_LSF_NAMES.get(name, name), reason=record.get("EXIT_REASON", ""))
                states[job] = _together(states.get(job), one)
        return states

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs, whatever they are at."""
        _run(["bkill", *ids], "LSF did not cancel")


class Local:
    """A process of this machine; its number is the job's."""

    def check(self, script: Path) -> None:
        """Nothing can be said before it runs."""

    def submission(self, script: Path, after: Sequence[str]) -> Submission:
        """Return the command that starts a script."""
        return Submission(("bash", str(script)))

    def submit(self, submission: Submission) -> str:
        """Start the script in the background, and return its process number."""
        script = Path(submission.words[-1])
        with (script.parent / "job.log").open("ab") as log:
            process = subprocess.Popen(
                submission.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return str(process.pid)

    def states(self, ids: Sequence[str]) -> dict[str, State]:
        """Return which of the processes run."""
        return {job: State(name="running") for job in ids if _is_ours(job)}

    def cancel(self, ids: Sequence[str]) -> None:
        """Tell the processes to end."""
        for job in filter(_is_ours, ids):
            os.kill(int(job), signal.SIGTERM)


Scheduler = Slurm | Lsf | Local


def scheduler_of(site: Site) -> Scheduler:
    """Return what takes the jobs of a site."""
    if site.scheduler == "slurm":
        return Slurm()
    return Lsf(site.submit.stdin) if site.scheduler == "lsf" else Local()


def _together(one: State | None, other: State) -> State:
    """The state of an array, of whose tasks the busiest counts."""
    order = ("running", "completing", "pending")
    if one is None or one.name == other.name:
        return other
    rank = {name: place for place, name in enumerate(order)}
    return min(one, other, key=lambda state: rank.get(state.name, len(order)))


def _is_ours(job: str) -> bool:
    """Whether the process is a job: numbers of processes come again."""
    try:
        return b"job.sh" in Path(f"/proc/{job}/cmdline").read_bytes()
    except OSError:
        return False


def _run(words: Sequence[str], complaint: str, stdin: str | None = None) -> str:
    """Run a program of the scheduler and return its output.

    Raises:
        InputError: it is missing, hangs, or refuses; with its own words.
    """
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{words[0]} is not on PATH: run this on a login node of the site, or look at the "
            "script with --dry-run"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{complaint}: {words[0]} has not answered in {error.timeout:g} s"
        ) from error
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise InputError(f"{complaint}: {said or f'{words[0]} exits {done.returncode}'}")
    print(done.stderr, end="", file=sys.stderr)
    return done.stdout
