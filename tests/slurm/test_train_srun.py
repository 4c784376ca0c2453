"""Training under a real Slurm: the command of the README, unchanged, behind srun."""

import sys
from pathlib import Path

import pytest
from private_slurm import PrivateSlurm

from hpc.metrics import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def test_srun_trains_on_two_nodes_as_one_process_does_alone(
    slurm: PrivateSlurm, recipe_file: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "hpc.cli", "train", str(recipe_file), "train.stop_at_step=5"]
    srun = ["srun", "-N2", "-n2", "--mpi=none"]
    for name, launcher in (("alone", []), ("srun", srun)):
        done = slurm.run(*launcher, *command, f"train.run_dir={tmp_path / name}", env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        assert ("2 ranks (srun" in done.stdout) == (name == "srun")
    assert losses(tmp_path / "srun") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
