"""Training, run as a user runs it: rank-invariant, bitwise stop-and-go, clear ends."""

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpc.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from hpc.config import Recipe
from hpc.data import Batcher, open_streams
from hpc.metrics import read_metrics
from hpc.stopping import REQUEUE_EXIT_CODE
from hpc.tasks import MaskedLanguageModel
from preprocessing.records import RecordSet
from preprocessing.vocabulary import PROTTRANS_BERT

Run = Callable[..., Path]


@pytest.fixture(scope="session")
def train(
    prothpc: Callable[..., subprocess.CompletedProcess[str]], recipe_file: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `prothpc train` into `run`, with overrides."""

    def start(
        run: Path,
        *overrides: str,
        options: tuple[str, ...] = (),
        **keywords: object,
    ) -> subprocess.CompletedProcess[str]:
        arguments = [recipe_file, f"train.run_dir={run}", *overrides, *options]
        return prothpc("train", *arguments, **keywords)

    return start


@pytest.fixture(scope="session")
def trained(
    train: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Return the directory of a finished run with these overrides; each is trained once."""
    finished: dict[tuple[object, ...], Path] = {}

    def run(*overrides: str, ranks: int = 1) -> Path:
        key = (*overrides, ranks)
        if key not in finished:
            folder = tmp_path_factory.mktemp("run")
            result = train(folder, *overrides, ranks=ranks)
            assert result.returncode == 0, result.stderr
            assert f"on {ranks} rank" in result.stdout
            finished[key] = folder
        return finished[key]

    return run


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def tokens(run: Path) -> list[float]:
    return [line["train/tokens"] for line in read_metrics(run) if "train/loss" in line]


def evaluations(run: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if key != "time"}
        for line in read_metrics(run)
        if "eval/loss" in line
    ]


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, moments and loader state, bit for bit."""
    a, b = (find_checkpoint(run, print) for run in (one, other))
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_losses_do_not_depend_on_the_number_of_ranks(trained: Run) -> None:
    """Also with dropout: its masks belong to step and stream, not to a rank."""
    alone, two, four = (trained("model.dropout=0.1", ranks=ranks) for ranks in (1, 2, 4))
    assert len(losses(alone)) == 20
    for other in (two, four):
        assert losses(other) == pytest.approx(losses(alone), rel=1e-5)
        assert tokens(other) == tokens(alone)
        for evaluated, expected in zip(evaluations(other), evaluations(alone), strict=True):
            assert evaluated == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_ranks_have_unequal_target_counts(recipe: Recipe) -> None:
    """Otherwise the test above could not tell the global denominator from a local one."""
    records = RecordSet(Path(recipe.data.records))
    task = MaskedLanguageModel(recipe.objective, PROTTRANS_BERT)
    batcher = Batcher(records, PROTTRANS_BERT, recipe.data, recipe.train.seed)
    streams = open_streams(batcher, recipe.data, recipe.train, len(records), 0, 1)
    counts = [task.prepare(stream.next()).counts["mlm"] for stream in streams]
    assert max(counts) > 1.3 * min(counts)


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [(("model.dropout=0.1",), 1), (("model.dropout=0.1",), 2), (("train.precision=bf16",), 2)],
)
def test_stop_and_go_is_bitwise(
    train: Callable[..., subprocess.CompletedProcess[str]],
    trained: Run,
    tmp_path: Path,
    overrides: tuple[str, ...],
    ranks: int,
) -> None:
    straight = trained(*overrides, ranks=ranks)
    stopped = train(tmp_path, *overrides, "train.stop_at_step=7", ranks=ranks)
    assert stopped.returncode == 0, stopped.stderr
    assert "saved at step 7 of 20; the same command goes on" in stopped.stdout
    resumed = train(tmp_path, *overrides, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 7" in resumed.stdout
    assert losses(tmp_path) == losses(straight)
    assert evaluations(tmp_path) == evaluations(straight)
    assert_same_state(tmp_path, straight)


def test_a_run_moves_to_another_number_of_ranks(
    train: Callable[..., subprocess.CompletedProcess[str]], trained: Run, tmp_path: Path
) -> None:
    straight = trained("model.dropout=0.1")
    for ranks, stop in ((2, "train.stop_at_step=10"), (4, "train.stop_at_step=20")):
        result = train(tmp_path, "model.dropout=0.1", stop, ranks=ranks)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=1e-5)
    assert tokens(tmp_path) == tokens(straight)


def test_torchrun_launches_the_same_command(
    trained: Run, recipe_file: Path, rank_environment: dict[str, str], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    arguments = ["train", str(recipe_file), f"train.run_dir={tmp_path}", "train.stop_at_step=5"]
    result = subprocess.run(
        [*torchrun, "--standalone", "-m", "hpc.cli", *arguments],
        env=rank_environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "2 ranks (torchrun" in result.stdout
    assert losses(tmp_path) == pytest.approx(losses(trained())[:5], rel=1e-5)


def test_bf16_follows_fp32_and_keeps_float32_masters(trained: Run) -> None:
    bf16, fp32 = trained("train.precision=bf16", ranks=2), trained()
    assert losses(bf16) != losses(fp32)
    assert losses(bf16) == pytest.approx(losses(fp32), rel=0.02)
    checkpoint = read_checkpoint(find_checkpoint(bf16, print))
    stored = [*checkpoint.weights.values(), *checkpoint.moments["exp_avg"].values()]
    assert {tensor.dtype for tensor in stored} == {torch.float32}
    master = checkpoint.weights["token_embedding.weight"]
    assert not torch.equal(master, master.bfloat16().float())


def test_the_model_learns(trained: Run) -> None:
    curve = losses(trained())
    assert curve[-1] < curve[0] - 0.15


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_and_asks_for_another_turn(
    train: Callable[..., subprocess.CompletedProcess[str]],
    trained: Run,
    recipe_file: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    command = [sys.executable, "-m", "hpc.cli", "train", str(recipe_file)]
    command += [f"train.run_dir={tmp_path}", "train.steps=100000", "schedule.name=constant"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() or len(read_metrics(tmp_path)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == REQUEUE_EXIT_CODE
    assert f"{number.name}: saving and ending" in output
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert int(newest.name[5:]) == read_metrics(tmp_path)[-1]["step"]


def test_resume_passes_over_a_broken_checkpoint(
    train: Callable[..., subprocess.CompletedProcess[str]], trained: Run, tmp_path: Path
) -> None:
    straight = trained()
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    broken = run / "checkpoints" / "step-00000020" / "weights.safetensors"
    broken.write_bytes(broken.read_bytes()[:-8] + b"\0" * 8)
    result = train(run)
    assert result.returncode == 0, result.stderr
    assert "wrong checksum: passing over" in result.stdout
    assert "resuming at step 10" in result.stdout
    assert_same_state(run, straight)


def test_a_finished_run_stays_as_it_is(
    train: Callable[..., subprocess.CompletedProcess[str]], trained: Run
) -> None:
    before = (trained() / "metrics.jsonl").read_bytes()
    result = train(trained())
    assert result.returncode == 0, result.stderr
    assert "finished all 20 steps" in result.stdout
    assert (trained() / "metrics.jsonl").read_bytes() == before


def test_training_starts_from_exported_weights(
    train: Callable[..., subprocess.CompletedProcess[str]],
    prothpc: Callable[..., subprocess.CompletedProcess[str]],
    trained: Run,
    tmp_path: Path,
) -> None:
    """The Hugging Face directory gives the same first loss as the checkpoint it came from."""
    exported = prothpc("export", trained(), tmp_path / "model", "--format", "hf")
    assert exported.returncode == 0, exported.stderr
    first = {}
    for name, source in (("hf", tmp_path / "model"), ("ours", trained())):
        result = train(tmp_path / name, f"train.init_from={source}", "train.stop_at_step=1")
        assert result.returncode == 0, result.stderr
        assert "starting from the weights in" in result.stdout
        first[name] = losses(tmp_path / name)[0]
    assert first["hf"] == first["ours"]
    assert first["ours"] < losses(trained())[0] - 0.15


def test_tensorboard_gets_what_metrics_get(
    train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tmp_path, "train.stop_at_step=3", "log.tensorboard=true")
    assert result.returncode == 0, result.stderr
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses(tmp_path))


def test_the_log_shows_the_share_of_the_peak(
    train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = train(tmp_path, "train.stop_at_step=2", "log.peak_tflops=0.5", ranks=2)
    assert result.returncode == 0, result.stderr
    assert "  MFU " in result.stdout
    for line in read_metrics(tmp_path):
        assert line["train/mfu"] == pytest.approx(line["train/tflops"] / 0.5)
        # 6 operations for each real token and each of 18,368 weights in products, and attention.
        per_token = line["train/tflops"] * 1e12 * 2 / line["train/tokens_per_second"]
        assert 6 * 18_368 < per_token < 2 * 6 * 18_368


def test_a_terminal_shows_a_progress_bar_beside_the_lines(
    recipe_file: Path, rank_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "hpc.cli", "train", str(recipe_file)]
    command += [f"train.run_dir={tmp_path}", "train.stop_at_step=3"]
    ours, theirs = pty.openpty()
    environment = {**rank_environment, "TERM": "xterm"}
    process = subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal that nobody holds with EIO
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert "3/20" in shown.decode()
    assert "━" in shown.decode()
    assert "step  3/20  loss" in shown.decode()


def test_divergence_stops_with_advice_and_saves_nothing_broken(
    train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = train(
        tmp_path, "optimizer.lr=1e30", "schedule.warmup_steps=0", "checkpoint.every_steps=1"
    )
    assert result.returncode == 1
    assert "training diverged: the gradient norm is" in result.stderr
    assert "lower optimizer.lr" in result.stderr
    for path in list_checkpoints(tmp_path / "checkpoints"):
        weights = read_checkpoint(path).weights
        assert all(tensor.isfinite().all() for tensor in weights.values())


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One sentence of ours on rank 0, no traceback, not exit code 0."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    ours = [line for line in result.stderr.splitlines() if line.startswith("prothpc: ")]
    assert len(ours) == 1, result.stderr
    for part in parts:
        assert part in ours[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("train.stesp=5",), ("unknown key train.stesp", "did you mean steps?")),
        (("data.records=nowhere",), ("nowhere", "not a record set", "prothpc preprocess")),
        (("model.vocab_size=31",), ("model.vocab_size = 31", "has 30 tokens")),
        (("train.init_from=nowhere",), ("nowhere",)),
    ],
)
def test_wrong_input_ends_in_one_sentence_on_every_rank(
    train: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    overrides: tuple[str, ...],
    parts: tuple[str, ...],
    ranks: int,
) -> None:
    assert_refused(train(tmp_path, *overrides, ranks=ranks, timeout=60), *parts)


def test_a_world_that_cannot_share_the_streams_names_those_that_can(
    train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = train(tmp_path, ranks=3)
    assert_refused(result, "3 ranks cannot share 4 micro-batches", "use 1, 2 or 4 ranks")


def test_a_missing_shard_is_named(
    train: Callable[..., subprocess.CompletedProcess[str]], record_set: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records"
    shutil.copytree(record_set, records)
    (records / "shard-00002.arrow").unlink()
    result = train(tmp_path / "run", f"data.records={records}", ranks=2)
    assert_refused(result, "shard-00002.arrow", "missing", "prothpc verify")


def test_a_shard_that_vanishes_on_one_rank_ends_all(
    train: Callable[..., subprocess.CompletedProcess[str]], record_set: Path, tmp_path: Path
) -> None:
    """Right size, but no Arrow file: only the rank that owns its streams notices, later."""
    records = tmp_path / "records"
    shutil.copytree(record_set, records)
    shard = records / "shard-00003.arrow"
    shard.write_bytes(bytes(shard.stat().st_size))
    result = train(
        tmp_path / "run", f"data.records={records}", "evaluation.every_steps=0", ranks=2, timeout=60
    )
    assert result.returncode != 0
    assert "shard-00003.arrow: cannot be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_checkpoint_of_another_model_is_refused(
    train: Callable[..., subprocess.CompletedProcess[str]], trained: Run
) -> None:
    result = train(trained(), "model.layers=3", "train.steps=30")
    assert_refused(result, "another model", "model.layers is 2 there and 3 here")


def test_a_change_of_the_order_of_samples_is_refused(
    train: Callable[..., subprocess.CompletedProcess[str]], trained: Run
) -> None:
    result = train(trained(), "train.micro_batch=4", "train.steps=30")
    assert_refused(result, "train.micro_batch = 8, not 4", "train.init_from=")


def test_other_changes_are_reported(
    train: Callable[..., subprocess.CompletedProcess[str]], trained: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    result = train(run, "train.steps=22", "optimizer.lr=1e-4")
    assert result.returncode == 0, result.stderr
    assert "changed since the checkpoint: optimizer.lr = 0.0001 (was 0.001)" in result.stdout
    assert len(losses(run)) == 22


def test_resume_never_does_not_overwrite(
    train: Callable[..., subprocess.CompletedProcess[str]], trained: Run
) -> None:
    result = train(trained(), options=("--resume", "never"))
    assert_refused(result, "holds checkpoints", "another train.run_dir")


def test_the_checkpoint_says_what_it_is(trained: Run) -> None:
    path = find_checkpoint(trained(), print)
    recipe = json.loads((path / "recipe.json").read_text())
    state = json.loads((path / "state.json").read_text())
    assert recipe["optimizer"]["lr"] == 1e-3
    assert state["step"] == 20
    assert len(state["streams"]) == 4
    assert state["model"]["layers"] == 2
