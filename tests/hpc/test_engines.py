"""One run on each engine gives the same losses; checkpoints move between them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hpc.metrics import read_metrics

HERE = Path(__file__).parent
ENGINES = {
    "torch": [],
    "horovod": ["train.engine=horovod"],
    "deepspeed-0": ["train.engine=deepspeed", "train.zero_stage=0"],
    "deepspeed-1": ["train.engine=deepspeed", "train.zero_stage=1"],
    "deepspeed-2": ["train.engine=deepspeed", "train.zero_stage=2"],
    "deepspeed-3": ["train.engine=deepspeed", "train.zero_stage=3"],
}
MpiRun = Callable[..., subprocess.CompletedProcess[str]]
Train = Callable[..., Path]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix = load("engine_matrix")


def need(engine: str) -> None:
    """Skip where the engine is not installed; with CI=true fail."""
    package = engine.partition("-")[0]
    if importlib.util.find_spec(package) is None:
        message = f"{package} is not installed: make {package}"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


@pytest.fixture(scope="module")
def train(mpirun: MpiRun, recipe_file: Path) -> Train:
    """Train into `run` on some ranks; return `run`."""

    def start(run: Path, *overrides: str, ranks: int = 4) -> Path:
        arguments = ["train", str(recipe_file), f"train.run_dir={run}", *overrides]
        result = mpirun(ranks, "-m", "hpc.cli", *arguments, timeout=300)
        assert result.returncode == 0, result.stderr
        return run

    return start


@pytest.fixture(scope="module")
def straight(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of plain torch on 4 ranks."""
    return train(tmp_path_factory.mktemp("straight"))


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def state(run: Path) -> list[bytes]:
    folder = run / "checkpoints" / "step-00000020"
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("weights", "optimizer")]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_gives_the_same_losses_and_stops_and_goes_bitwise(
    train: Train, straight: Path, tmp_path: Path, engine: str
) -> None:
    """Four ranks: with two, sums have one order whatever an engine does."""
    need(engine)
    run = train(tmp_path, *ENGINES[engine])
    first_losses, first_state = losses(run), state(run)
    assert first_losses == pytest.approx(losses(straight), rel=1e-5)
    shutil.rmtree(run / "checkpoints" / "step-00000020")  # the next call goes on from step 10
    train(run, *ENGINES[engine])
    assert losses(run) == first_losses
    assert state(run) == first_state


@pytest.mark.slow
def test_a_run_moves_from_zero_2_to_horovod_to_torch(
    train: Train, straight: Path, tmp_path: Path
) -> None:
    need("deepspeed")
    need("horovod")
    train(tmp_path, *ENGINES["deepspeed-2"], "train.stop_at_step=7", ranks=4)
    train(tmp_path, *ENGINES["horovod"], "train.stop_at_step=14", ranks=2)
    train(tmp_path, ranks=1)
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.slow
def test_a_run_moves_between_zero_stages(train: Train, straight: Path, tmp_path: Path) -> None:
    need("deepspeed")
    train(tmp_path, *ENGINES["deepspeed-3"], "train.stop_at_step=5", ranks=4)
    train(tmp_path, *ENGINES["deepspeed-1"], "train.stop_at_step=10", ranks=2)
    train(tmp_path, *ENGINES["deepspeed-3"], "train.stop_at_step=15", ranks=2)
    train(tmp_path, *ENGINES["deepspeed-2"], "train.offload_optimizer=true", ranks=2)
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "launcher"),
    [
        ("horovod", ["horovodrun", "--gloo", "-np", "2", sys.executable, "-m", "hpc.cli"]),
        (
            "deepspeed-2",
            ["deepspeed", "--num_accelerators=2", "--no_local_rank", "--module", "hpc.cli"],
        ),
    ],
)
def test_the_engines_own_launchers_work_too(
    straight: Path,
    recipe_file: Path,
    rank_environment: dict[str, str],
    tmp_path: Path,
    engine: str,
    launcher: list[str],
) -> None:
    need(engine)
    arguments = ["train", str(recipe_file), f"train.run_dir={tmp_path}", "train.stop_at_step=4"]
    result = subprocess.run(
        [*launcher, *arguments, *ENGINES[engine]],
        env={**rank_environment, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "2 ranks (" in result.stdout
    assert losses(tmp_path) == pytest.approx(losses(straight)[:4], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "horovod", "deepspeed-1", "deepspeed-2"])
def test_an_overflow_skips_the_step_on_all_ranks(
    mpirun: MpiRun, recipe_file: Path, tmp_path: Path, engine: str
) -> None:
    """The learning rate does not advance, the scale halves, and recovers after quiet steps."""
    need(engine)
    settings = ["train.precision=amp-fp16", "train.loss_scale=1024", "train.loss_scale_window=4"]
    result = mpirun(
        2,
        str(HERE / "overflow_program.py"),
        "3,5",
        *("train", str(recipe_file), f"train.run_dir={tmp_path}", "evaluation.every_steps=0"),
        *settings,
        *ENGINES[engine],
    )
    assert result.returncode == 0, result.stderr
    lines = read_metrics(tmp_path)
    assert [line["train/skipped_steps"] for line in lines[:6]] == [0, 0, 1, 1, 2, 2]
    rates = [line["train/lr"] for line in lines]
    assert rates[2] == rates[3]
    assert rates[4] == rates[5]
    saved = json.loads((tmp_path / "checkpoints/step-00000020/state.json").read_text())
    assert saved["optimizer_steps"] == 18
    # Halved twice, and doubled after each 4 of the 15 quiet steps that follow.
    assert saved["engine"]["loss_scale"]["scale"] == 1024 / 4 * 2**3
    assert all(line["train/loss"] == line["train/loss"] for line in lines[5:])


@pytest.mark.slow
def test_at_the_floor_of_the_loss_scale_the_run_stops_with_advice(
    mpirun: MpiRun, recipe_file: Path, tmp_path: Path
) -> None:
    result = mpirun(
        2,
        str(HERE / "overflow_program.py"),
        "11,12,13",
        *("train", str(recipe_file), f"train.run_dir={tmp_path}", "evaluation.every_steps=0"),
        *("train.precision=amp-fp16", "train.loss_scale=4", "train.min_loss_scale=1"),
    )
    assert result.returncode != 0
    assert "the loss scale fell below train.min_loss_scale = 1" in result.stderr
    assert "train.precision=bf16" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "checkpoints" / "step-00000010").is_dir()


