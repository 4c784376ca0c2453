"""`prothpc doctor`: does everything work here that a run needs? Also as the first step of a job.

Every rank measures in a child process, since what is looked at may hang or crash; the ranks of all
nodes then meet, and rank 0 judges what they found and prints it.
"""

from __future__ import annotations

import difflib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hpc.checks.child import Child, ChildError
from hpc.checks.collectives import ALL_REDUCE, CLOCKS, MPI_ALL_REDUCE
from hpc.checks.findings import Check, Finding, Measured, Situation
from hpc.checks.launchers import LAUNCHERS
from hpc.checks.machine import DEVICES, LIMITS, MEMORY
from hpc.checks.meeting import FAREWELL, MEETING, REPORTS, together
from hpc.checks.report import Report
from hpc.checks.site import SITE
from hpc.checks.software import ENGINES, SEARCH_TOOLS, VERSIONS
from hpc.checks.storage import DIRECTORY
from hpc.world import World, world_from_environment
from jobs.site import load_profile
from preprocessing.errors import InputError

REQUIRABLE = (
    *("apex", "blastp", "deepspeed", "gpu", "horovod", "jsrun", "mmseqs", "mpi", "mpirun"),
    *("srun", "torchrun"),
)
"""What `--require` may name."""

_ALONE = (VERSIONS, DEVICES, MEMORY, LIMITS, ENGINES, LAUNCHERS, SEARCH_TOOLS, DIRECTORY, SITE)
_SHARED = (ALL_REDUCE, CLOCKS, MPI_ALL_REDUCE)
_CHECKS = {check.name: check for check in (MEETING, REPORTS, *_ALONE, *_SHARED, FAREWELL)}

_GRACE_SECONDS = 10.0
"""Whatever has a time limit of its own may use it up before its process is ended."""

_RANK_DELAY_SECONDS = 2.0
"""Other ranks wait this long before they tell what rank 0 may tell for all."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What to look at.

    Attributes:
        directory: Directory to try out.
        size: Bytes that each node writes there.
        require: Of `REQUIRABLE`, what has to work.
        json_file: Where to write findings and measurements, if anywhere.
        timeout: Seconds after which whatever does not answer counts as hung.
        site: Profile to compare the machine with, if any.
    """

    directory: Path = field(default_factory=Path)
    size: int = 64 * 2**20
    require: frozenset[str] = frozenset()
    json_file: Path | None = None
    timeout: float = 60.0
    site: str | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            InputError: An unknown requirement or site, or a time limit that is none.
        """
        for name in sorted(self.require - set(REQUIRABLE)):
            near = difflib.get_close_matches(name, REQUIRABLE, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"--require {name} is unknown: {meant}it takes {', '.join(REQUIRABLE)}"
            )
        if not 0 < self.timeout < float("inf"):
            raise InputError(f"--timeout {self.timeout:g} is no number of seconds above 0")
        if self.site is not None:
            load_profile(self.site)


def parse_requirements(texts: Iterable[str]) -> frozenset[str]:
    """Split the values of `--require`, each of them names with commas between."""
    return frozenset(name.strip() for text in texts for name in text.split(",") if name.strip())


def doctor(options: DoctorOptions) -> int:
    """Look at everything, together with the other ranks that the launcher started.

    Args:
        options: What to look at.

    Returns:
        The exit code of this rank: 0 if nothing fails, else 1. Ranks other than 0 have 1 only
        where they know of something that rank 0 may not know.
    """
    situation, ranks = _place(options)
    world = situation.world
    own: dict[str, dict[str, Any]] = {}
    if world.rank:
        try:
            for _ in _measurements(situation, own):
                pass
        except _BrokenError as error:
            return _tell_beside_rank_0(world, error.finding)
        return 0

    if options.json_file is not None:
        options.json_file.open("a").close()  # says at once if it cannot be written
    report = Report(require=options.require, behind_mpirun=world.launcher == "openmpi")
    report.title(f"prothpc doctor on {socket.gethostname()}")
    if ranks is not None:
        report.tell(ranks)
    judged = set()
    try:
        for name, measured in _measurements(situation, own):
            if measured is None:
                report.busy(name)
            else:
                judged.add(name)
                report.judge(_CHECKS[name], measured)
    except _BrokenError as error:
        report.tell(error.finding)
        missing = [name for name in own if name not in judged]
        if missing:
            report.title("what follows is about rank 0 alone")
        for name in missing:
            report.judge(_CHECKS[name], [_measured_here(world, own[name])])
    if world.size == 1:
        report.tell(_NOT_MEASURED)
    code = report.end()
    if options.json_file is not None:
        report.write(options.json_file)
    return code


_NOT_MEASURED = Finding(
    check=ALL_REDUCE.name,
    level="note",
    text="not tried with one process",
    advice="start this with the launcher of your job, as in mpirun -n 2 prothpc doctor",
)


class _BrokenError(Exception):
    """The ranks cannot go on together."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


