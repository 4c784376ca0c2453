"""Phases: planned and checked at the start, run one after the other, resumed inside any of them."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hpc.checkpoint import find_checkpoint, read_checkpoint
from hpc.config import Recipe, as_dict, load_recipe
from hpc.metrics import read_metrics
from hpc.phases import plan_phases
from hpc.schedules import rate_at
from hpc.train import train
from preprocessing.errors import InputError
from preprocessing.strict import build

BASE = """
[model]
hidden_size = 32
layers = 1
heads = 2
intermediate_size = 64
max_positions = 96
[data]
records = "{records}"
length = 48
block_records = 16
bucket_batches = 4
[train]
run_dir = "run"
global_batch = 32
micro_batch = 8
[optimizer]
name = "lamb"
variant = "you2020"
lr = 1e-2
[schedule]
name = "polynomial"
power = 0.5
warmup_steps = 2
[evaluation]
every_steps = 3
records = 16
micro_batch = 8
[checkpoint]
every_steps = 100
[log]
every_steps = 1
tensorboard = false
"""

PHASES = """
[[phase]]
train.steps = 5

[[phase]]
train.steps = 4
train.global_batch = 16
data.length = 96
optimizer.lr = 4e-3
schedule.warmup_steps = 1
"""

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def recipe_with_phases(record_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phases") / "phases.toml"
    path.write_text(BASE.format(records=record_set) + PHASES)
    return path


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Read a recipe; `phases` are the tables after the common sections."""

    def read(*overrides: str, phases: str = PHASES) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(BASE.format(records="records") + phases)
        return load_recipe(path, overrides)

    return read


@pytest.fixture
def run(recipe_with_phases: Path) -> Iterator[Callable[..., Path]]:
    """Train in this process, and return the run's directory."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}

    def start(folder: Path, *overrides: str) -> Path:
        assert train(load_recipe(recipe_with_phases, [f"train.run_dir={folder}", *overrides])) == 0
        return folder

    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


def metrics(run: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(run) if name in line]


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, moments and state, bit for bit, and the same losses on the way."""
    a, b = (find_checkpoint(run, print) for run in (one, other))
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for name in ("train/loss", "train/lr", "eval/loss"):
        assert metrics(one, name) == metrics(other, name), name


def test_a_phase_takes_from_the_sections_what_it_does_not_change(make: Make) -> None:
    recipe = make()
    one, two = recipe.phases
    assert (one.data.length, one.train.global_batch, one.optimizer.lr) == (48, 32, 1e-2)
    assert (two.data.length, two.train.global_batch, two.optimizer.lr) == (96, 16, 4e-3)
    assert two.train.micro_batch == 8
    assert (two.schedule.name, two.schedule.power, two.schedule.warmup_steps) == (
        "polynomial",
        0.5,
        1,
    )
    assert recipe.train.steps == 9
    assert make("train.stop_at_step=7").phases[0].train.stop_at_step is None


def test_a_phase_that_names_a_schedule_takes_no_options_of_another(make: Make) -> None:
    phases = PHASES.replace("schedule.warmup_steps = 1", 'schedule.name = "constant"')
    schedule = make(phases=phases).phases[1].schedule
    assert (schedule.name, schedule.power, schedule.warmup_steps) == ("constant", None, 0)


def test_a_phase_may_warm_up_in_epochs_where_the_run_counts_steps(make: Make) -> None:
    schedule = make("phase.1.schedule.warmup_epochs=0.5").phases[0].schedule
    assert (schedule.warmup_steps, schedule.warmup_epochs) == (0, 0.5)


def test_overrides_reach_phases_by_number(make: Make) -> None:
    recipe = make("phase.2.train.steps=7", "phase.2.reset_step=false", "optimizer.beta2=0.98")
    assert recipe.train.steps == 12
    assert not recipe.phases[1].reset_step
    assert {phase.optimizer.beta2 for phase in recipe.phases} == {0.98}