@pytest.fixture(scope="module")
def reference(record_set: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of fp32 torch on one rank, with each optimiser."""
    cells = [("fp32", optimizer) for optimizer in matrix.OPTIMIZERS]
    return matrix.launch_group("torch", 1, cells, record_set, tmp_path_factory.mktemp("matrix"))


def todays_cells(engine: str) -> tuple[int, list[tuple[str, str]]]:
    """Ranks and a sixth of the cells; which sixth, the commit decides."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    turn = int(commit or "0", 16) + list(ENGINES).index(engine)
    return matrix.RANKS[turn % 2], matrix.all_cells()[turn % 6 :: 6]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_cells_of_the_matrix_agree_with_fp32_torch_or_are_refused_as_listed(
    record_set: Path, reference: dict[str, list[float]], tmp_path: Path, engine: str
) -> None:
    need(engine)
    ranks, cells = todays_cells(engine)
    results = matrix.launch_group(engine, ranks, cells, record_set, tmp_path)
    for precision, optimizer in cells:
        result = results[f"{precision} {optimizer}"]
        where = f"{engine} {ranks} ranks {precision} {optimizer}: {result}"
        refused = isinstance(result, str)
        assert refused == matrix.allowed_refusal(engine, precision, optimizer), where
        if not refused:
            off = matrix.deviation(result, reference[f"fp32 {optimizer}"])
            assert off <= matrix.TOLERANCES[precision], where


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_the_matrix_holds_on_a_gpu(
    record_set: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank for each GPU here; NCCL where there are several."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if importlib.util.find_spec(engine.partition("-")[0]) is None:
        pytest.skip(f"{engine} is not installed")
    ranks = 2 if torch.cuda.device_count() > 1 else 1
    results = matrix.launch_group(engine, ranks, matrix.all_cells(), record_set, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cells = [("fp32", optimizer) for optimizer in matrix.OPTIMIZERS]
    on_cpu = matrix.launch_group("torch", 1, cells, record_set, tmp_path)
    for precision, optimizer in matrix.all_cells():
        result = results[f"{precision} {optimizer}"]
        if not isinstance(result, str):
            off = matrix.deviation(result, on_cpu[f"fp32 {optimizer}"])
            assert off <= max(1e-4, matrix.TOLERANCES[precision]), (precision, optimizer, result)


def test_the_refusals_are_few() -> None:
    """The list is held exactly: pure fp16 on ZeRO, LAMB on ZeRO 3, and CPUs without float16."""
    refused = {
        (engine, precision, optimizer)
        for engine in matrix.ENGINES
        for precision, optimizer in matrix.all_cells()
        if matrix.allowed_refusal(engine, precision, optimizer)
    }
    without_float16 = set() if matrix.cpu_has_float16() else {"fp16-master"}
    expected = {
        (f"deepspeed-{stage}", precision, optimizer)
        for stage in (1, 2, 3)
        for precision, optimizer in matrix.all_cells()
        if precision in {"fp16"} | without_float16 or (stage == 3 and optimizer != "adamw")
    }
    assert refused == expected


def test_an_engine_that_is_not_installed_says_how_to_install_it(
    recipe_file: Path, tmp_path: Path
) -> None:
    for package in ("horovod", "deepspeed"):
        hide = f"import sys; sys.modules[{package!r}] = None; from hpc.cli import main; main()"
        program = [sys.executable, "-c", hide, "train"]
        result = subprocess.run(
            [*program, str(recipe_file), f"train.run_dir={tmp_path}", f"train.engine={package}"],
            cwd=HERE.parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        assert f"install it with 'make {package}'" in result.stderr
        assert "train.engine=torch" in result.stderr
