"""Transformer-XL trained as a user trains it: engines, ranks, stop-and-go, use of memory."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpc.checkpoint import find_checkpoint
from hpc.lane_memory import LaneMemory, file_name
from hpc.metrics import read_metrics
from models.transformer_xl import TransformerXL, TransformerXLConfig
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.parallel import connect
from preprocessing.synthetic import SynthesisOptions, synthesize

RECIPE = """
[model]
name = "transformer-xl"
hidden_size = 32
layers = 2
heads = 2
head_size = 12
intermediate_size = 64
memory_length = 24
dropout = 0.1
initializer_std = 0.1
[data]
records = "{records}"
length = 16
block_records = 16
[train]
run_dir = "run"
steps = 20
global_batch = 16
micro_batch = 4
[optimizer]
lr = 2e-3
[schedule]
warmup_steps = 5
[evaluation]
every_steps = 10
records = 24
micro_batch = 8
[checkpoint]
every_steps = 10
[log]
every_steps = 1
tensorboard = false
"""
ENGINES = {
    "torch": [],
    "horovod": ["train.engine=horovod"],
    "deepspeed-2": ["train.engine=deepspeed", "train.zero_stage=2"],
    "deepspeed-3": ["train.engine=deepspeed", "train.zero_stage=3"],
}
Completed = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def lane_recipe(record_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "lanes.toml"
    path.write_text(RECIPE.format(records=record_set))
    return path


@pytest.fixture(scope="session")
def train(prothpc: Callable[..., Completed], lane_recipe: Path) -> Callable[..., Completed]:
    """Run `prothpc train` into `run`, with overrides."""

    def start(run: Path, *overrides: str, **keywords: object) -> Completed:
        return prothpc("train", lane_recipe, f"train.run_dir={run}", *overrides, **keywords)

    return start


@pytest.fixture(scope="session")
def straight(train: Callable[..., Completed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on 2 ranks."""
    run = tmp_path_factory.mktemp("straight")
    result = train(run, ranks=2)
    assert result.returncode == 0, result.stderr
    return run


def values(run: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(run) if name in line]


def losses(run: Path) -> list[float]:
    return values(run, "train/loss")


def newest(run: Path) -> Path:
    return find_checkpoint(run, print)


def test_a_run_is_logged_evaluated_and_saved(straight: Path) -> None:
    assert len(losses(straight)) == 20
    assert losses(straight)[-1] < losses(straight)[0] - 0.1
    assert values(straight, "train/tokens")[-1] == 20 * 16 * 16
    assert values(straight, "train/padding") == [0.0] * 20
    assert len(values(straight, "eval/learned")) == 2
    state = json.loads((newest(straight) / "state.json").read_text())
    assert state["model"]["name"] == "transformer-xl"
    assert [len(cursor) for cursor in state["streams"]] == [1 + 2 * 4] * 4
    for rank in range(2):
        memory = load_file(newest(straight) / file_name(4, rank, 2))
        expected = {f"{s}.{n}" for s in (2 * rank, 2 * rank + 1) for n in range(2)}
        assert memory.keys() == expected
        assert {tuple(tensor.shape) for tensor in memory.values()} == {(4, 24, 32)}
        assert all(tensor.any() for tensor in memory.values())


def test_stop_and_go_is_bitwise(
    train: Callable[..., Completed], straight: Path, tmp_path: Path
) -> None:
    for stop in (7, 20):
        result = train(tmp_path, f"train.stop_at_step={stop}", ranks=2)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == losses(straight)
    assert values(tmp_path, "eval/loss") == values(straight, "eval/loss")
    files = sorted(path.name for path in newest(straight).iterdir())
    assert "lanes-000002.safetensors" in files
    for name in set(files) - {"recipe.json", "checkpoint.json"}:
        assert (newest(tmp_path) / name).read_bytes() == (newest(straight) / name).read_bytes()


