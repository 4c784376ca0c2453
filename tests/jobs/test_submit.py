"""`prothpc submit`, `jobs` and `stage`, with programs that only note how they are called."""

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hpc.cli import app
from hpc.commands import corpus, training
from hpc.commands.jobs import estimate_seconds
from jobs.stages import stages
from preprocessing.errors import InputError

PREPROCESS = ("preprocess", "DB.fasta.gz", "--output", "records", "--site", "generic-slurm")
TWO_NODES = ("--nodes", "2", "--time", "00:10:00")


class Desk:
    """A user's directory and terminal, with programs that note how they are called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._programs = folder / "programs"
        self._programs.mkdir()
        monkeypatch.setenv("PATH", str(self._programs))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        monkeypatch.chdir(folder)

    def program(self, name: str, answer: str, exit_code: int = 0) -> None:
        """Put a program on PATH that notes its arguments, answers and exits."""
        path = self._programs / name
        path.write_text(
            f'#!/bin/bash\necho "{name} $*" >> {self.folder}/calls\n'
            f"printf '%s\\n' {shlex.quote(answer)}\nexit {exit_code}\n"
        )
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def type(self, *words: str) -> tuple[str, str]:
        """Run prothpc; return what it prints, and to stderr."""
        result = CliRunner().invoke(app, list(words), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout, result.stderr

    def refusal(self, *words: str) -> str:
        """Run prothpc, which refuses; return what it says."""
        try:
            result = CliRunner().invoke(app, list(words), catch_exceptions=False)
        except InputError as error:
            return str(error)
        assert result.exit_code == 2, result.output
        return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, monkeypatch)


def test_a_dry_run_prints_exactly_what_would_be_submitted_and_leaves_nothing(desk: Desk) -> None:
    printed, notes = desk.type("submit", *PREPROCESS, *TWO_NODES, "--dry-run")
    script = desk.folder / "records.batch" / "0001-preprocess" / "job.sh"
    assert f"submitted with: sbatch --parsable {script}" in notes
    assert not script.exists()
    assert desk.calls == []
    desk.program("sbatch", "17")
    desk.type("submit", *PREPROCESS, *TWO_NODES)
    assert script.read_text() == printed


def test_slurm_checks_the_script_before_it_gets_it(desk: Desk) -> None:
    desk.program("sbatch", "17;cluster")
    printed, _ = desk.type("submit", *PREPROCESS, *TWO_NODES, "--after", "12")
    folder = desk.folder / "records.batch" / "0001-preprocess"
    script = folder / "job.sh"
    assert desk.calls == [
        f"sbatch --test-only {script}",
        f"sbatch --parsable --dependency=afterok:12 --kill-on-invalid-dep=yes {script}",
    ]
    assert "job 17: prothpc preprocess on generic-slurm, 2 nodes with 1 ranks each" in printed
    assert "--ranks-per-node" in printed, "the profile does not say how large a node is"
    assert str(folder) in printed
    assert (folder / "job-ids").read_text() == "17\n"
    note = json.loads((folder / "submission.json").read_text())
    assert (note["stage"], note["nodes"], note["seconds"]) == ("preprocess", 2, 600)
    assert note["arguments"] == ["DB.fasta.gz", "--output", "records"]
    desk.type("submit", *PREPROCESS, *TWO_NODES)
    assert (desk.folder / "records.batch" / "0002-preprocess").is_dir()


def test_what_slurm_refuses_is_told_in_its_words_and_not_submitted(desk: Desk) -> None:
    desk.program("sbatch", "allocation failure: Invalid account", exit_code=1)
    refusal = desk.refusal("submit", *PREPROCESS, *TWO_NODES)
    assert "Slurm would not take this job: allocation failure: Invalid account" in refusal
    assert len(desk.calls) == 1


def test_lsf_gets_the_script_as_its_site_takes_it(desk: Desk) -> None:
    desk.program("bsub", "Job <31> is submitted to queue <batch>.")
    common = ("--time", "00:10:00", "--output", "records")
    printed, _ = desk.type(
        *("submit", "preprocess", "DB.fasta", "--site", "summit", "--project", "A", *common)
    )
    assert "job 31: " in printed
    script = desk.folder / "records.batch" / "0001-preprocess" / "job.sh"
    assert desk.calls == [f"bsub {script}"]
    desk.type("submit", "preprocess", "DB.fasta", "--site", "generic-lsf", *common, "--after", "31")
    assert desk.calls[1] == "bsub -w done(31)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PREPROCESS, "--nodes", "2"), "--time is missing"),
        ((*PREPROCESS, *TWO_NODES, "--holdot", "0.1"), "No such option: --holdot"),
        (
            ("preprocess", "--output", "r", "--site", "generic-slurm", *TWO_NODES),
            "Missing argument",
        ),
        (("deploy", "--site", "generic-slurm"), "'deploy' is no stage that can be a job"),
        ((*PREPROCESS, *TWO_NODES, "\u2014\u2014nodes"), "begins with EM DASH"),
        ((*PREPROCESS, *TWO_NODES, "--burst-buffer"), "--burst-buffer is for train"),
        ((*PREPROCESS, *TWO_NODES, "--environment", "none.tar"), "does not exist"),
        (("train", "none.toml", "--site", "local"), "no recipe 'none.toml'"),
        (("train", "protbert-tiny", "train.step=3", "--site", "local"), "did you mean steps?"),
        (
            (
                "train",
                "protbert-tiny",
                "--site",
                "generic-slurm",
                *TWO_NODES,
                "--ranks-per-node",
                "3",
            ),
            "6 ranks, which cannot share the recipe's 8 micro-batches",
        ),
        ((*PREPROCESS, *TWO_NODES), "sbatch is not on PATH"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_submitted(
    desk: Desk, words: tuple[str, ...], message: str
) -> None:
    assert message in desk.refusal("submit", *words)
    assert desk.calls == []


def test_no_option_of_submit_hides_one_of_a_stage() -> None:
    def names(command: typer.core.TyperCommand) -> set[str]:
        return {name for parameter in command.params for name in parameter.opts if name[0] == "-"}

    submit = names(typer.main.get_group(app).commands["submit"])  # type: ignore[arg-type]
    commands = {
        **typer.main.get_group(corpus.app).commands,
        **typer.main.get_group(training.app).commands,
    }
    for name in stages():
        shared = names(commands[name]) & submit  # type: ignore[arg-type]
        # The site is handed on; an estimate of preprocess is not made in a job.
        assert shared == {"doctor": {"--site"}, "preprocess": {"--dry-run"}}.get(name, set())


def test_jobs_tells_state_restarts_reason_and_the_end_of_the_log(desk: Desk) -> None:
    desk.program("sbatch", "17")
    desk.type("submit", *PREPROCESS, *TWO_NODES)
    folder = desk.folder / "records.batch" / "0001-preprocess"
    desk.program("squeue", "RUNNING|None")
    shown, _ = desk.type("jobs", "records")
    assert "0001-preprocess: prothpc preprocess on generic-slurm, 2 nodes, 2 ranks" in shown
    assert "job 17: running" in shown
    (folder / "attempts.tsv").write_text("17\t1000\tx\n17\t2000\ty\n")
    (folder / "17.log").write_text("".join(f"line {number}\n" for number in range(9)))
    (folder / "ends.tsv").write_text("17\t85\tgoes on\n17\t1\tfailed with exit code 1\n")
    desk.program("squeue", "slurm_load_jobs error: Invalid job id specified", exit_code=1)
    for name in ("records", str(folder)):
        shown, _ = desk.type("jobs", name)
        assert "not known to the scheduler any more; failed with exit code 1" in shown
        assert "restarts: 1; the last attempt began" in shown
        assert "line 4\n" in shown
        assert "line 3\n" not in shown
    assert "no jobs of prothpc submit here" in desk.refusal("jobs", "elsewhere")
    assert "give one directory" in desk.refusal("jobs", "a", "b")


def test_jobs_reads_lsf(desk: Desk) -> None:
    desk.program("bsub", "Job <31> is submitted to queue <batch>.")
    words = ("preprocess", "DB.fasta", "--output", "records", "--time", "00:10:00")
    desk.type("submit", *words, "--site", "generic-lsf")
    records = [{"JOBID": "31", "STAT": "PEND", "EXIT_REASON": ""}]
    desk.program("bjobs", json.dumps({"COMMAND": "bjobs", "JOBS": 1, "RECORDS": records}))
    shown, _ = desk.type("jobs", "records")
    assert "job 31: pending" in shown
    assert desk.calls[-1] == "bjobs -o JOBID STAT EXIT_REASON -json -a 31"
    desk.program("bkill", "Job <31> is being terminated")
    assert "cancelled 31" in desk.type("jobs", "cancel", "records")[0]
    assert desk.calls[-1] == "bkill 31"


def test_the_estimate_leaves_out_the_wait_between_attempts() -> None:
    times = [0, 10, 20, 30, 5000, 5010, 5020]
    lines = [{"step": step, "time": at} for step, at in enumerate(times, 1)]
    assert estimate_seconds(lines, 17) == pytest.approx(100)
    assert estimate_seconds(lines[:1], 17) is None
    assert estimate_seconds(lines, 7) is None


def test_staging_makes_a_whole_record_set_of_copies_and_links(
    desk: Desk, record_set: Path, prothpc: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    local = desk.folder / "nvme"
    printed, _ = desk.type("stage", str(record_set), str(local))
    assert "node 0 of 1: 4 shards" in printed
    assert prothpc("verify", local).returncode == 0
    copies = {path.name for path in local.glob("*.arrow") if not path.is_symlink()}
    assert len(copies) == 4
    shard = local / "shard-00001.arrow"
    shard.write_bytes(b"cut short")
    (local / "manifest.json").write_bytes(b"of another record set")
    desk.type("stage", str(record_set), str(local))
    assert prothpc("verify", local).returncode == 0
    assert "no record set" in desk.refusal("stage", "nothing", str(local))


def test_each_node_stages_its_own_shards_and_together_all(
    desk: Desk, record_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned: list[set[str]] = []
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    for node in range(4):
        for name, value in {
            "SLURM_PROCID": node,
            "SLURM_NODEID": node,
            "SLURM_LOCALID": 0,
            "SLURM_STEP_NUM_TASKS": 4,
            "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
        }.items():
            monkeypatch.setenv(name, str(value))
        local = desk.folder / f"node{node}"
        desk.type("stage", str(record_set), str(local))
        owned.append({path.name for path in local.glob("*.arrow") if not path.is_symlink()})
        assert len(list(local.glob("*.arrow"))) == len(list(record_set.glob("*.arrow")))
    assert set().union(*owned) == {f"shard-{number:05d}.arrow" for number in range(4)}
    assert all(1 <= len(names) < 4 for names in owned)
