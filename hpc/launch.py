"""How the ranks of a run find one another: process group, rendezvous, device.

A launcher (torchrun, jsrun, mpirun, srun) starts copies of one program and tells each its place
in environment variables of its own. `world_from_environment` reads them, `connect` makes the
process group of torch.distributed and proves that every rank is in it, `disconnect` ends it.

The danger here is a run that looks healthy and is not: N copies that each believe to be alone
overwrite one another's checkpoints, and a rank that waits for peers nobody started burns the
allocation. Both end with an `InputError` instead.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hpc.world import World, integer, srun_spoke_pmi, world_from_environment
from preprocessing.errors import InputError

if TYPE_CHECKING:
    from datetime import timedelta

    import torch

__all__ = [
    "World",
    "connect",
    "device_of",
    "disconnect",
    "expand_hosts",
    "world_from_environment",
]

# Ports derived from a job's number: above the registered services, below the end of the range
# that Linux hands out (60999). Outgoing connections may hold one of them: then MASTER_PORT helps.
_FIRST_PORT = 20_000
_PORT_COUNT = 40_000
# Steps of one job, and jobs with neighbouring numbers on one node, get ports of their own.
_STEPS_PER_JOB = 31

_NUMBERS = r"\d+(?:-\d+)?"  # in a node list: 7, or 01-12

# How long a collective may wait once the ranks have met: one rank may be writing a checkpoint
# while the others stand in the next all-reduce. torch's own default for gloo.
_COLLECTIVE_TIMEOUT_MINUTES = 30


def device_of(world: World) -> torch.device:
    """Give the device of this rank: a GPU of its node, or the CPU where there is none.

    A rank may see all GPUs of its node or, bound by jsrun or srun, only its own as number 0;
    the remainder is right for both.

    Args:
        world: The place of this process.

    Returns:
        `cuda:(local_rank mod visible GPUs)`, or `cpu`.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


def connect(world: World, *, backend: str | None = None, timeout: float = 120.0) -> None:
    """Make the process group of torch.distributed and prove that every rank is in it.

    A world of one needs none, and gets none. The ranks meet at `MASTER_ADDR` and `MASTER_PORT`
    where these are set (torchrun sets them); under srun, with any `--mpi`, on the first node of
    the step at port 20000 + (31 x job number + step number) mod 40000; under mpirun and jsrun at
    a free port that rank 0 tells the others through MPI; under jsrun without mpi4py on the job's
    first compute node, at a port made of the job number as under srun (two such jsruns at a time
    in one job need `MASTER_PORT`).

    Args:
        world: The place of this process.
        backend: Backend of torch.distributed; by default nccl where there is a GPU, else gloo.
        timeout: Seconds that the ranks have to meet. Later collectives have 30 minutes.

    Raises:
        InputError: The ranks do not meet in time, or MPI sees another number of ranks than the
            launcher says it started.
    """
    if world.size == 1:
        return
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    if backend is None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = device_of(world) if "nccl" in backend else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    ones = torch.ones(1, device=device)
    try:
        dist.init_process_group(
            backend,
            rank=world.rank,
            world_size=world.size,
            timeout=limit,
            **_rendezvous(world, limit),
        )
        dist.all_reduce(ones)
        met = int(ones.item())
    except RuntimeError as error:  # torch's errors for a lost connection and for a timeout
        reason = str(error).partition("\n")[0]  # a C++ stack may follow
        raise InputError(
            f"the {world.size} ranks that {world.launcher} counts did not meet within "
            f"{timeout:g} s ({reason}); look for the first rank that failed, "
            "check that the nodes reach one another (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
            "name the network), or set MASTER_ADDR and MASTER_PORT to choose another place"
        ) from error
    if not met == dist.get_world_size() == world.size:
        raise InputError(
            f"{world.launcher} counts {world.size} ranks but {met} met; "
            "start all of them with one launcher command"
        )
    # Public only in newer torch, as ProcessGroup.set_timeout; this one is in all that we support.
    dist.distributed_c10d._set_pg_timeout(timedelta(minutes=_COLLECTIVE_TIMEOUT_MINUTES))


