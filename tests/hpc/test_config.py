"""Recipes are read strictly, and every refusal says what to do."""

from pathlib import Path

import pytest

from hpc.config import Recipe, as_dict, build, load_recipe, recipe_names
from preprocessing.errors import InputError

MINIMAL = """
[model]
hidden_size = 32
layers = 2
heads = 2
intermediate_size = 64
max_positions = 512
[data]
records = "records"
length = 64
[train]
run_dir = "run"
steps = 20
global_batch = 32
micro_batch = 8
[optimizer]
lr = 1e-3
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    return path


def test_sections_become_dataclasses_with_defaults(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.model.hidden_size == 32
    assert recipe.train.streams == 4
    assert recipe.objective.probability == 0.15
    assert recipe.optimizer.lr == 1e-3


def test_overrides_win_and_are_toml_or_text(minimal: Path) -> None:
    recipe = load_recipe(
        minimal, ["optimizer.lr=2", "data.records=/some/where", "log.tensorboard=false"]
    )
    assert recipe.optimizer.lr == 2.0
    assert recipe.data.records == "/some/where"
    assert recipe.log.tensorboard is False


def test_a_resolved_recipe_reads_back_the_same(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert build(Recipe, as_dict(recipe), where="again") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=5", r"unknown key train\.step: did you mean steps\?"),
        ("trian.steps=5", r"unknown key trian: did you mean train\?"),
        ("model.colour=5", r"unknown key model\.colour \(known: name, vocab_size, "),
        ("train.steps=many", r"train\.steps = 'many': must be a whole number"),
        ("train.steps=1.5", r"train\.steps = 1\.5: must be a whole number"),
        ("train.steps=0", r"\[train\] steps = 0 must be greater than 0"),
        ("log.tensorboard=1", r"log\.tensorboard = 1: must be true or false"),
        ("train.precision=fp8", r"train\.precision = 'fp8': choose one of 'fp32', 'amp-bf16', "),
        ("train.micro_batch=5", r"global_batch = 32 is no multiple of micro_batch = 5"),
        ("train.stop_at_step=21", r"stop_at_step = 21 is not between 1 and steps = 20"),
        ("model.heads=3", r"hidden_size.*heads"),
        ("data.length=1024", r"data\.length = 1024 .* model\.max_positions = 512"),
        ("data.length=2", r"leaves no room for a residue"),
        ("schedule.warmup_steps=30", r"warmup_steps = 30 is more than train\.steps = 20"),
        ("objective.mask_share=0.95", r"mask_share = 0\.95 and random_share = 0\.1"),
        ("optimizer.beta2=1.0", r"beta2 = 1\.0 is not in \[0, 1\)"),
        ("evaluation.every_steps=-1", r"0 turns it off"),
        ("steps=5", r"'steps=5' is no override: write section\.key=value"),
        ("train.steps", r"is no override"),
    ],
)
def test_wrong_values_are_refused_with_advice(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(minimal, [override])
    assert "\n" not in str(caught.value)


def test_missing_keys_bad_toml_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(MINIMAL.replace("lr = 1e-3", ""))
    with pytest.raises(InputError, match=r"r\.toml: optimizer\.lr is missing"):
        load_recipe(path)
    path.write_text("[model\n")
    with pytest.raises(InputError, match=r"r\.toml: not a TOML file"):
        load_recipe(path)
    with pytest.raises(InputError, match=r"no recipe 'protbert-tinny'.*protbert-tiny"):
        load_recipe("protbert-tinny")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_comes_along_is_valid(name: str) -> None:
    assert load_recipe(name).train.streams >= 1
    assert load_recipe(f"{name}.toml") == load_recipe(name)
