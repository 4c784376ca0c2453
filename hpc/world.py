"""Who am I among how many: reads the variables of torchrun, jsrun, mpirun and srun."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from preprocessing.errors import InputError

EXPECTED_RANKS = "PROTHPC_RANKS"
"""Variable of job scripts: the ranks that the launch line starts."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among the copies that a launcher started.

    Attributes:
        rank: Number of this process, 0 to `size` - 1.
        size: Number of processes (the world size).
        local_rank: Number of this process among those of its node.
        local_size: Number of processes on this node.
        node: Number of this node, 0 for the first; None where the launcher does not tell.
        launcher: `horovodrun`, `deepspeed`, `torchrun`, `jsrun`, `openmpi`, `pmi`, `srun` or
            `alone`.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int | None
    launcher: str


class _Variables(NamedTuple):
    rank: str
    size: str
    local_rank: str
    local_size: str


# The order matters: the first three may run under any of the others; jsrun sets Open MPI's
# variables too; and under mpirun inside a Slurm job Slurm's describe mpirun's own helpers, not
# the ranks.
_LAUNCHERS = {
    "horovodrun": _Variables(  # over gloo; over MPI its ranks are mpirun's
        "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"
    ),
    # deepspeed's own launcher sets what torchrun sets, but another local size.
    "deepspeed": _Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "torchrun": _Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "jsrun": _Variables(
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
    ),
    "openmpi": _Variables(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "pmi": _Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": _Variables(
        "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
    ),
}


def world_from_environment(environ: Mapping[str, str] = os.environ) -> World:
    """Read the launcher's variables.

    The launchers are asked in this order: horovodrun, deepspeed, torchrun, jsrun, Open MPI,
    PMI2/MPICH, srun. srun counts only where `SLURM_STEP_ID` is set: a batch script without srun
    has `SLURM_PROCID` and `SLURM_NTASKS` as well, but nobody has started the other tasks.

    Args:
        environ: The environment to read.

    Returns:
        The place of this process; a world of one where no launcher is found.

    Raises:
        InputError: A variable is missing, no number, or out of range; the launcher that counts
            one process runs under another that started several; or a job script said, in
            `PROTHPC_RANKS`, that it starts another number of ranks.
    """
    world = _world(environ)
    _check_expected_ranks(world, environ)
    return world


def _world(environ: Mapping[str, str]) -> World:
    found = [launcher for launcher in _LAUNCHERS if _is_present(launcher, environ)]
    if not found:
        return World(rank=0, size=1, local_rank=0, local_size=1, node=0, launcher="alone")
    launcher = found[0]
    names = _LAUNCHERS[launcher]
    size = integer(environ, names.size, launcher, minimum=1)
    rank = integer(environ, names.rank, launcher, below=(names.size, size))
    if launcher == "srun" or srun_spoke_pmi(launcher, environ):
        local_size = _slurm_local_size(environ)
        local_name = "SLURM_LOCALID"
    else:
        local_size = integer(environ, names.local_size, launcher, minimum=1)
        local_name = names.local_rank
    if local_size > size:
        raise InputError(
            f"{launcher} counts {local_size} processes on this node but {names.size}={size}; "
            f"unset the variable that does not come from {launcher}"
        )
    world = World(
        rank=rank,
        size=size,
        local_rank=integer(
            environ, local_name, launcher, below=("the processes on this node", local_size)
        ),
        local_size=local_size,
        node=_node(launcher, environ),
        launcher=launcher,
    )
    if srun_spoke_pmi(launcher, environ):
        _check_pmi_against_step(world, environ)
    _refuse_separate_copies(world, found[1:], environ)
    return world


def _is_present(launcher: str, environ: Mapping[str, str]) -> bool:
    if launcher == "srun":
        return "SLURM_STEP_ID" in environ
    names = _LAUNCHERS[launcher]
    if launcher in ("deepspeed", "torchrun"):
        of_deepspeed = "LOCAL_SIZE" in environ and "LOCAL_WORLD_SIZE" not in environ
        if of_deepspeed != (launcher == "deepspeed"):
            return False
    return names.rank in environ or names.size in environ


def integer(
    environ: Mapping[str, str],
    name: str,
    launcher: str,
    *,
    minimum: int = 0,
    below: tuple[str, int] | None = None,
) -> int:
    """Read a whole number that a launcher has set.

    Args:
        environ: The environment to read.
        name: Name of the variable.
        launcher: Who sets it, for the error.
        minimum: Smallest value allowed.
        below: Name and value of a limit that the number does not reach.

    Returns:
        The number.

    Raises:
        InputError: The variable is missing, no such number, or not below the limit.
    """
    text = environ.get(name)
    if text is None:
        raise InputError(
            f"{name} is not set, but other variables say that {launcher} started this process; "
            "start it through its launcher, or unset those variables"
        )
    if not re.fullmatch(r"\d+", text) or int(text) < minimum:
        raise InputError(
            f"{name}={text!r} is not a whole number of at least {minimum}; {launcher} sets it, "
            "so look for what changed it"
        )
    if below is not None and int(text) >= below[1]:
        raise InputError(
            f"{name}={text} is not less than {below[0]} ({below[1]}); these cannot both come "
            f"from one {launcher}, so unset the stale one"
        )
    return int(text)


