"""Where a run starts: from nothing, from other weights, or from a checkpoint."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hpc.checkpoint import (
    INDEX,
    checkpoints_of,
    find_checkpoint,
    list_checkpoints,
    newest_whole,
    read_checkpoint,
)
from hpc.config import PHASE_KEYS, Recipe, as_dict
from hpc.engines import Engine, Moments
from models.architectures import ModelConfig
from models.convert import from_hugging_face
from preprocessing.errors import InputError

T = TypeVar("T")

ORDER_KEYS = (
    "data.length",
    "data.long",
    "data.block_records",
    "data.pool_blocks",
    "data.bucket_batches",
    "train.global_batch",
    "train.micro_batch",
    "train.seed",
)
"""What decides which samples a step sees; a resumed run keeps it."""

_FREE_MODEL_KEYS = {
    "dropout",
    "attention_dropout",
    "initializer_std",
    "memory_length",
    "initial_memory",
}
"""Model settings that say nothing about what a weight means."""


class Start(NamedTuple):
    """Where a run starts."""

    optimizer_steps: int
    """Updates that the moments have seen."""
    path: Path | None = None
    """Checkpoint that it goes on from; None for a run that starts at step 0."""
    state: dict[str, Any] | None = None
    """The trainer's state in the checkpoint."""


def start(
    recipe: Recipe, engine: Engine, *, records: str, resume: str, report: Callable[[str], None]
) -> Start:
    """Load what the run starts from into the engine.

    Args:
        recipe: the run.
        engine: with initial weights.
        records: fingerprint of the record set.
        resume: `auto`, `never`, or the path of a checkpoint or run.
        report: called on rank 0 with what is worth a line.

    Raises:
        InputError: on all ranks, if the checkpoint or the weights do not fit the recipe.
    """
    path = on_rank_0(engine, lambda: _checkpoint_path(recipe, resume, report))
    if path is None:
        if recipe.train.init_from is not None:
            return Start(_load_foreign(recipe, engine, Path(recipe.train.init_from), report))
        return Start(0)
    checkpoint = read_checkpoint(path)
    state = checkpoint.state
    refuse_other_model(path, state["model"], model_facts(recipe.model))
    if state["records"] != records:
        raise InputError(
            f"{path} was trained on another record set than data.records = "
            f"{recipe.data.records}: name that one, or start a new train.run_dir with "
            f"train.init_from={path}"
        )
    _compare_recipes(path, checkpoint.recipe, as_dict(recipe), state, report)
    engine.load(checkpoint.weights, checkpoint.moments, state["optimizer_steps"])
    report(f"resuming at step {checkpoint.step} from {path}")
    return Start(state["optimizer_steps"], path, state)


def model_facts(model: ModelConfig) -> dict[str, Any]:
    """Return what a checkpoint and a recipe of the same model have in common."""
    settings = dataclasses.asdict(model)
    return {key: value for key, value in settings.items() if key not in _FREE_MODEL_KEYS}


def refuse_other_model(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse the weights of another model than the recipe's.

    Raises:
        InputError: naming the keys that differ.
    """
    differing = [
        f"model.{key} is {saved.get(key)!r} there and {wanted.get(key)!r} here"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key)
    ]
    if differing:
        raise InputError(
            f"{path} is of another model ({', '.join(differing)}): make the recipe's [model] "
            "agree, or use another train.run_dir"
        )


def on_rank_0(engine: Engine, function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone and return its value, or raise its InputError, on all."""
    outcome: tuple[Any, str | None] = (None, None)
    if engine.world.rank == 0:
        try:
            outcome = (function(), None)
        except InputError as error:
            outcome = (None, str(error))
    value, message = engine.from_rank_0(outcome)
    if message is not None:
        raise InputError(message)
    return value


def _checkpoint_path(recipe: Recipe, resume: str, report: Callable[[str], None]) -> Path | None:
    root = checkpoints_of(Path(recipe.train.run_dir))
    if resume == "auto":
        return newest_whole(root, report)
    if resume != "never":
        return find_checkpoint(Path(resume), report)
    if list_checkpoints(root):
        raise InputError(
            f"{root} holds checkpoints, which --resume never would overwrite: choose another "
            "train.run_dir, or use --resume auto"
        )
    return None


def _load_foreign(recipe: Recipe, engine: Engine, path: Path, report: Callable[[str], None]) -> int:
    """Load the weights of another run or library, and the moments if the recipe asks for them."""
    moments: Moments = {}
    steps = 0
    if (path / INDEX).is_file() or checkpoints_of(path).is_dir():
        path = find_checkpoint(path, report)
        checkpoint = read_checkpoint(path)
        refuse_other_model(path, checkpoint.state["model"], model_facts(recipe.model))
        weights = checkpoint.weights
        if recipe.train.init_optimizer:
            moments, steps = checkpoint.moments, checkpoint.state["optimizer_steps"]
    elif recipe.train.init_optimizer:
        raise InputError(
            f"train.init_optimizer = true, but {path} is no checkpoint or run of prothpc, and only "
            "those hold moments: name one in train.init_from, or set train.init_optimizer=false"
        )
    else:
        try:
            config, weights = from_hugging_face(path)
        except ValueError as error:
            raise InputError(f"train.init_from: {error}") from error
        refuse_other_model(path, model_facts(config), model_facts(recipe.model))
    engine.load(weights, moments, steps)
    taken = f"weights and the moments of {steps} updates" if moments else "weights"
    report(f"starting from the {taken} in {path}")
    return steps


def _compare_recipes(
    path: Path,
    saved: Mapping[str, Any],
    wanted: Mapping[str, Any],
    state: Mapping[str, Any],
    report: Callable[[str], None],
) -> None:
    """Refuse a change of the order of samples in the phase of the checkpoint; report any other."""
    number, first_step = state["phase"]["number"], state["phase"]["first_step"]
    phases = wanted.get("phase", [wanted])
    ends = list(itertools.accumulate(phase["train"]["steps"] for phase in phases))
    if (
        number > len(phases)
        or first_step != [0, *ends][number - 1]
        or (state["step"] > ends[number - 1] and "phase" in wanted)
    ):
        raise InputError(
            f"{path} is at step {state['step']}, in phase {number}, which began after step "
            f"{first_step}; in the recipe phases end at steps {', '.join(map(str, ends))}: set "
            f"them back, or start a new train.run_dir with train.init_from={path}"
        )
    before, now = saved.get("phase", [saved])[number - 1], phases[number - 1]
    for section, key in (name.split(".") for name in ORDER_KEYS):
        if before[section][key] != now[section][key]:
            raise InputError(
                f"{path} was made with {section}.{key} = {before[section][key]!r}, not "
                f"{now[section][key]!r}, so the place in the data is lost: set it back, or start a "
                f"new train.run_dir with train.init_from={path}"
            )
    old = _flat(saved)
    for name, value in _flat(wanted).items():
        if old.get(name) != value:
            report(f"changed since the checkpoint: {name} = {value!r} (was {old.get(name)!r})")


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name; of a phase, those that may be its own."""
    flat = {
        f"{section}.{key}": value
        for section, values in recipe.items()
        if section != "phase"
        for key, value in values.items()
    }
    for number, phase in enumerate(recipe.get("phase", []), 1):
        flat[f"phase.{number}.reset_step"] = phase["reset_step"]
        for section, keys in {**PHASE_KEYS, "schedule": phase["schedule"]}.items():
            flat |= {f"phase.{number}.{section}.{key}": phase[section][key] for key in keys}
    return flat
