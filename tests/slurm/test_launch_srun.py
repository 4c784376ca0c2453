"""Ranks that a real Slurm starts know who they are, meet, and refuse to run as N singletons."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from private_slurm import PrivateSlurm

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}

# Prints one line; the sum of rank + 1 over all ranks proves that they met.
MEET = """
import json, socket, torch, torch.distributed as dist
from dataclasses import asdict
from hpc.launch import connect, disconnect, world_from_environment
world = world_from_environment()
connect(world, backend="gloo", timeout=40)
total = torch.tensor([world.rank + 1])
dist.all_reduce(total)
answer = {**asdict(world), "host": socket.gethostname(), "sum": total.item()}
print(json.dumps(answer), flush=True)
disconnect()
"""


def rank_lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: line["rank"])


@pytest.mark.parametrize(("mpi", "launcher"), [("none", "srun"), ("pmi2", "pmi")])
def test_ranks_meet_under_srun_without_mpi(slurm: PrivateSlurm, mpi: str, launcher: str) -> None:
    srun = ["srun", "-N2", "-n3", "--distribution=block", f"--mpi={mpi}"]
    lines = rank_lines(slurm.run(*srun, sys.executable, "-c", MEET, env=ENVIRONMENT))
    # Two tasks on the first node, one on the second. PMI does not number the nodes.
    places = [(0, 2, 0, "node1"), (1, 2, 0, "node1"), (0, 1, 1, "node2")]
    assert lines == [
        {
            "rank": rank,
            "size": 3,
            "local_rank": local_rank,
            "local_size": local_size,
            "node": node if launcher == "srun" else None,
            "launcher": launcher,
            "host": host,
            "sum": 6,
        }
        for rank, (local_rank, local_size, node, host) in enumerate(places)
    ]


def test_ranks_meet_under_torchrun_under_srun(slurm: PrivateSlurm) -> None:
    program = slurm.directory / "meet.py"
    program.write_text(MEET)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"node1:{probe.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    lines = rank_lines(
        slurm.run("srun", "-N2", "-n2", *torchrun, *meeting, program, env=ENVIRONMENT)
    )
    assert [(line["rank"], line["size"], line["launcher"]) for line in lines] == [
        (0, 2, "torchrun"),
        (1, 2, "torchrun"),
    ]
    # Which node comes first is torchrun's choice.
    assert {line["host"] for line in lines} == {"node1", "node2"}
    assert {line["node"] for line in lines} == {0, 1}
    assert {line["sum"] for line in lines} == {3}


BATCH = """#!/bin/bash
#SBATCH --nodes=2 --ntasks=2 --output=batch.out
{python} -c 'from hpc.launch import world_from_environment as w; print("batch:", w().launcher)'
mpirun -n 2 --map-by node {python} {program}
"""


def test_ranks_meet_under_mpirun_in_a_batch_job_whose_script_is_alone(slurm: PrivateSlurm) -> None:
    program, script = slurm.directory / "meet.py", slurm.directory / "batch.sh"
    program.write_text(MEET)
    script.write_text(BATCH.format(python=sys.executable, program=program))
    path = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    done = slurm.run("sbatch", "--wait", script, env={**ENVIRONMENT, "PATH": path})
    done.stdout = (slurm.directory / "batch.out").read_text()
    lines = rank_lines(done)
    assert "batch: alone" in done.stdout
    assert [(line["rank"], line["launcher"], line["host"], line["sum"]) for line in lines] == [
        (0, "openmpi", "node1", 3),
        (1, "openmpi", "node2", 3),
    ]


MPI = """
from hpc.launch import world_from_environment
from preprocessing.parallel import connect
world = world_from_environment()
ranks = connect(world.size)
print(f"{world.launcher}: {world.rank} is {ranks.rank} of {ranks.size}")
"""


def test_mpi_ranks_that_do_not_see_one_another_stop_at_once(slurm: PrivateSlurm) -> None:
    """Without PMIx each copy is MPI's rank 0 of 1, and would do all of the work."""
    start = time.monotonic()
    srun = ["srun", "-N2", "-n2", "--mpi=none"]
    done = slurm.run(*srun, sys.executable, "-c", MPI, env=ENVIRONMENT)
    assert done.returncode != 0
    assert "is 0 of 1" not in done.stdout
    assert "the launcher started 2 ranks, but MPI sees 1" in done.stderr
    assert time.monotonic() - start < 20


def test_mpi_ranks_see_one_another_through_pmix(slurm: PrivateSlurm) -> None:
    """The remedy that the error above names."""
    srun = ["srun", "-N2", "-n2", "--mpi=pmix"]
    probe = slurm.run(*srun, "true")
    if "can not load PMIx library" in probe.stderr and os.environ.get("CI") != "true":
        pytest.skip("srun finds no PMIx library (Debian: libpmix-dev)")
    done = slurm.run(*srun, sys.executable, "-c", MPI, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["srun: 0 is 0 of 2", "srun: 1 is 1 of 2"]