def _place(options: DoctorOptions) -> tuple[Situation, Finding | None]:
    """Say who this process is, and what can be said about that before the ranks have met."""
    finding = None
    try:
        world = world_from_environment()
    except InputError as error:
        world = World(rank=0, size=1, local_rank=0, local_size=1, node=0, launcher="alone")
        finding = Finding(
            check=MEETING.name,
            level="fail",
            text=str(error),
            advice="the rest of this report is about one process only",
        )
    situation = Situation(
        world=world,
        directory=options.directory,
        size=options.size,
        timeout=options.timeout,
        site=options.site,
    )
    if world.size == 1 and finding is None:
        finding = _one_process(world, os.environ)
    return situation, finding


def _one_process(world: World, environ: Mapping[str, str]) -> Finding:
    tasks = environ.get("SLURM_NTASKS", "1")
    if world.launcher == "alone" and tasks != "1":
        return Finding(
            check=MEETING.name,
            level="note",
            text=f"one process, in a Slurm job of {tasks} tasks",
            advice="put srun or mpirun in front to look at all of them",
        )
    launcher = "no launcher" if world.launcher == "alone" else world.launcher
    return Finding(check=MEETING.name, level="ok", text=f"one process, started by {launcher}")


def _measurements(
    situation: Situation, own: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, list[Measured] | None]]:
    """Measure alone and together, whatever hangs or crashes.

    Args:
        situation: What measuring may depend on.
        own: Receives what this rank measures alone, by name of the check.

    Yields:
        Name of a check and None when it begins; name and measurements to judge. Under a launcher
        these come on rank 0 only.

    Raises:
        _BrokenError: The ranks did not meet, or went astray later.
    """
    if situation.world.size == 1:
        yield from _alone(situation, own)
        return
    current, limit = MEETING, situation.timeout
    try:
        # A child of its own, that meets the others meanwhile: what hangs or crashes on a rank must
        # not end its connections.
        with Child(partial(together, situation, _SHARED)) as child:
            for check, _ in _alone(situation, own):
                yield check, None
            while message := child.receive(limit + _GRACE_SECONDS):
                kind, name, content = message
                if kind == "begins":
                    current, limit = _CHECKS[name], content
                    yield name, None
                elif kind == "met":
                    child.send(own)
                else:
                    yield name, [Measured(**one) for one in content]
    except ChildError as error:
        # What refuses to let ranks meet says itself what to do.
        advice = "" if current is MEETING and error.refused else current.advice
        finding = Finding(check=current.name, level="fail", text=str(error), advice=advice)
        raise _BrokenError(finding) from error


def _alone(
    situation: Situation, own: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, list[Measured] | None]]:
    """Measure what needs no other rank; a check that hangs or crashes costs only itself."""
    while remaining := [check for check in _ALONE if _is_due(check, situation, own)]:
        current = remaining[0].name
        try:
            with Child(partial(_measure, remaining, situation)) as child:
                while message := child.receive(situation.timeout + _GRACE_SECONDS):
                    current, values = message
                    if values is None:
                        yield current, None
                    else:
                        own[current] = values
                        yield current, [_measured_here(situation.world, values)]
        except ChildError as error:
            own[current] = {"trouble": str(error), "output": error.output}
            yield current, [_measured_here(situation.world, own[current])]


def _is_due(check: Check, situation: Situation, own: dict[str, dict[str, Any]]) -> bool:
    first = situation.world.local_rank == 0
    return check.name not in own and (first or not check.once_per_node)


def _measure(
    checks: Sequence[Check], situation: Situation, _: Callable[[], Any]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Do, in a child, these checks; None says that one begins."""
    for check in checks:
        yield check.name, None
        yield check.name, check.values(situation)


def _measured_here(world: World, values: dict[str, Any]) -> Measured:
    return Measured(rank=world.rank, host=socket.gethostname(), values=values)


def _tell_beside_rank_0(world: World, finding: Finding) -> int:
    """Report what rank 0 may not know; the launcher ends this rank if rank 0 is done before."""
    time.sleep(_RANK_DELAY_SECONDS)
    text = f"{finding.text} -> {finding.advice}" if finding.advice else finding.text
    place = f"rank {world.rank} on {socket.gethostname()}"
    print(f"prothpc doctor, {place}: FAIL {finding.check}: {text}", file=sys.stderr, flush=True)
    return 1
