"""Ranks know who they are under every launcher, meet, and end with an error where they cannot."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path

import pytest

from hpc.launch import connect, expand_hosts, world_from_environment
from preprocessing.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MpiRun = Callable[..., subprocess.CompletedProcess[str]]

# A batch script has these, with or without srun inside it.
SLURM_BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
SLURM_STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
}
TORCHRUN = {
    "RANK": "6",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "2",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
}
DEEPSPEED = {
    "RANK": "6",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "2",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
HOROVODRUN = {
    "HOROVOD_RANK": "3",
    "HOROVOD_SIZE": "4",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
}
JSRUN = {
    "JSM_NAMESPACE_RANK": "7",
    "JSM_NAMESPACE_SIZE": "12",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "6",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "6", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
SRUN_PMI2 = {**SLURM_STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}
# mpirun starts its helper on a job's other nodes with srun, so ranks there see that step.
HELPER_STEP = {
    **SLURM_STEP,
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        pytest.param({}, (0, 1, 0, 1, 0, "alone"), id="alone"),
        pytest.param(SLURM_BATCH, (0, 1, 0, 1, 0, "alone"), id="batch script without srun"),
        pytest.param(TORCHRUN, (6, 8, 2, 4, 1, "torchrun"), id="torchrun"),
        pytest.param(
            {**TORCHRUN, **SLURM_STEP, "SLURM_STEP_NUM_TASKS": "2"},
            (6, 8, 2, 4, 1, "torchrun"),
            id="torchrun under srun",
        ),
        pytest.param(
            {**HOROVODRUN, **SLURM_STEP},
            (3, 4, 1, 2, None, "horovodrun"),
            id="horovodrun in a step",
        ),
        pytest.param(DEEPSPEED, (6, 8, 2, 4, 1, "deepspeed"), id="deepspeed's launcher"),
        pytest.param(JSRUN, (7, 12, 1, 6, None, "jsrun"), id="jsrun"),
        pytest.param(
            {**OPEN_MPI, **JSRUN}, (7, 12, 1, 6, None, "jsrun"), id="jsrun sets both kinds"
        ),
        pytest.param(OPEN_MPI, (5, 8, 1, 4, None, "openmpi"), id="mpirun"),
        pytest.param(
            {**SLURM_BATCH, **OPEN_MPI}, (5, 8, 1, 4, None, "openmpi"), id="mpirun in a batch job"
        ),
        pytest.param(
            {**HELPER_STEP, **OPEN_MPI},
            (5, 8, 1, 4, None, "openmpi"),
            id="mpirun on a batch job's second node",
        ),
        pytest.param(MPICH, (2, 6, 0, 2, None, "pmi"), id="MPICH"),
        pytest.param(SRUN_PMI2, (3, 4, 0, 1, None, "pmi"), id="srun with pmi2"),
        pytest.param(SLURM_STEP, (3, 4, 0, 1, 1, "srun"), id="srun"),
        pytest.param(
            {
                **SLURM_STEP,
                "SLURM_STEP_NUM_TASKS": "11",
                "SLURM_PROCID": "10",
                "SLURM_LOCALID": "2",
                "SLURM_NODEID": "2",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
            },
            (10, 11, 2, 3, 2, "srun"),
            id="srun on uneven nodes",
        ),
    ],
)
def test_every_launcher_tells_its_ranks_apart(
    environ: dict[str, str], place: tuple[int, ...]
) -> None:
    assert astuple(world_from_environment(environ)) == place


@pytest.mark.parametrize(("line", "node"), [(1, None), (2, 0), (6, 2)])
def test_a_jsrun_rank_finds_its_node_behind_the_launch_node(
    tmp_path: Path, line: int, node: int | None
) -> None:
    hosts = ["batch1", "a1", "a1", "a2", "a2", "a3"]
    hosts = [host if host != hosts[line - 1] else socket.gethostname() for host in hosts]
    rankfile = tmp_path / "rankfile"
    rankfile.write_text("\n".join(hosts) + "\n")
    world = world_from_environment({**JSRUN, "LSB_DJOB_RANKFILE": str(rankfile)})
    assert world.node == node


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "LOCAL_RANK"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "eight"}, "OMPI_COMM_WORLD_SIZE"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "8"}, "OMPI_COMM_WORLD_RANK"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "4"}, "OMPI_COMM_WORLD_LOCAL_RANK"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "9"}, "OMPI_COMM_WORLD_SIZE"),
        ({**JSRUN, "JSM_NAMESPACE_SIZE": "0"}, "JSM_NAMESPACE_SIZE"),
        ({**JSRUN, "LSB_DJOB_RANKFILE": "/nowhere"}, "LSB_DJOB_RANKFILE"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALNRANKS"),
        ({**SRUN_PMI2, "PMI_SIZE": "8"}, "SLURM_STEP_NUM_TASKS"),
        ({**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "four"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({**SLURM_STEP, "SLURM_NODEID": "2"}, "SLURM_NODEID"),
        ({"SLURM_STEP_ID": "0"}, "SLURM_STEP_NUM_TASKS"),
    ],
)
def test_missing_or_impossible_variables_are_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(InputError, match=rf"\b{named}\b"):
        world_from_environment(environ)


ONE_OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
ONE_NODE_TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
}


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({**SLURM_STEP, **ONE_OPEN_MPI}, id="srun -n4 mpirun -n1"),
        pytest.param({**SLURM_STEP, **ONE_NODE_TORCHRUN}, id="srun -n4 torchrun, no --nnodes"),
        pytest.param({**JSRUN, **ONE_NODE_TORCHRUN}, id="jsrun torchrun, no --nnodes"),
    ],
)
def test_copies_that_each_count_only_themselves_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(InputError, match="do not know of one another"):
        world_from_environment(environ)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("login", ["login"]),
        ("node[1-3,7],login", ["node1", "node2", "node3", "node7", "login"]),
        ("nid[00098-00101]", ["nid00098", "nid00099", "nid00100", "nid00101"]),
        ("r[1-2]n[08,10]-ib", ["r1n08-ib", "r1n10-ib", "r2n08-ib", "r2n10-ib"]),
    ],
)
def test_node_lists_expand(nodelist: str, hosts: list[str]) -> None:
    assert expand_hosts(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "node[1-", "node[a]", "node[-]", "node[1-3]]", "a,,b"])
def test_malformed_node_lists_are_refused(nodelist: str) -> None:
    with pytest.raises(InputError, match="node list"):
        expand_hosts(nodelist)


def test_importing_launch_is_cheap_and_starts_nothing() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import hpc.launch; "
        "print(time.perf_counter() - start, 'torch' in sys.modules, 'mpi4py' in sys.modules)"
    )
    # The best of three, because the first may write byte code and the machine may be busy.
    answers = [run_alone(code).stdout.split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in answers) < 0.1
    assert answers[0][1:] == ["False", "False"]


# Real ranks. Each prints one line; the sum of rank + 1 over all ranks proves that they met.
MEET = """
import json, torch, torch.distributed as dist
from dataclasses import asdict
from hpc.launch import connect, device_of, disconnect, world_from_environment
world = world_from_environment()
connect(world, backend="gloo", timeout=60)
total = torch.tensor([world.rank + 1])
if world.size > 1:
    dist.all_reduce(total)