def disconnect() -> None:
    """End what `connect` began; every rank calls it when its work is done.

    Not for a `finally`: MPI's end waits for all ranks, so a failing rank that came here would
    wait for ranks that wait for it. It should just exit; the launcher then ends the others.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and sys.modules["mpi4py"].rc.finalize is False and not mpi.Is_finalized():
        mpi.Finalize()


def expand_hosts(nodelist: str) -> list[str]:
    """Expand Slurm's short form of node names, as in `SLURM_STEP_NODELIST`.

    Args:
        nodelist: For example `node[01-03,7],login`.

    Returns:
        For example `["node01", "node02", "node03", "node7", "login"]`.

    Raises:
        InputError: The text is no such list.
    """
    parts = re.findall(rf"(?:[^,\[\]]|\[{_NUMBERS}(?:,{_NUMBERS})*\])+", nodelist)
    if not parts or ",".join(parts) != nodelist:
        raise InputError(f"cannot read the node list {nodelist!r}; set MASTER_ADDR, MASTER_PORT")
    return [host for part in parts for host in _expand_part(part)]


def _expand_part(part: str) -> Iterator[str]:
    """Expand the brackets of one entry from left to right; zeros in front keep their number."""
    bracket = re.search(r"\[(.*?)\]", part)
    if bracket is None:
        yield part
        return
    for numbers in bracket[1].split(","):
        first, _, last = numbers.partition("-")
        for number in range(int(first), int(last or first) + 1):
            head = f"{part[: bracket.start()]}{number:0{len(first)}d}"
            yield from (head + tail for tail in _expand_part(part[bracket.end() :]))


def _rendezvous(world: World, limit: timedelta) -> dict[str, Any]:
    """Give the arguments of `init_process_group` that say where the ranks meet."""
    environ = os.environ
    if "MASTER_ADDR" in environ or "MASTER_PORT" in environ:
        if "MASTER_ADDR" not in environ or not environ.get("MASTER_PORT", "").isdecimal():
            raise InputError(
                f"MASTER_ADDR={environ.get('MASTER_ADDR')!r} and MASTER_PORT="
                f"{environ.get('MASTER_PORT')!r} must be a host and a port; set both, or neither"
            )
        return {"init_method": "env://"}
    if world.launcher == "srun" or srun_spoke_pmi(world.launcher, environ):
        return {"store": _store_at(*_slurm_address(world, environ), world, limit)}
    if world.launcher == "horovodrun":
        raise InputError(
            "horovodrun tells its ranks no place where torch could meet: use train.engine=horovod, "
            "or set MASTER_ADDR and MASTER_PORT, or start the ranks with mpirun"
        )
    mpi4py = _find_mpi4py(world)
    if mpi4py is None:
        return {"store": _store_at(*_lsf_address(world, environ), world, limit)}
    return {"store": _store_through_mpi(mpi4py, world, limit)}


def _store_at(host: str, port: int, world: World, limit: timedelta) -> Any:
    """Open the store there on rank 0, and wait for it to open on the others."""
    from torch.distributed import TCPStore

    return TCPStore(host, port, world.size, is_master=world.rank == 0, timeout=limit)


def _slurm_address(world: World, environ: Mapping[str, str]) -> tuple[str, int]:
    # srun puts rank 0 on the step's first node, whatever the distribution, `arbitrary` excepted.
    job = integer(environ, "SLURM_JOB_ID", "srun")
    step = integer(environ, "SLURM_STEP_ID", "srun")
    port = _FIRST_PORT + (_STEPS_PER_JOB * job + step) % _PORT_COUNT
    if world.local_size == world.size:
        return "127.0.0.1", port
    return expand_hosts(environ.get("SLURM_STEP_NODELIST", ""))[0], port


def _lsf_address(world: World, environ: Mapping[str, str]) -> tuple[str, int]:
    job = integer(environ, "LSB_JOBID", "LSF")
    port = _FIRST_PORT + _STEPS_PER_JOB * job % _PORT_COUNT
    if world.local_size == world.size:
        return "127.0.0.1", port
    # Pairs of a host and its slots. The first is the launch node, where no rank runs.
    hosts = environ.get("LSB_MCPU_HOSTS", "").split()[::2]
    if len(hosts) < 2:
        raise InputError(
            f"LSB_MCPU_HOSTS={environ.get('LSB_MCPU_HOSTS')!r} names no compute node after the "
            "launch node; set MASTER_ADDR and MASTER_PORT"
        )
    return hosts[1], port


def _find_mpi4py(world: World) -> Any:
    """Import the package, which does not start MPI; None under a jsrun that has no mpi4py."""
    try:
        import mpi4py
    except ImportError as error:
        if world.launcher == "jsrun":
            return None
        raise InputError(
            f"mpi4py is missing, through which the ranks that {world.launcher} started agree "
            "where to meet; install it, or set MASTER_ADDR and MASTER_PORT"
        ) from error
    return mpi4py


def _store_through_mpi(mpi4py: Any, world: World, limit: timedelta) -> Any:
    """Let rank 0 open the store at a free port and tell the others where, through MPI.

    Whether MPI sees the ranks that the launcher counts is checked on the way: an mpirun of
    another MPI than mpi4py's leaves every rank alone, "rank 0 of 1", without an error.
    """
    from torch.distributed import TCPStore

    with _exit_when_stuck(limit.total_seconds()):
        comm = _start_mpi(mpi4py)
        if (comm.rank, comm.size) != (world.rank, world.size):
            raise InputError(
                f"{world.launcher} started {world.size} copies that do not see one another: "
                f"this one is rank {world.rank} of {world.size} in its variables, but rank "
                f"{comm.rank} of {comm.size} in MPI; start it with the mpirun of the MPI that "
                "mpi4py was built for, or with srun --mpi=pmix, or without MPI by setting "
                "MASTER_ADDR and MASTER_PORT"
            )
        host = "127.0.0.1" if world.local_size == world.size else _own_address()
        if world.rank == 0:
            store = TCPStore(
                host, 0, world.size, is_master=True, timeout=limit, wait_for_workers=False
            )
            comm.bcast((host, store.port), root=0)
            return store
        host, port = comm.bcast(None, root=0)
    return _store_at(host, port, world, limit)


def _start_mpi(mpi4py: Any) -> Any:
    """Call MPI_Init, by importing the module, and return MPI_COMM_WORLD."""
    if "mpi4py.MPI" not in sys.modules:
        # MPI_Finalize waits for all ranks. Called at every exit, as mpi4py does by itself, it
        # would hold a failing rank back while the others wait for it; so `disconnect` calls it.
        mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"mpi4py cannot start MPI ({error}); load the MPI module that it was built for, or "
            "set MASTER_ADDR and MASTER_PORT"
        ) from error
    return MPI.COMM_WORLD


@contextmanager
def _exit_when_stuck(seconds: float) -> Iterator[None]:
    """End this process with status 1 and a traceback when the block takes too long.

    MPI_Init waits for every rank without a limit and keeps the interpreter's lock meanwhile, so
    neither a timer thread nor a signal handler could act; faulthandler's own thread can.
    """
    import faulthandler

    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _own_address() -> str:
    """Give an address of this node that others can reach."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name
    # Many systems list their own name under a loopback address; other nodes know better.
    return name if address.startswith("127.") else address
