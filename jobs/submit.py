"""From a request to a job: render, let the scheduler check it, submit it, and write that down."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.render import JOB_SCRIPT, MERGE_SCRIPT, render
from jobs.request import Request
from jobs.schedulers import Submission, scheduler_of
from preprocessing.errors import InputError

NOTE, JOB_IDS = "submission.json", "job-ids"


@dataclass(frozen=True)
class Script:
    """One script of a request."""

    path: Path
    text: str


@dataclass(frozen=True)
class Prepared:
    """What would be submitted."""

    directory: Path
    """Of the scripts, their logs and notes; it does not exist yet."""
    job: Script
    merge: Script | None
    """Follows an array and puts its parts together."""

    @property
    def scripts(self) -> list[Script]:
        """The scripts in order of submission."""
        return [self.job, *([self.merge] if self.merge else [])]

    def commands(self, request: Request) -> list[str]:
        """Return the commands that submit the scripts, as one would type them."""
        scheduler = scheduler_of(request.profile.site)
        after = [request.after] if request.after else []
        commands = [str(scheduler.submission(self.job.path, after))]
        if self.merge:
            commands.append(str(scheduler.submission(self.merge.path, ["JOB"])))
        return commands


def prepare(request: Request) -> Prepared:
    """Render the scripts of a request.

    Raises:
        InputError: a value that cannot stand in a script.
    """
    made = Path(os.path.normpath(request.working_directory / request.directory))
    root = request.stage.jobs_directory(made)
    directory = root / f"{_next_number(root):04d}-{request.stage.name}"
    job = Script(directory / JOB_SCRIPT, render(request, directory))
    if not (request.tasks and request.stage.merge):
        return Prepared(directory, job, None)
    arguments = (*request.arguments, *request.stage.merge)
    merging = dataclasses.replace(request, arguments=arguments, tasks=0, tasks_at_once=0)
    merge = Script(directory / MERGE_SCRIPT, render(merging, directory, MERGE_SCRIPT))
    return Prepared(directory, job, merge)


def submit(request: Request, prepared: Prepared) -> list[str]:
    """Write the scripts, let the scheduler check them, and submit them.

    Returns:
        The jobs' numbers, in order.

    Raises:
        InputError: the scheduler refuses; the scripts stay, to be looked at.
    """
    scheduler = scheduler_of(request.profile.site)
    try:
        prepared.directory.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot make {prepared.directory}: {error.strerror}") from error
    for script in prepared.scripts:
        script.path.write_text(script.text, encoding="utf-8")
        script.path.chmod(0o755)
    for script in prepared.scripts:
        scheduler.check(script.path)
    ids: list[str] = []
    after = [request.after] if request.after else []
    try:
        for script in prepared.scripts:
            ids.append(scheduler.submit(_submission(request, script, after)))
            after = [ids[-1]]
    finally:
        _note(request, prepared, ids)
    return ids


def _submission(request: Request, script: Script, after: Sequence[str]) -> Submission:
    return scheduler_of(request.profile.site).submission(script.path, after)


def _note(request: Request, prepared: Prepared, ids: Sequence[str]) -> None:
    note: dict[str, Any] = {
        "stage": request.stage.name,
        "arguments": list(request.arguments),
        "directory": str(request.working_directory / request.directory),
        "site": request.profile.name,
        "profiles": list(request.profile.files),
        "scheduler": request.profile.site.scheduler,
        "stdin": request.profile.site.submit.stdin,
        "nodes": request.nodes,
        "ranks": request.ranks,
        "seconds": request.seconds,
        "chain": request.chain,
        "tasks": request.tasks,
        "steps": request.steps,
        "submitted": time.time(),
    }
    text = json.dumps(note, indent=1, ensure_ascii=False) + "\n"
    (prepared.directory / NOTE).write_text(text, encoding="utf-8")
    with (prepared.directory / JOB_IDS).open("a", encoding="utf-8") as file:
        file.writelines(f"{job}\n" for job in ids)


def _next_number(root: Path) -> int:
    numbers = [0]
    if root.is_dir():
        names = (re.match(r"(\d{4,})-", path.name) for path in root.iterdir())
        numbers += [int(match[1]) for match in names if match]
    return max(numbers) + 1
