"""The recipes of the paper's models hold what its table 2 says."""

import pytest
import torch

from hpc.config import Recipe, load_recipe
from models.architectures import build_model, num_parameters
from preprocessing.errors import InputError

# ProtTrans (Elnaggar et al. 2021), table 2, in its own order; "local" is the batch of a device.
TABLE_2 = {
    "prottxl-bfd": {
        "layers": 32, "hidden": 1024, "intermediate": 4096, "heads": 14, "dropout": 0.15,
        "length": (512,), "memory": 512, "local": (8,), "global": (44928,), "optimizer": "lamb",
        "lr": 0.0005, "weight_decay": 0.0, "steps": (40_700,), "warmup": (13_600,), "devices": 5616,
        "precision": "fp16-master", "parameters": "562.5 M",
    },
    "prottxl-uniref100": {
        "layers": 30, "hidden": 1024, "intermediate": 4096, "heads": 16, "dropout": 0.15,
        # 5 · 5,616 is not the global batch of the same column; 4 · 5,616 is.
        "length": (512,), "memory": 512, "local": (4,), "global": (22464,), "optimizer": "lamb",
        "lr": 0.002, "weight_decay": 0.01, "steps": (31_300,), "warmup": (5_500,), "devices": 5616,
        "precision": "fp16-master", "parameters": "409.3 M",
    },
    "protbert-bfd": {
        "layers": 30, "hidden": 1024, "intermediate": 4096, "heads": 16, "dropout": 0.0,
        "positions": 40_000, "masking": 0.15, "length": (512, 2048), "local": (32, 6),
        "global": (32768, 6144), "optimizer": "lamb", "lr": 0.002, "weight_decay": 0.01,
        "steps": (800_000, 200_000), "warmup": (140_000, 20_000), "devices": 1024,
        "precision": "fp32",
    },
    "protbert-uniref100": {
        "layers": 30, "hidden": 1024, "intermediate": 4096, "heads": 16, "dropout": 0.0,
        "positions": 40_000, "masking": 0.15, "length": (512, 2048), "local": (30, 5),
        "global": (15360, 2560), "optimizer": "lamb", "lr": 0.002, "weight_decay": 0.01,
        "steps": (300_000, 100_000), "warmup": (40_000, 0), "devices": 512,
        "precision": "fp32",
    },
}  # fmt: skip
POOLER_AND_NEXT_SENTENCE = 1024 * 1024 + 1024 + 2 * 1024 + 2


def parameters(recipe: Recipe) -> int:
    with torch.device("meta"):
        return num_parameters(build_model(recipe.model))


def as_table(recipe: Recipe) -> dict[str, object]:
    """A recipe's settings under the names of the table above."""
    model, phases = recipe.model, recipe.phases
    row: dict[str, object] = {
        "layers": model.layers,
        "hidden": model.hidden_size,
        "intermediate": model.intermediate_size,
        "heads": model.heads,
        "dropout": model.dropout,
        "length": tuple(phase.data.length for phase in phases),
        "local": tuple(phase.train.micro_batch for phase in phases),
        "global": tuple(phase.train.global_batch for phase in phases),
        "optimizer": recipe.optimizer.name,
        "lr": recipe.optimizer.lr,
        "weight_decay": recipe.optimizer.weight_decay,
        "steps": tuple(phase.train.steps for phase in phases),
        "warmup": tuple(phase.schedule.warmup_steps for phase in phases),
        "precision": recipe.train.precision,
        "devices": phases[0].train.streams,
    }
    if model.name == "bert":
        row |= {"positions": model.max_positions, "masking": recipe.objective.probability}  # type: ignore[union-attr]
    else:
        millions = f"{parameters(recipe) / 1e6:.1f} M"
        row |= {"memory": model.memory_length, "parameters": millions}
    return row


@pytest.mark.parametrize("name", TABLE_2)
def test_a_recipe_holds_the_numbers_of_the_paper(name: str) -> None:
    assert as_table(load_recipe(name)) == TABLE_2[name]


@pytest.mark.parametrize("name", TABLE_2)
def test_every_phase_gives_each_of_the_papers_devices_one_micro_batch(name: str) -> None:
    """So the streams of a step are as many as the paper had GPUs or TPU cores."""
    assert {p.train.streams for p in load_recipe(name).phases} == {TABLE_2[name]["devices"]}


@pytest.mark.parametrize("name", ["protbert-bfd", "protbert-uniref100"])
def test_protbert_has_the_published_parameters_but_two_unused_heads(name: str) -> None:
    assert parameters(load_recipe(name)) == 420_984_864 - POOLER_AND_NEXT_SENTENCE


def test_prottxl_uses_lamb_as_its_code_has_it() -> None:
    """apex's LAMB without weight decay would be plain Adam, at a batch of 44,928."""
    for name in ("prottxl-bfd", "prottxl-uniref100"):
        recipe = load_recipe(name)
        assert (recipe.optimizer.variant, recipe.optimizer.clip_norm) == ("txl", 0.25)
        assert recipe.checkpoint.memory == "recompute"


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("prottxl-tiny", "data.long=crop-start", "data.long = 'crop-start' does not apply to"),
        ("prottxl-tiny", "data.bucket_batches=4", "whose segments are not padded: leave it out"),
        ("prottxl-tiny", "objective.name=masked-lm", 'objective.name = "masked-lm" does not go'),
        ("prottxl-tiny", "objective.probability=0.2", "unknown key objective.probability"),
        ("prottxl-tiny", "model.max_positions=9", "unknown key model.max_positions"),
        ("prottxl-tiny", "model.name=gpt", "model.name = 'gpt': choose one of 'bert', 'tran"),
        ("prottxl-tiny", "evaluation.memory_length=-1", "memory_length = -1 is negative"),
        ("protbert-tiny", "evaluation.memory_length=9", 'model.name = "bert", without memory'),
        ("protbert-tiny", "checkpoint.memory=reset", "checkpoint.memory = 'reset' does not apply"),
        ("protbert-tiny", "objective.name=next-residue", 'set it to "masked-lm", or leave'),
        ("protbert-tiny", "objective.name=both", "choose one of 'masked-lm', 'next-residue'"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused(
    recipe: str, override: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(recipe, [override])
    assert message in str(caught.value)