def test_a_resolved_recipe_with_phases_reads_back_the_same(make: Make) -> None:
    recipe = make("train.stop_at_step=7", "phase.2.schedule.name=plateau")
    assert build(Recipe, json.loads(json.dumps(as_dict(recipe))), where="again") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phase.2.data.lenght=64", r"unknown key phase\.2\.data\.lenght: did you mean length\?"),
        ("phase.2.steps=64", r"unknown key phase\.2\.steps \(known: data, train, "),
        ("phase.2.train.steps=many", r"phase\.2\.train\.steps = 'many': must be a whole number"),
        ("phase.3.train.steps=1", r"has 2 phases, counted from 1"),
        ("phase.train.steps=1", r"has 2 phases, counted from 1"),
        ("phase.2.train.micro_batch=5", r"\[phase\.2\.train\] global_batch = 16 is no multiple"),
        ("phase.2.data.length=97", r"phase 2: data\.length = 97 .*max_positions = 96"),
        ("phase.2.schedule.warmup_steps=5", r"phase 2: schedule\.warmup_steps = 5 .*steps = 4"),
        ("phase.2.train.seed=1", r"phase 2: train\.seed cannot change within a run"),
        ("phase.2.data.records=other", r"phase 2: data\.records cannot change"),
        ("phase.2.optimizer.weight_decay=0", r"phase 2: optimizer\.weight_decay cannot change"),
        ("phase.2.train.stop_at_step=2", r"phase 2: train\.stop_at_step cannot change"),
        ("phase.1.reset_step=false", r"phase 1: reset_step = false, but no phase comes before"),
        ("train.steps=20", r"train\.steps = 20, but .* add up to 9: .* train\.stop_at_step"),
        ("train.stop_at_step=10", r"stop_at_step = 10 is not between 1 and steps = 9"),
        ("train.init_optimizer=true", r"init_optimizer = true needs init_from"),
    ],
)
def test_wrong_phases_are_refused_with_advice(make: Make, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(override)
    assert "\n" not in str(caught.value)


def test_phases_of_a_wrong_kind_are_refused(make: Make) -> None:
    with pytest.raises(InputError, match=r"phase must be tables, each under \[\[phase\]\]"):
        make(phases="[phase]\ntrain.steps = 5")
    with pytest.raises(InputError, match=r"counted from 1"):
        make("phase.1.train.steps=5", phases="[phase]\ntrain.steps = 5")
    with pytest.raises(InputError, match=r"phase\.1\.train must be a section"):
        make(phases="[[phase]]\ntrain = 5")
    with pytest.raises(InputError, match=r"phase\.1\.train\.steps is missing"):
        make(phases="[[phase]]\ndata.length = 64")


def test_a_plateau_needs_what_it_watches_and_a_rate_above_its_minimum(make: Make) -> None:
    plateau = "[[phase]]\ntrain.steps = 5\nschedule.name = 'plateau'\n"
    with pytest.raises(InputError, match=r"held-out.* needs evaluations"):
        make("evaluation.every_steps=0", phases=plateau + "schedule.watch = 'held-out'")
    with pytest.raises(InputError, match=r"min_lr = 1\.0 is more than optimizer\.lr = 0\.01"):
        make(phases=plateau + "schedule.min_lr = 1.0")


def test_a_run_without_phases_is_one_phase(make: Make) -> None:
    recipe = make("train.steps=9", phases="")
    (phase,) = plan_phases(recipe, records=300, ranks=2)
    assert (phase.first_step, phase.end_step, phase.schedule_steps) == (0, 9, 9)
    assert phase.train == recipe.train
    assert "phase" not in as_dict(recipe)


def test_phases_follow_one_another_each_with_its_own_seed(make: Make) -> None:
    one, two = plan_phases(make(), records=300, ranks=2)
    assert [(p.number, p.first_step, p.end_step, p.schedule_steps) for p in (one, two)] == [
        (1, 0, 5, 5),
        (2, 5, 9, 4),
    ]
    assert one.train.seed == 0
    assert two.train.seed not in (0, 1, 2)
    assert (one.train.streams, two.train.streams) == (4, 2)
    goes_on = plan_phases(make("phase.2.reset_step=false"), records=300, ranks=2)
    assert [phase.schedule_steps for phase in goes_on] == [9, 9]


def test_every_phase_is_checked_against_ranks_and_records_at_the_start(make: Make) -> None:
    with pytest.raises(InputError, match=r"phase 2: 4 ranks cannot share 2 micro-batches"):
        plan_phases(make(), records=300, ranks=4)
    with pytest.raises(InputError, match=r"phase 1: 3 training records cannot feed 4 streams"):
        plan_phases(make(), records=3, ranks=1)
    epochs = ["phase.2.schedule.warmup_epochs=0.3", "phase.2.schedule.warmup_steps=0"]
    with pytest.raises(InputError, match=r"phase 2: schedule\.warmup_epochs = 0\.3 is 6 steps"):
        plan_phases(make(*epochs), records=320, ranks=1)
    assert plan_phases(make(*epochs), records=200, ranks=1)[1].schedule.warmup_steps == 4


def rates_of(recipe: Recipe) -> list[float]:
    """What the phases' schedules say, each on its own."""
    phases = plan_phases(recipe, records=300, ranks=1)
    return [
        rate_at(
            step - (phase.first_step if phase.reset_step else 0),
            phase.schedule,
            peak=phase.lr,
            steps=phase.schedule_steps,
        )
        for phase in phases
        for step in range(phase.first_step, phase.end_step)
    ]


def test_stop_and_go_across_a_phase_boundary_is_bitwise(
    run: Callable[..., Path], make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = run(tmp_path / "straight")
    out = capsys.readouterr().out
    assert "kernels: LAMB you2020 foreach" in out
    assert "phase 2 of 2: steps 6 to 9, length 96, 16 sequences a step" in out
    assert metrics(straight, "train/lr") == rates_of(make())
    for stop in (3, 5, 7):  # inside phase 1, at its end, inside phase 2
        run(tmp_path / "stopped", f"train.stop_at_step={stop}")
        assert f"saved at step {stop} of 9" in capsys.readouterr().out
        state = json.loads(
            (find_checkpoint(tmp_path / "stopped", print) / "state.json").read_text()
        )
        assert state["phase"]["number"] == (1 if stop <= 5 else 2)
        assert len(state["streams"]) == (4 if stop <= 5 else 2)
    assert_same_end(run(tmp_path / "stopped"), straight)


def test_a_schedule_may_go_on_over_phases(
    run: Callable[..., Path], make: Make, tmp_path: Path
) -> None:
    """Held-out evaluations cut the rate in both phases, and the cut of the first one stays."""
    override = "phase.2.reset_step=false"
    folder = run(tmp_path / "falling", override)
    assert metrics(folder, "train/lr") == rates_of(make(override))
    plateau = [
        override,
        *(f"phase.{n}.schedule.name=plateau" for n in (1, 2)),
        *(f"phase.{n}.schedule.watch=held-out" for n in (1, 2)),
        *(f"phase.{n}.schedule.patience=1" for n in (1, 2)),
        *(f"phase.{n}.optimizer.lr=1.0" for n in (1, 2)),  # so high that the loss rises
        *(f"phase.{n}.schedule.factor=0.5" for n in (1, 2)),
        "evaluation.every_steps=1",
    ]
    straight = run(tmp_path / "straight", *plateau)
    rates = metrics(straight, "train/lr")
    assert rates[4] > rates[5] > rates[8] > 0
    assert rates[5] < 1.0
    run(tmp_path / "stopped", *plateau, "train.stop_at_step=6")
    assert_same_end(run(tmp_path / "stopped", *plateau), straight)


def test_a_phase_may_be_another_run(
    run: Callable[..., Path],
    make: Make,
    record_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the seed of the second phase it reads the same streams, and ends the same."""
    together = run(tmp_path / "together")
    first = run(tmp_path / "first", "train.stop_at_step=5")
    seed = plan_phases(make(), records=300, ranks=1)[1].train.seed

    def second(name: str, *overrides: str) -> Path:
        # The settings of phase 2, as the only phase.
        settings = ["train.global_batch=16", "data.length=96", "optimizer.lr=4e-3"]
        settings += ["schedule.warmup_steps=1", f"train.seed={seed}", f"train.init_from={first}"]
        path = tmp_path / f"{name}.toml"
        path.write_text(BASE.format(records=record_set))
        folder = tmp_path / name
        overrides = ("train.steps=4", f"train.run_dir={folder}", *settings, *overrides)
        assert train(load_recipe(path, overrides)) == 0
        return folder

    apart = second("apart", "train.init_optimizer=true")
    assert "starting from the weights and the moments of 5 updates" in capsys.readouterr().out
    assert metrics(apart, "train/loss") == metrics(together, "train/loss")[5:]
    assert metrics(apart, "train/lr") == metrics(together, "train/lr")[5:]
    ends = [read_checkpoint(find_checkpoint(folder, print)) for folder in (apart, together)]
    assert ends[0].state["optimizer_steps"] == ends[1].state["optimizer_steps"] == 9
    for name, tensor in ends[0].weights.items():
        assert torch.equal(tensor, ends[1].weights[name])
        for kind, moments in ends[0].moments.items():
            assert torch.equal(moments[name], ends[1].moments[kind][name])

    fresh = second("fresh")
    assert metrics(fresh, "train/loss")[0] == metrics(apart, "train/loss")[0]
    assert metrics(fresh, "train/loss")[3] != metrics(apart, "train/loss")[3]
    second("apart", "train.init_optimizer=true")  # again: goes on from its own checkpoint
    assert "finished all 4 steps" in capsys.readouterr().out


def test_a_checkpoint_keeps_the_phases_before_it(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "train.stop_at_step=7")
    with pytest.raises(InputError, match=r"step 7, in phase 2, which began after step 5; .* 6, 10"):
        run(tmp_path, "phase.1.train.steps=6")
    with pytest.raises(InputError, match=r"phases end at steps 5, 6"):
        run(tmp_path, "phase.2.train.steps=1")
    with pytest.raises(InputError, match=r"made with data\.length = 96, not 64"):
        run(tmp_path, "phase.2.data.length=64")
    capsys.readouterr()
    run(tmp_path, "phase.2.train.steps=5", "phase.1.data.length=40")  # phase 1 is over
    out = capsys.readouterr().out
    assert "changed since the checkpoint: phase.2.train.steps = 5 (was 4)" in out
    assert "finished all 10 steps" in out


def test_moments_come_from_checkpoints_only(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"only those hold moments"):
        run(tmp_path / "run", f"train.init_from={tmp_path}", "train.init_optimizer=true")


@pytest.mark.slow
def test_phases_on_ranks_are_bitwise_and_those_of_one(
    prothpc: Callable[..., subprocess.CompletedProcess[str]],
    run: Callable[..., Path],
    recipe_with_phases: Path,
    tmp_path: Path,
) -> None:
    """Stopped at the boundary on two ranks; a plateau's sums are spread over them."""
    plateau = [f"phase.2.schedule.{option}" for option in ("name=plateau", "window=2")]

    def on_two(folder: Path, *overrides: str) -> Path:
        arguments = [recipe_with_phases, f"train.run_dir={folder}", *plateau, *overrides]
        result = prothpc("train", *arguments, ranks=2)
        assert result.returncode == 0, result.stderr
        return folder

    straight = on_two(tmp_path / "straight")
    for stop in (5, 8):
        on_two(tmp_path / "stopped", f"train.stop_at_step={stop}")
    assert_same_end(on_two(tmp_path / "stopped"), straight)
    alone = run(tmp_path / "alone", *plateau)
    assert metrics(straight, "train/loss") == pytest.approx(metrics(alone, "train/loss"), rel=1e-5)
    assert metrics(straight, "train/tokens") == metrics(alone, "train/tokens")
