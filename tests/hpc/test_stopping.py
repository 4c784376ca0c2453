"""A run that is asked to end does so at a step boundary, loses nothing, and says so by its code."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.checkpoint import list_checkpoints, read_checkpoint
from hpc.config import load_recipe
from hpc.metrics import read_metrics
from hpc.stopping import REQUEUE_EXIT_CODE, StopSignals
from hpc.train import train
from preprocessing.errors import InputError


@pytest.fixture(autouse=True)
def _signals_of_the_tests_stay() -> Iterator[None]:
    """`StopSignals` takes them over; pytest, too, has to end on SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class AfterCalls(StopSignals):
    """Asks to end when it has been looked at so many times."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def reason(self, save_seconds: float) -> str | None:
        self.calls -= 1
        return "enough" if self.calls < 0 else None


def curve(run: Path) -> list[dict[str, float]]:
    kept = ("step", "train/loss", "eval/loss", "eval/learned")
    return [{key: line[key] for key in kept if key in line} for line in read_metrics(run)]


# Each step looks once, and so does each of 3 batches of the evaluations after steps 10 and 20.
@pytest.mark.parametrize(
    ("calls", "step", "due"),
    [(0, 1, False), (9, 10, True), (10, 10, True), (12, 10, True), (13, 11, False), (24, 20, True)],
)
def test_a_stop_in_steps_or_evaluations_changes_nothing(
    recipe_file: Path, tmp_path: Path, calls: int, step: int, due: bool
) -> None:
    def recipe(name: str) -> list[str]:
        return [f"train.run_dir={tmp_path / name}", "schedule.name=plateau", "schedule.window=3"]

    assert train(load_recipe(recipe_file, recipe("straight")), signals=AfterCalls(1000)) == 0
    stopped = load_recipe(recipe_file, recipe("stopped"))
    assert train(stopped, signals=AfterCalls(calls)) == REQUEUE_EXIT_CODE
    newest = list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1]
    assert read_checkpoint(newest).state["step"] == step
    assert read_checkpoint(newest).state["evaluation_due"] == due
    assert train(stopped, signals=AfterCalls(1000)) == 0
    assert curve(tmp_path / "stopped") == curve(tmp_path / "straight")
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        one, other = (
            tmp_path / run / "checkpoints" / "step-00000020" / name
            for run in ("straight", "stopped")
        )
        assert one.read_bytes() == other.read_bytes()


def test_the_clock_of_the_job_leaves_time_for_a_checkpoint() -> None:
    def reason(left: float, lead: str, save_seconds: float) -> str | None:
        environ = {"PROTHPC_END_AT": str(time.time() + left), "PROTHPC_LEAD": lead}
        return StopSignals(environ=environ).reason(save_seconds)

    assert reason(400, "300", 5) is None
    assert reason(290, "300", 5) == "time is nearly up"
    assert reason(400, "300", 350) == "time is nearly up"
    assert reason(500, "300", 350) is None
    assert StopSignals(environ={}).reason(1e9) is None
    in_slurm = {"SLURM_JOB_END_TIME": str(int(time.time()) + 70)}
    assert StopSignals(environ=in_slurm).reason(1) is None
    assert StopSignals(environ=in_slurm).reason(30) is not None
    assert StopSignals(seconds=1000, environ=in_slurm).reason(30) is None, "the option counts"


@pytest.mark.parametrize(
    ("environ", "warning", "message"),
    [
        ({"PROTHPC_END_AT": "noon", "PROTHPC_LEAD": "1"}, "USR2", "PROTHPC_END_AT='noon'"),
        ({"PROTHPC_END_AT": "1"}, "USR2", "PROTHPC_LEAD=None"),
        ({}, "KILL", "--stop-signal KILL: choose one of USR2, USR1"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    environ: dict[str, str], warning: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        StopSignals(environ=environ, warning=warning)


@pytest.mark.slow
def test_a_signal_while_python_still_imports_is_not_lost(
    recipe_file: Path, rank_environment: dict[str, str], tmp_path: Path
) -> None:
    """Importing torch takes seconds; by default the signal would end the process."""
    command = [sys.executable, "-m", "hpc.cli", "train", str(recipe_file)]
    command += [f"train.run_dir={tmp_path}", "--stop-signal", "USR1"]
    process = subprocess.Popen(command, env=rank_environment, stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    caught = 1 << (signal.SIGUSR1 - 1)
    deadline = time.monotonic() + 60
    while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) & caught:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    os.kill(process.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == REQUEUE_EXIT_CODE
    endings = [line for line in output.splitlines() if line.endswith("saving and ending")]
    assert endings == ["SIGUSR1: saving and ending"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]


@pytest.mark.slow
def test_a_run_ends_by_itself_after_the_time_given(
    recipe_file: Path, rank_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "hpc.cli", "train", str(recipe_file)]
    command += [f"train.run_dir={tmp_path}", "train.steps=1000000", "schedule.name=constant"]
    command += ["--stop-after", "00:00:05"]
    done = subprocess.run(
        command, env=rank_environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == REQUEUE_EXIT_CODE, done.stderr
    assert "time is nearly up: saving and ending" in done.stdout
