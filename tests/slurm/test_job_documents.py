"""The documents about jobs, as a new user reads them: their commands run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from private_slurm import PrivateSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
WAIT = """
JOB=$(tail -n 1 "$1"/0001-*/job-ids)
state() { squeue --noheader --states=all --jobs "$JOB" --format=%T; }
while [[ $(state) =~ PENDING|RUNNING|COMPLETING ]]; do sleep 0.3; done
[[ $(state) == COMPLETED ]] || {
  cat "$1"/0001-*/*.log
  exit 1
}
"""


def blocks(document: str) -> list[str]:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    return re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)


def read_along(slurm: PrivateSlurm, folder: Path, script: str) -> str:
    """Run commands in a checkout whose .venv holds prothpc."""
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    (folder / "wait").write_text(WAIT)
    environment = {
        **slurm.environment,
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "XDG_CONFIG_HOME": "",
        "USER": "someone",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_osc": "^ucx",
    }
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{script}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_your_first_run_on_slurm(slurm: PrivateSlurm, tmp_path: Path) -> None:
    first, second = blocks("jobs-slurm.md")
    shown = read_along(
        slurm,
        tmp_path,
        f"{first}\nJOB=$(cat records.batch/0001-*/job-ids)\n{second}\n. ./wait runs/first/batch\n"
        "prothpc jobs runs/first\n",
    )
    assert "#SBATCH --nodes=2" in shown, "the dry run shows the script"
    assert "prothpc train on generic-slurm, 2 nodes, 4 ranks" in shown
    assert "step 20 of 300" in shown
    assert (tmp_path / "runs" / "first" / "checkpoints" / "step-00000020").is_dir()


def test_your_own_site(slurm: PrivateSlurm, tmp_path: Path) -> None:
    (script,) = blocks("jobs-own-site.md")
    shown = read_along(slurm, tmp_path, f"{script}\n. ./wait batch\ncat batch/0001-doctor/*.log")
    assert "ours: our cluster: 2 nodes of 2 cores" in shown
    assert "node.cores = 2\n    lscpu on a compute node" in shown
    assert re.search(r"note +site +ours: programs and queues are here", shown)
    assert re.search(r"ok +site +ours: programs, queues and node agree", shown)


def test_on_summit_like_lsf(slurm: PrivateSlurm, tmp_path: Path) -> None:
    """On any machine: the document's commands only print."""
    (script,) = blocks("jobs-lsf.md")
    shown = read_along(slurm, tmp_path, script)
    assert shown.count("#BSUB -P ABC123") == 2
    assert "jsrun -n 2 -r 1 -g 6 -a 6 -c 42 -b packed:7" in shown