@pytest.mark.slow
def test_lanes_move_with_their_streams_from_2_to_4_ranks_and_to_1(
    train: Callable[..., Completed], straight: Path, tmp_path: Path
) -> None:
    for ranks, stop in ((2, 8), (4, 14), (1, 20)):
        result = train(tmp_path, f"train.stop_at_step={stop}", ranks=ranks)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=1e-5)
    assert values(tmp_path, "train/tokens") == values(straight, "train/tokens")
    saved = {}
    for rank in range(2):
        saved |= load_file(newest(straight) / file_name(4, rank, 2))
    moved = load_file(newest(tmp_path) / file_name(4, 0, 1))
    torch.testing.assert_close(moved, saved, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_memory_is_recomputed_or_reset_if_the_recipe_says_so(
    train: Callable[..., Completed], straight: Path, tmp_path: Path
) -> None:
    after = {}
    for mode in ("recompute", "reset"):
        run = tmp_path / mode
        for stop in (12, 13):
            result = train(run, f"checkpoint.memory={mode}", f"train.stop_at_step={stop}")
            assert result.returncode == 0, result.stderr
        files = [path.name for path in newest(run).glob("lanes-*")]
        assert files == (["lanes-000000.safetensors"] if mode == "recompute" else [])
        after[mode] = losses(run)[12]
    tokens = load_file(newest(tmp_path / "recompute") / "lanes-000000.safetensors")
    assert {(t.dtype, tuple(t.shape)) for t in tokens.values()} == {(torch.uint8, (4, 48))}
    exact = losses(straight)[12]
    assert abs(after["recompute"] - exact) < abs(after["reset"] - exact) / 2
    # A run that saves memory goes on from a checkpoint that has none, and says so.
    result = train(tmp_path / "reset", "train.stop_at_step=14")
    assert result.returncode == 0, result.stderr
    assert "holds no memory of the lanes: it begins empty" in result.stdout


class OneRank:
    """An engine that only computes."""

    device = torch.device("cpu")

    def __init__(self, model: TransformerXL) -> None:
        self._model = model

    def compute(self, function: Callable[..., object], *arguments: object) -> object:
        with torch.no_grad():
            return function(self._model, *arguments)


def test_recomputed_memory_is_the_one_that_was_there() -> None:
    """Exactly, where twice the memory holds all that a layer has seen: with two layers."""
    torch.manual_seed(0)
    config = TransformerXLConfig(
        hidden_size=16, layers=2, heads=2, head_size=8, intermediate_size=16, memory_length=8
    )
    model = TransformerXL(config).eval()
    kept, read = LaneMemory("recompute", 8, 4), LaneMemory("recompute", 8, 4)
    for segment in torch.randint(5, 25, (3, 40)).split(4, dim=1):
        _, memory = OneRank(model).compute(lambda m, s: m(s, kept.of(0)), segment)  # type: ignore[misc]
        kept.put(0, memory, segment)
        kept.advance()
    read.load(0, {"tokens": kept.tensors()["0.tokens"]}, OneRank(model))  # type: ignore[arg-type]
    for found, expected in zip(read.of(0), kept.of(0), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_memory_ends_all_ranks_with_a_sentence(
    train: Callable[..., Completed], straight: Path, tmp_path: Path, ranks: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    file = newest(run) / "lanes-000002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = train(run, ranks=ranks, timeout=60)
    assert result.returncode != 0
    assert "lanes-000002.safetensors has a wrong checksum" in result.stderr
    assert "Traceback" not in result.stderr
    file.unlink()
    again = train(run, ranks=ranks)
    assert "lanes-000002.safetensors is missing: passing over this checkpoint" in again.stdout
    assert "resuming at step 10" in again.stdout
    assert losses(run) == pytest.approx(losses(straight), rel=1e-5)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of `make demo`."""
    folder = tmp_path_factory.mktemp("families")
    options = SynthesisOptions(records=6000, families=16, median_length=100, min_identity=0.7)
    synthesize(folder / "corpus.fasta", options)
    kept = PreprocessOptions(shards=4, holdout=0.04, min_length=30)
    generate([folder / "corpus.fasta"], folder / "records", kept, connect(1))
    return folder / "records"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "horovod", "deepspeed-2"])
def test_the_tiny_recipe_learns_order_on_each_engine(
    prothpc: Callable[..., Completed], families: Path, tmp_path: Path, engine: str
) -> None:
    """A quarter of the recipe's lanes are enough."""
    pytest.importorskip(engine.partition("-")[0])
    result = prothpc(
        *("train", "prottxl-tiny", f"data.records={families}", f"train.run_dir={tmp_path}"),
        *("train.steps=150", "schedule.warmup_steps=40", "train.global_batch=16"),
        *("evaluation.every_steps=150", "evaluation.records=96", *ENGINES[engine]),
        ranks=2,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    (learned,) = values(tmp_path, "eval/learned")
    assert learned >= 0.3


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["horovod", "deepspeed-2", "deepspeed-3"])
def test_each_engine_gives_the_same_losses(
    train: Callable[..., Completed], straight: Path, tmp_path: Path, engine: str
) -> None:
    pytest.importorskip(engine.partition("-")[0])
    result = train(tmp_path, "train.stop_at_step=10", *ENGINES[engine], ranks=2)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == pytest.approx(losses(straight)[:10], rel=1e-5)
    assert values(tmp_path, "eval/loss") == pytest.approx(
        values(straight, "eval/loss")[:1], rel=1e-5
    )


@pytest.fixture(scope="session")
def repeats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proteins that repeat a random motif of 40 residues four times: no segment of 32 shows two."""
    folder = tmp_path_factory.mktemp("repeats")
    draw = random.Random(0)
    with (folder / "repeats.fasta").open("w") as fasta:
        for number in range(600):
            motif = "".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=40))
            fasta.write(f">r{number}\n{motif * 4}\n")
    options = PreprocessOptions(shards=2, holdout=0.1)
    generate([folder / "repeats.fasta"], folder / "records", options, connect(1))
    return folder / "records"


@pytest.mark.slow
def test_memory_finds_what_repeats_beyond_the_segment(
    train: Callable[..., Completed], repeats: Path, tmp_path: Path
) -> None:
    loss = {}
    for name, overrides in {
        "with": ("model.memory_length=48",),
        "without": ("model.memory_length=0",),
        "forgetful": ("model.memory_length=48", "evaluation.memory_length=0"),
    }.items():
        run = tmp_path / name
        options = (f"data.records={repeats}", "data.length=32", "train.micro_batch=16")
        options += ("model.layers=1", "model.hidden_size=64", "model.head_size=32")
        options += ("model.norm=pre", "model.dropout=0.0", "train.steps=300", "optimizer.lr=3e-3")
        options += ("evaluation.every_steps=300", "log.every_steps=300")
        result = train(run, *options, *overrides)
        assert result.returncode == 0, result.stderr
        (loss[name],) = values(run, "eval/loss")
    # Three of four residues are copies; the first 40 cannot be foretold: log 20 = 3.00.
    assert loss["without"] > 2.9
    assert loss["with"] < 1.5
    assert loss["forgetful"] > 2.9