print(json.dumps({**asdict(world), "sum": total.item()}), flush=True)
disconnect()
"""
IDENTITY = """
from hpc.launch import world_from_environment
world = world_from_environment()
"""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(extra or {})}


def run_alone(
    code: str, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(env),
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )


def rank_lines(
    done: subprocess.CompletedProcess[str], exit_code: int = 0
) -> list[dict[str, object]]:
    assert done.returncode == exit_code, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: line["rank"])


def test_alone_needs_no_process_group() -> None:
    world = {"rank": 0, "size": 1, "local_rank": 0, "local_size": 1, "node": 0}
    assert rank_lines(run_alone(MEET)) == [{**world, "launcher": "alone", "sum": 1}]


def test_ranks_meet_under_mpirun_and_their_exit_code_survives(mpirun: MpiRun) -> None:
    """85 asks the scheduler to run the job again, so it must reach mpirun's caller."""
    lines = rank_lines(mpirun(2, "-c", MEET + "raise SystemExit(85)"), exit_code=85)
    world = {"size": 2, "local_size": 2, "node": None, "launcher": "openmpi", "sum": 3}
    assert lines == [{**world, "rank": rank, "local_rank": rank} for rank in (0, 1)]


def test_ranks_meet_under_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "meet.py"
    program.write_text(MEET)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(program)],
        env=environment(),
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    world = {"size": 2, "local_size": 2, "node": 0, "launcher": "torchrun", "sum": 3}
    assert rank_lines(done) == [{**world, "rank": rank, "local_rank": rank} for rank in (0, 1)]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            IDENTITY + "if world.rank == 1: raise SystemExit(3)" + MEET, id="before connect"
        ),
        pytest.param(
            MEET.replace("disconnect()\n", "if world.rank == 1: raise ValueError('mine')\n")
            + "import time; time.sleep(60)",
            id="while another computes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_dies_takes_the_others_with_it(mpirun: MpiRun, code: str) -> None:
    start = time.monotonic()
    assert mpirun(2, "-c", code, timeout=60).returncode != 0
    assert time.monotonic() - start < 20


@pytest.mark.slow
def test_a_rank_that_leaves_quietly_does_not_hang_the_others(mpirun: MpiRun) -> None:
    """MPI_Init itself would wait for ever."""
    code = IDENTITY + "if world.rank == 1: raise SystemExit(0)" + MEET
    done = mpirun(2, "-c", code.replace("timeout=60", "timeout=4"), timeout=60)
    assert done.returncode != 0
    assert "in _start_mpi" in done.stderr


def test_ranks_that_mpi_cannot_see_end_with_one_clear_error() -> None:
    """What an mpirun of another MPI than mpi4py's makes: each rank alone, without an error."""
    claim = {**ONE_OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    done = run_alone(MEET, env=claim)
    assert done.returncode != 0
    assert "started 2 copies that do not see one another" in done.stderr
    assert "srun --mpi=pmix" in done.stderr


@pytest.mark.slow
def test_a_rank_whose_peers_never_come_gives_up() -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    claim = {**ONE_OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "2", **address}
    done = run_alone(MEET.replace("timeout=60", "timeout=2"), env=claim)
    assert done.returncode != 0
    assert "did not meet within 2 s" in done.stderr


@pytest.mark.slow
def test_jsrun_ranks_without_mpi4py_meet_through_the_job_number(tmp_path: Path) -> None:
    """Emulated: no jsrun here, only its variables."""
    hide = "import sys; sys.modules['mpi4py'] = None\n"
    job = {"LSB_JOBID": str(os.getpid()), "LSB_MCPU_HOSTS": "batch1 1 localhost 42 a2 42"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", hide + MEET],
            # One rank a node, so that rank 1 has to look rank 0 up among the hosts.
            env=environment(
                {
                    **job,
                    "JSM_NAMESPACE_RANK": str(rank),
                    "JSM_NAMESPACE_SIZE": "2",
                    "JSM_NAMESPACE_LOCAL_RANK": "0",
                    "JSM_NAMESPACE_LOCAL_SIZE": "1",
                }
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    sums = [json.loads(rank.communicate(timeout=90)[0])["sum"] for rank in ranks]
    assert sums == [3, 3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_torch_under_horovodrun_is_told_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"use train\.engine=horovod, or set MASTER_ADDR"):
        connect(world_from_environment(HOROVODRUN), backend="gloo")


def test_a_job_script_that_starts_other_ranks_than_believed_is_refused() -> None:
    """The trap of N copies that are each "rank 0 of 1", where no launcher's variable tells."""
    with pytest.raises(InputError, match=r"starts 4 ranks .*believes to be alone"):
        world_from_environment({"PROTHPC_RANKS": "4"})
    two = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    with pytest.raises(InputError, match=r"starts 4 ranks .*one of 2 ranks"):
        world_from_environment({**two, "PROTHPC_RANKS": "4"})
    assert world_from_environment({**two, "PROTHPC_RANKS": "2"}).rank == 1
    assert world_from_environment({"PROTHPC_RANKS": "1"}).size == 1
