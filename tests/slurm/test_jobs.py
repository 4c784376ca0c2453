"""Jobs on a real Slurm, as a user submits them: they run, restart, go on, and can be ended."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from private_slurm import PrivateSlurm

from hpc.metrics import read_metrics
from jobs.request import Request
from jobs.site import load_profile
from jobs.stages import Stage
from jobs.submit import prepare, submit
from preprocessing.synthetic import SynthesisOptions, synthesize

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
ON_TWO_NODES = ("--site", "generic-slurm", "--nodes", "2", "--time", "00:10:00")
LIMIT_SECONDS = 240
# Steps that take long enough to be met by what the tests do to them.
SLOW_MODEL = ("model.hidden_size=128", "model.layers=4", "model.intermediate_size=512")


class Cluster:
    """A user's shell on the private Slurm."""

    def __init__(self, slurm: PrivateSlurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.environment = {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{PROGRAMS}:{slurm.environment['PATH']}",
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_osc": "^ucx",
            "USER": "someone",
        }

    def type(self, *words: object) -> str:
        """Run a command in the user's directory and return what it prints."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env={**self.slurm.environment, **self.environment},
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: object) -> str:
        """Run `prothpc submit` and return the first job's number."""
        printed = self.type("prothpc", "submit", *words)
        match = re.match(r"job (\d+): prothpc ", printed)
        assert match is not None, printed
        return match[1]

    def state(self, job: str) -> str:
        """The state of a job, in Slurm's word."""
        format_ = ("--noheader", "--states=all", "--format=%T")
        return ",".join(sorted(set(self.type("squeue", *format_, "--jobs", job).split())))

    def wait(self, condition: Callable[[], bool], folder: Path) -> None:
        """Wait for something; show the logs if it does not come."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                logs = [path.read_text()[-3000:] for path in folder.rglob("*.log")]
                pytest.fail("\n".join([self.type("squeue", "--states=all"), *logs]))
            time.sleep(0.2)

    def wait_for(self, job: str, state: str, folder: Path) -> None:
        """Wait until a job is in a state."""
        self.wait(lambda: self.state(job) == state, folder)

    def run_again(self, job: str, folder: Path) -> None:
        """Start a requeued job now: Slurm would wait for two minutes."""
        self.wait_for(job, "PENDING", folder)
        time.sleep(2)  # an earlier update is taken back when the requeue is complete
        self.type("scontrol", "update", f"jobid={job}", "starttime=now")


@pytest.fixture
def cluster(slurm: PrivateSlurm, tmp_path: Path) -> Cluster:
    return Cluster(slurm, tmp_path)


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def log_of(folder: Path, job: str) -> str:
    return (folder / f"{job}.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(
    slurm: PrivateSlurm, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run on 2 nodes with 2 ranks each, start to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    cluster = Cluster(slurm, folder)
    job = cluster.submit(
        *("train", recipe_file, "train.run_dir=run", *SLOW_MODEL, *ON_TWO_NODES),
        *("--ranks-per-node", "2", "--no-preflight"),
    )
    cluster.wait_for(job, "COMPLETED", folder)
    return folder / "run"


def test_preprocessing_with_mpi_on_two_nodes_after_a_preflight(cluster: Cluster) -> None:
    options = SynthesisOptions(records=300, families=6, median_length=60)
    synthesize(cluster.folder / "DB.fasta.gz", options)
    job = cluster.submit(
        *("preprocess", "DB.fasta.gz", "--output", "records", *ON_TWO_NODES),
        *("--ranks-per-node", "2"),
    )
    folder = cluster.folder / "records.batch" / "0001-preprocess"
    cluster.wait_for(job, "COMPLETED", folder)
    log = log_of(folder, job)
    assert "attempt 1, job " in log
    assert "4 started by srun, met on 2 nodes, 2 on each" in log
    assert "MPI ranks" in log
    assert " 0 failed" in log
    assert "finished" in log
    cluster.type("prothpc", "verify", "records")
    shown = cluster.type("prothpc", "jobs", "records")
    assert f"job {job}: completed; finished (exit code 0)" in shown
    assert "restarts: 0" in shown


@pytest.mark.parametrize("engine", ["horovod", "deepspeed"])
def test_training_on_two_nodes_with_other_engines_has_the_same_losses(
    cluster: Cluster, recipe_file: Path, undisturbed: Path, engine: str
) -> None:
    if importlib.util.find_spec(engine) is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{engine} is missing")
    job = cluster.submit(
        *("train", recipe_file, "train.run_dir=run", f"train.engine={engine}", *SLOW_MODEL),
        "train.stop_at_step=5",
        *ON_TWO_NODES,
        *("--ranks-per-node", "2", "--no-preflight"),
    )
    folder = cluster.folder / "run" / "batch" / "0001-train"
    cluster.wait_for(job, "COMPLETED", folder)
    assert "on 4 ranks (srun" in log_of(folder, job)
    expected = losses(undisturbed)[:5]
    assert losses(cluster.folder / "run") == pytest.approx(expected, rel=1e-5)


def wait_for_step(cluster: Cluster, run: Path, step: int) -> None:
    def there() -> bool:
        return (run / "metrics.jsonl").is_file() and len(losses(run)) >= step

    cluster.wait(there, run)


def test_the_warning_signal_saves_requeues_and_changes_nothing(
    cluster: Cluster, recipe_file: Path, undisturbed: Path
) -> None:
    """Slurm itself sends the signal, some time before the end of the minute asked for."""
    run = cluster.folder / "run"
    folder = run / "batch" / "0001-train"
    job = cluster.submit(
        *("train", recipe_file, "train.run_dir=run", *SLOW_MODEL, "--site", "generic-slurm"),
        *("--nodes", "2"),
        *("--time", "00:01:00", "--ranks-per-node", "2", "--no-preflight"),
    )
    wait_for_step(cluster, run, 3)
    cluster.type("scancel", "--signal=STOP", f"{job}.0")  # 20 steps would be over too soon
    cluster.wait(lambda: "the warning signal" in log_of(folder, job), folder)
    cluster.type("scancel", "--signal=CONT", f"{job}.0")
    cluster.wait(lambda: "requeued" in log_of(folder, job), folder)
    stopped = len(losses(run))
    assert stopped < 20
    cluster.run_again(job, folder)
    cluster.wait_for(job, "COMPLETED", folder)
    log = log_of(folder, job)
    assert "SIGUSR2: saving and ending" in log
    assert re.findall(r"attempt (\d), job", log) == ["1", "2"]
    assert f"resuming at step {stopped}" in log
    assert losses(run) == losses(undisturbed)
    assert "restarts: 1" in cluster.type("prothpc", "jobs", "run")


def test_a_node_that_loses_power_is_replaced_and_changes_nothing(
    cluster: Cluster, recipe_file: Path, undisturbed: Path
) -> None:
    run = cluster.folder / "run"
    folder = run / "batch" / "0001-train"
    job = cluster.submit(
        *("train", recipe_file, "train.run_dir=run", *SLOW_MODEL, *ON_TWO_NODES),
        "checkpoint.every_steps=2",
        *("--ranks-per-node", "2", "--no-preflight"),
    )
    wait_for_step(cluster, run, 4)
    cluster.slurm.power_off("node2")
    assert len(losses(run)) < 20
    cluster.wait_for(job, "PENDING", folder)
    cluster.slurm.power_on("node2")
    cluster.run_again(job, folder)
    cluster.wait_for(job, "COMPLETED", folder)
    assert re.search(r"resuming at step [1-9]", log_of(folder, job))
    assert losses(run) == losses(undisturbed)


def test_a_chain_of_three_ends_where_one_run_does(
    cluster: Cluster, recipe_file: Path, undisturbed: Path
) -> None:
    """The third job finishes; a fourth one, which it would have been allowed to queue, is gone."""
    run = cluster.folder / "run"
    folder = run / "batch" / "0001-train"
    first = cluster.submit(
        *("train", recipe_file, "train.run_dir=run", *SLOW_MODEL, *ON_TWO_NODES, "--chain", "4"),
        *("--ranks-per-node", "2", "--no-preflight"),
    )

    def ids() -> list[str]:
        return list(dict.fromkeys((folder / "job-ids").read_text().split()))

    done = 0
    for link in (1, 2):
        cluster.wait(lambda count=link + 1: len(ids()) == count, folder)  # type: ignore[misc]
        wait_for_step(cluster, run, done + 2)
        cluster.type("scancel", "--batch", "--signal=USR2", ids()[link - 1])
        cluster.wait_for(ids()[link - 1], "FAILED", folder)
        assert f"job {ids()[link]} goes on" in log_of(folder, ids()[link - 1])
        done = len(losses(run))
    cluster.wait(lambda: len(ids()) == 4, folder)
    assert ids()[0] == first
    cluster.wait_for(ids()[2], "COMPLETED", folder)
    cluster.wait_for(ids()[3], "CANCELLED", folder)
    assert "link 3 of 4" in log_of(folder, ids()[2])
    assert losses(run) == losses(undisturbed)


def test_cancelling_saves_and_ends_the_job_and_its_successor(
    cluster: Cluster, recipe_file: Path
) -> None:
    run = cluster.folder / "run"
    folder = run / "batch" / "0001-train"
    long = ("train.steps=100000", "schedule.name=constant", "evaluation.every_steps=100000")
    job = cluster.submit(
        *("train", recipe_file, "train.run_dir=run", *long, "--chain", "2", *ON_TWO_NODES),
        "--no-preflight",
    )
    wait_for_step(cluster, run, 3)
    shown = cluster.type("prothpc", "jobs", "run")
    assert f"job {job}: running" in shown
    assert re.search(r"step \d+ of 100,000, loss \d.\d+; [\d.]+ hours of computing left", shown)
    printed = cluster.type("prothpc", "jobs", "cancel", "run")
    first, second = (folder / "job-ids").read_text().split()
    assert f"cancelled {second}, {first}" in printed
    for number in (first, second):
        cluster.wait_for(number, "CANCELLED", folder)
    cluster.wait(lambda: "ended because it was told to" in log_of(folder, job), folder)
    assert "nothing waits or runs" in cluster.type("prothpc", "jobs", "cancel", "run")


def test_ranks_that_are_each_alone_end_in_seconds(cluster: Cluster) -> None:
    """Of a launcher that says nothing of ranks, and of one that MPI does not know."""
    synthesize(cluster.folder / "DB.fasta", SynthesisOptions(records=20, families=2))
    silent = "env -u SLURM_STEP_ID -u SLURM_PROCID -u PMIX_RANK"
    launchers = {
        "silent": (f"srun --nodes=2 --ntasks=2 --mpi=none {silent}", "believes to be alone"),
        "no-pmix": ("srun --nodes=2 --ntasks=2 --mpi=none", "the launcher started 2 ranks, but"),
    }
    jobs = {}
    for name, (launcher, _) in launchers.items():
        profile = cluster.folder / f"{name}.toml"
        profile.write_text(
            f'title = "wrong"\ninherits = "generic-slurm"\n[launch]\nmpi = "{launcher}"\n'
        )
        words = ("preprocess", "DB.fasta", "--output", name, "--site", f"./{name}.toml")
        jobs[name] = cluster.submit(*words, "--nodes", "2", "--time", "00:02:00", "--no-preflight")
    for name, (_, message) in launchers.items():
        folder = cluster.folder / f"{name}.batch" / "0001-preprocess"
        cluster.wait_for(jobs[name], "FAILED", folder)  # not TIMEOUT
        assert message in log_of(folder, jobs[name])
        assert not (cluster.folder / name / "manifest.json").exists()


STAGE = """
import json, pathlib, sys
_, name, output, *rest = sys.argv
if rest[0] == "--part":
    number, parts = map(int, rest[1].split("/"))
    pathlib.Path(output).mkdir(exist_ok=True)
    pathlib.Path(output, f"part-{number}").write_text(str(number))
else:
    parts = sorted(int(path.read_text()) for path in pathlib.Path(output).glob("part-*"))
    pathlib.Path(output, "merged.json").write_text(json.dumps(parts))
"""


def in_process(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, stage: Stage) -> Request:
    for name, value in {**cluster.slurm.environment, **cluster.environment}.items():
        monkeypatch.setenv(name, value)
    return Request(
        stage=stage,
        arguments=("out",),
        directory=Path("out"),
        working_directory=cluster.folder,
        profile=load_profile("generic-slurm"),
        nodes=1,
        seconds=60,
        preflight=False,
    )


def stand_in(folder: Path, **changes: Any) -> Stage:
    """A stage whose program is in the tests."""
    (folder / "stage.py").write_text(STAGE)
    return Stage(
        **{
            "name": "parts",
            "launch": "mpi",
            "work": "corpus",
            "directory": "output",
            "jobs": "beside",
            "on_warning": "end",
            "progress": [".", "part-*"],
            "array": ["--part", "{task}/{tasks}"],
            "merge": ["--merge"],
            "program": [sys.executable, str(folder / "stage.py")],
            **changes,
        }
    )


def test_an_array_and_the_job_that_puts_its_parts_together(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = in_process(cluster, monkeypatch, stand_in(cluster.folder))
    request = dataclasses.replace(request, tasks=5, tasks_at_once=4)
    _, merge = submit(request, prepare(request))
    folder = cluster.folder / "out.batch" / "0001-parts"
    cluster.wait_for(merge, "COMPLETED", folder)
    assert json.loads((cluster.folder / "out" / "merged.json").read_text()) == [1, 2, 3, 4, 5]
    assert len(list(folder.glob("*_*.log"))) == 5


def test_restarts_that_achieve_nothing_end_with_the_reason(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stand_in(cluster.folder, on_warning="save", array=[], merge=[])
    (cluster.folder / "stage.py").write_text("raise SystemExit(85)")
    request = in_process(cluster, monkeypatch, stage)
    (job,) = submit(request, prepare(request))
    folder = cluster.folder / "out.batch" / "0001-parts"
    attempts = folder / "attempts.tsv"
    for count in (1, 2):

        def started(count: int = count) -> bool:
            return attempts.is_file() and len(attempts.read_text().splitlines()) == count

        cluster.wait(started, folder)
        cluster.run_again(job, folder)
    cluster.wait_for(job, "FAILED", folder)
    assert "two restarts in a row have achieved nothing" in log_of(folder, job)
    assert len(attempts.read_text().splitlines()) == 3


def test_software_and_shards_come_from_the_nodes_own_disks(
    cluster: Cluster, recipe_file: Path, undisturbed: Path
) -> None:
    """From an archive that a user packed, and a burst buffer that each node has for itself."""
    tree = cluster.folder / "tree"
    (tree / "bin").mkdir(parents=True)
    wrapper = tree / "bin" / "prothpc"
    wrapper.write_text(f'#!/bin/bash\necho "from $0"\nexec {PROGRAMS}/prothpc "$@"\n')
    wrapper.chmod(0o755)
    with tarfile.open(cluster.folder / "env.tar.gz", "w:gz") as archive:
        archive.add(tree, arcname=".")
    (cluster.folder / "ours.toml").write_text(
        'title = "ours"\ninherits = "generic-slurm"\n[burst_buffer]\npath = "/mnt/bb/$USER"\n'
    )
    job = cluster.submit(
        *("train", recipe_file, "train.run_dir=run", *SLOW_MODEL, "--site", "./ours.toml"),
        *("--nodes", "2"),
        *("--time", "00:02:00", "--ranks-per-node", "2", "--no-preflight"),
        *("--environment", "env.tar.gz", "--burst-buffer"),
    )
    folder = cluster.folder / "run" / "batch" / "0001-train"
    cluster.wait_for(job, "COMPLETED", folder)
    log = log_of(folder, job)
    local = f"/mnt/bb/someone/prothpc-{job}"
    assert log.count(f"from {local}/environment/bin/prothpc") == 2 + 4
    for node in (0, 1):
        assert re.search(rf"node {node} of 2: [1-3] shards, .* in {local}/records", log)
    assert f"records={local}/records" in log
    assert losses(cluster.folder / "run") == losses(undisturbed)
    assert not Path("/mnt/bb/someone").exists()


def test_slurm_takes_every_script_that_is_rendered(slurm: PrivateSlurm, tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "jobs"))
    from cases import every_combination, text_of, variants

    scripts: Mapping[str, Request] = {**every_combination(), **variants()}
    ours = {name: r for name, r in scripts.items() if r.profile.site.scheduler == "slurm"}
    assert len(ours) >= 4 * 4 + 6
    for name, request in ours.items():
        script = tmp_path / f"{name}.sh"
        script.write_text(text_of(request))
        done = slurm.run("sbatch", "--test-only", script)
        assert done.returncode == 0, f"{name}: {done.stderr}"