def srun_spoke_pmi(launcher: str, environ: Mapping[str, str]) -> bool:
    """Tell `srun --mpi=pmi2` from MPICH's own mpiexec, which alone sets MPI_LOCALRANKID."""
    return launcher == "pmi" and "MPI_LOCALRANKID" not in environ and "SLURM_STEP_ID" in environ


def _check_pmi_against_step(world: World, environ: Mapping[str, str]) -> None:
    for name, expected in (("SLURM_PROCID", world.rank), ("SLURM_STEP_NUM_TASKS", world.size)):
        if integer(environ, name, "srun") != expected:
            raise InputError(
                f"{name}={environ[name]} but PMI_RANK={world.rank} and PMI_SIZE={world.size}; "
                "srun sets all of them alike, so unset the stale ones"
            )


def _slurm_local_size(environ: Mapping[str, str]) -> int:
    """Find this node in SLURM_STEP_TASKS_PER_NODE, written like `4(x2),3`: nodes of 4, 4, 3."""
    name = _LAUNCHERS["srun"].local_size
    counts: list[int] = []
    for part in environ.get(name, "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise InputError(
                f"{name}={environ.get(name)!r} is not a list of task counts like 4(x2),3; "
                "srun sets it, so look for what changed it"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    node = integer(environ, "SLURM_NODEID", "srun", below=(f"the nodes in {name}", len(counts)))
    return counts[node]


def _node(launcher: str, environ: Mapping[str, str]) -> int | None:
    if launcher == "torchrun":
        return integer(environ, "GROUP_RANK", launcher)
    if launcher == "deepspeed":
        return integer(environ, "CROSS_RANK", launcher)
    if launcher == "srun":
        return integer(environ, "SLURM_NODEID", launcher)
    if launcher == "jsrun" and "LSB_DJOB_RANKFILE" in environ:
        return _node_in_rankfile(Path(environ["LSB_DJOB_RANKFILE"]))
    return None


def _node_in_rankfile(path: Path) -> int | None:
    """Find this host among LSF's hosts, a line a slot; the first line is the launch node."""
    try:
        slots = path.read_text(encoding="utf-8").split()[1:]
    except OSError as error:
        raise InputError(f"cannot read LSB_DJOB_RANKFILE={str(path)!r}: {error}") from error
    hosts = list(dict.fromkeys(slot.partition(".")[0] for slot in slots))
    here = socket.gethostname().partition(".")[0]
    return hosts.index(here) if here in hosts else None


def _check_expected_ranks(world: World, environ: Mapping[str, str]) -> None:
    """Stop when the launcher has started N copies that each are "rank 0 of 1", or other ranks."""
    if EXPECTED_RANKS not in environ:
        return
    expected = integer(environ, EXPECTED_RANKS, "the job script", minimum=1)
    if expected != world.size:
        seen = "alone" if world.launcher == "alone" else f"one of {world.size} ranks"
        raise InputError(
            f"the job script starts {expected} ranks ({EXPECTED_RANKS}), but this process believes "
            f"to be {seen}: its launcher and prothpc do not know each other, and every rank would "
            "do the whole work; change the launch line of the script, or of the site's profile"
        )


def _refuse_separate_copies(world: World, outer: list[str], environ: Mapping[str, str]) -> None:
    """Stop when several copies of the launcher run, each of which counts only itself.

    `srun -n4 mpirun -n1 train` and `srun -N4 torchrun train` without `--nnodes` are four runs
    that write the same files. Only a count of one tells: with mpirun in a Slurm job, Slurm
    counts mpirun's helpers, and those may be more or fewer than the ranks.
    """
    counted = _LAUNCHERS[world.launcher].size
    if world.launcher == "torchrun" and "GROUP_WORLD_SIZE" in environ:
        counted = "GROUP_WORLD_SIZE"  # the nodes that torchrun knows of
    if integer(environ, counted, world.launcher) != 1:
        return
    for launcher in outer:
        name = _LAUNCHERS[launcher].size
        if name in environ and integer(environ, name, launcher) > 1:
            raise InputError(
                f"{name}={environ[name]} but {counted}=1: {launcher} started {environ[name]} "
                f"copies of {world.launcher} that do not know of one another and would "
                "overwrite each other's files; use one of the two launchers alone, or give "
                "torchrun its --nnodes and --rdzv-endpoint"
            )
