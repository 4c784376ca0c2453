"""What became of the jobs of a run: asked of the scheduler, and read from what they left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.schedulers import Local, Lsf, Scheduler, Slurm, State
from jobs.stages import FOLDER
from jobs.submit import JOB_IDS, NOTE
from preprocessing.errors import InputError

_TAIL_LINES = 5
_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True)
class Submitted:
    """One submission, as its directory tells."""

    directory: Path
    note: Mapping[str, Any]

    @property
    def ids(self) -> list[str]:
        """Numbers of its jobs: as submitted, and of the successors that these have queued."""
        path = self.directory / JOB_IDS
        return list(dict.fromkeys(path.read_text().split())) if path.is_file() else []

    @property
    def scheduler(self) -> Scheduler:
        """What has taken its jobs."""
        name = self.note["scheduler"]
        return Slurm() if name == "slurm" else Lsf(self.note["stdin"]) if name == "lsf" else Local()

    @property
    def attempts(self) -> list[list[str]]:
        """Job, time of the start and mark of progress of each start."""
        return [row for path in self.directory.glob("attempts*.tsv") for row in _rows(path)]

    @property
    def ends(self) -> list[list[str]]:
        """Job, exit code and reason of each attempt that could say how it ended."""
        return _rows(self.directory / "ends.tsv")

    @property
    def newest_log(self) -> Path | None:
        """The log that was written last."""
        logs = list(self.directory.glob("*.log"))
        return max(logs, key=lambda path: path.stat().st_mtime) if logs else None

    def states(self) -> dict[str, State]:
        """Ask the scheduler for the state of each job that it still knows."""
        return self.scheduler.states(self.ids) if self.ids else {}


def submissions(directory: Path) -> list[Submitted]:
    """Return all submissions of a run or record set, oldest first.

    Raises:
        InputError: there are none.
    """
    directory = Path(os.path.abspath(directory))  # `.` has no name
    beside = directory.with_name(f"{directory.name}.{FOLDER}")
    roots = (directory / FOLDER, beside, directory, directory.parent)
    for root in roots:
        found = []
        for note in sorted(root.glob(f"[0-9]*-*/{NOTE}")):
            if root == directory.parent and note.parent != directory:
                continue  # the directory of one submission was named
            try:
                found.append(Submitted(note.parent, json.loads(note.read_bytes())))
            except (OSError, ValueError) as error:
                raise InputError(f"{note}: cannot be read: {error}") from error
        if found:
            return found
    raise InputError(
        f"{directory}: no jobs of prothpc submit here (neither {directory / FOLDER} nor {beside})"
    )


def describe(submitted: Submitted, states: Mapping[str, State], progress: Sequence[str]) -> str:
    """Return what there is to say of a submission, in lines.

    Args:
        submitted: the submission.
        states: what the scheduler says of its jobs.
        progress: how far the stage is, in lines.
    """
    note, attempts, ends = submitted.note, submitted.attempts, submitted.ends
    lines = [
        f"{submitted.directory.name}: prothpc {note['stage']} on {note['site']}, "
        f"{note['nodes']} nodes, {note['ranks']} ranks"
    ]
    for job in submitted.ids:
        lines.append(f"  job {job}: {_state(job, states.get(job), ends)}")
    if attempts:
        restarts = len(attempts) - max(1, int(note["tasks"]))
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(attempts[-1][1])))
        lines.append(f"  restarts: {max(0, restarts)}; the last attempt began {began}")
    lines += [f"  {line}" for line in progress]
    log = submitted.newest_log
    if log is not None:
        lines += [f"  {log}:", *(f"    {line}" for line in _tail(log))]
    return "\n".join(lines)


def cancel(submitted: Submitted) -> list[str]:
    """Cancel the jobs of a submission that wait or run; return their numbers."""
    states = submitted.states()
    alive = [job for job, state in states.items() if state.name in _ALIVE]
    # A successor is queued by a job that runs: cancelled first, it could come again otherwise.
    alive.sort(key=lambda job: states[job].name != "pending")
    if alive:
        submitted.scheduler.cancel(alive)
    return alive


_ALIVE = ("pending", "running", "completing", "suspended", "psusp", "ususp", "ssusp", "configuring")


def _state(job: str, state: State | None, ends: Sequence[Sequence[str]]) -> str:
    own = [row for row in ends if row[0] == job or row[0].startswith((f"{job}_", f"{job}["))]
    said = f"; {own[-1][2]} (exit code {own[-1][1]})" if own and len(own[-1]) > 2 else ""
    if state is None:
        return f"not known to the scheduler any more{said}"
    reason = f" ({state.reason})" if state.reason not in ("", "None", "-") else ""
    if state.name in _ALIVE:
        said = ""  # is about an attempt before this one
    return f"{state.name}{reason}{said}"


def _rows(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def _tail(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES), os.SEEK_SET)
        text = file.read().decode("utf-8", "replace")
    return text.splitlines()[-_TAIL_LINES:]
