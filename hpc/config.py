"""Recipes: TOML files into frozen dataclasses, strictly.

A recipe describes one training run. Every section is one dataclass; an unknown key is an error
that names the nearest known one, and `section.key=value` on the command line overrides a value.
"""

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from hpc.config_optimizer import OptimizerConfig, ScheduleConfig
from models.architectures import ModelConfig
from models.bert import BertConfig
from models.transformer_xl import TransformerXLConfig
from preprocessing.errors import InputError
from preprocessing.strict import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records are read, and how they become micro-batches."""

    records: str
    """Directory of a record set, made by `prothpc preprocess`."""
    vocabulary: str = "prottrans-bert"
    """Token ids of the model; records themselves hold residues."""
    length: int = 512
    """Longest input in tokens, special tokens included; of a Transformer-XL, every segment's."""
    long: Literal["crop-random", "crop-start"] = "crop-random"
    """What becomes of a longer protein: a window drawn anew each epoch, or its first residues."""
    block_records: int = 1024
    """Records read together, so that a parallel file system sees sequential reads."""
    pool_blocks: int = 4
    """Blocks of a stream that are shuffled together."""
    bucket_batches: int = 16
    """Micro-batches cut together from samples sorted by length, to save padding; 1 sorts none."""

    def __post_init__(self) -> None:
        _require_positive(self, "block_records", "pool_blocks", "bucket_batches")
        if self.length < 3:
            raise ValueError(f"length = {self.length} leaves no room for a residue: use 3 or more")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Masked language modelling (BERT, section 3.1): how targets are chosen and shown."""

    name: Literal["masked-lm"] = "masked-lm"
    """Objective of a BERT."""
    probability: float = 0.15
    """Share of residues that become targets."""
    mask_share: float = 0.8
    """Share of targets shown as [MASK]."""
    random_share: float = 0.1
    """Share of targets shown as a random amino acid; the rest is shown unchanged."""

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability = {self.probability} is not in (0, 1]")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise ValueError(
                f"mask_share = {self.mask_share} and random_share = {self.random_share} "
                "must be shares that add up to at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class NextResidueConfig:
    """Language modelling from left to right: every token is a target, given those before it."""

    name: Literal["next-residue"] = "next-residue"
    """Objective of a Transformer-XL."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: where it lives, how long it is, what a step consists of."""

    run_dir: str
    """Directory for checkpoints, metrics and logs."""
    steps: int
    """Optimiser steps of the whole run."""
    global_batch: int
    """Sequences in one optimiser step, over all ranks."""
    micro_batch: int
    """Sequences that one rank computes at a time."""
    seed: int = 0
    """Of the initial weights, the order of samples, the masks and dropout."""
    engine: Literal["torch", "horovod", "deepspeed"] = "torch"
    """What distributes the training: torch's DistributedDataParallel, Horovod, or DeepSpeed."""
    precision: Literal["fp32", "amp-bf16", "amp-fp16", "bf16", "fp16-master", "fp16"] = "fp32"
    """Number formats of a step; `hpc/precision.py` has the table."""
    loss_scale: float = 65536.0
    """First loss scale in the fp16 precisions; it adapts."""
    loss_scale_window: int = 1000
    """Applied steps in a row after which the loss scale doubles."""
    min_loss_scale: float = 1.0
    """Loss scale below which the run stops: the model diverges."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed only: what ZeRO shares out (1 optimiser state, 2 gradients too, 3 weights too)."""
    offload_optimizer: bool = False
    """DeepSpeed only, ZeRO 1 to 3: keep masters and moments in host memory."""
    stop_at_step: int | None = None
    """Save and end here, before `steps`; the next call resumes."""
    init_from: str | None = None
    """Start from these weights: a Hugging Face directory, or a checkpoint of ours."""
    init_optimizer: bool = False
    """Take over the optimiser's moments from `init_from`, too, which has to be ours."""

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "global_batch", "micro_batch")
        _require_positive(self, "loss_scale", "loss_scale_window", "min_loss_scale")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch = {self.global_batch} is no multiple of "
                f"micro_batch = {self.micro_batch}: change one of them"
            )
        if self.init_optimizer and self.init_from is None:
            raise ValueError("init_optimizer = true needs init_from, the run to take moments from")
        if self.stop_at_step is not None and not 0 < self.stop_at_step <= self.steps:
            raise ValueError(
                f"stop_at_step = {self.stop_at_step} is not between 1 and steps = {self.steps}"
            )

    @property
    def streams(self) -> int:
        """Micro-batches in a global step: Q of the design, a constant of the recipe."""
        return self.global_batch // self.micro_batch


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Loss on the held-out split, beside the same on residue-shuffled proteins."""

    every_steps: int = 1000
    """Steps between evaluations; one more at the end; 0 turns evaluation off."""
    records: int = 1024
    """Held-out records used: the first of the split, which is in random order."""
    micro_batch: int = 32
    """Sequences computed at a time."""
    memory_length: int | None = None
    """Transformer-XL only: positions remembered in evaluation; left out, as many as in training."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"every_steps = {self.every_steps} is negative: 0 turns it off")
        _require_positive(self, "records", "micro_batch")
        if self.memory_length is not None and self.memory_length < 0:
            raise ValueError(
                f"memory_length = {self.memory_length} is negative: 0 remembers nothing"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int = 1000
    """Steps between checkpoints; one more at the end."""
    keep: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    memory: Literal["save", "recompute", "reset"] = "save"
    """Transformer-XL only: the lanes' memory is stored, computed again from the last tokens when
    the run goes on, or empty then."""

    def __post_init__(self) -> None:
        _require_positive(self, "every_steps")
        if self.keep < 0:
            raise ValueError(f"keep = {self.keep} is negative: 0 keeps all")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What the run shows of itself."""

    every_steps: int = 50
    """Steps between lines of the log and of metrics.jsonl."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""
    peak_tflops: float | None = None
    """Dense peak of one device in the run's precision, TFLOP/s, which the MFU is a share of; left
    out, it comes from the table in `hpc/flops.py`, and without an entry there is no MFU."""

    def __post_init__(self) -> None:
        _require_positive(self, "every_steps")
        if self.peak_tflops is not None:
            _require_positive(self, "peak_tflops")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One `[[phase]]` of a run, or the whole run where the recipe has none.

    A phase's table holds what it changes of the sections below: anything of `[schedule]`, and the
    keys in `PHASE_KEYS`. Its `train.steps` are its own.
    """

    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    reset_step: bool = True
    """The schedule begins anew; false: one schedule goes on over this and the phase before."""


PHASE_KEYS = {
    "data": ("length", "long", "block_records", "pool_blocks", "bucket_batches"),
    "train": ("steps", "global_batch", "micro_batch"),
    "optimizer": ("lr",),
}
"""What may change from phase to phase, besides `[schedule]`."""


_IGNORED_BY_LANES = {
    "data.long": "whose lanes take proteins whole",
    "data.bucket_batches": "whose segments are not padded",
}
_ONLY_FOR_LANES = dict.fromkeys(("evaluation.memory_length", "checkpoint.memory"), "without memory")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run, complete."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig | NextResidueConfig = field(default_factory=ObjectiveConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    phase: tuple[PhaseConfig, ...] = ()
    """Parts of the run, one after the other; `phases` has them also for a run without."""

    def __post_init__(self) -> None:
        self._check_model()
        steps = self.schedule_steps
        for number, phase in enumerate(self.phases):
            try:
                self._check_phase(phase, steps[number])
            except ValueError as error:
                where = f"phase {number + 1}: " if self.phase else ""
                raise ValueError(f"{where}{error}") from error
        total = sum(phase.train.steps for phase in self.phases)
        if self.train.steps != total:
            raise ValueError(
                f"train.steps = {self.train.steps}, but the steps of the phases add up to {total}: "
                "leave it out, or end the run earlier with train.stop_at_step"
            )
        if not self.phases[0].reset_step:
            raise ValueError("phase 1: reset_step = false, but no phase comes before it")

    @property
    def phases(self) -> tuple[PhaseConfig, ...]:
        """The phases in order; one, with the sections' own settings, where the recipe has none."""
        whole = PhaseConfig(
            data=self.data, train=self.train, optimizer=self.optimizer, schedule=self.schedule
        )
        return self.phase or (whole,)

    @property
    def schedule_steps(self) -> list[int]:
        """For each phase the steps of its schedule, which may go on over several phases."""
        first = [i for i, phase in enumerate(self.phases) if phase.reset_step or i == 0]
        ends = [*first[1:], len(self.phases)]
        steps = []
        for start, end in zip(first, ends, strict=True):
            length = sum(phase.train.steps for phase in self.phases[start:end])
            steps += [length] * (end - start)
        return steps

    def _check_model(self) -> None:
        """Refuse what does not go with the model, or would be ignored."""
        recurrent = isinstance(self.model, TransformerXLConfig)
        objective = NextResidueConfig.name if recurrent else ObjectiveConfig.name
        if self.objective.name != objective:
            raise ValueError(
                f'objective.name = "{self.objective.name}" does not go with model.name = '
                f'"{self.model.name}": set it to "{objective}", or leave [objective] out'
            )
        ignored = _IGNORED_BY_LANES if recurrent else _ONLY_FOR_LANES
        sections = [(phase, "data") for phase in self.phases]
        sections += [(self, "evaluation"), (self, "checkpoint")]  # type: ignore[list-item]
        for owner, section in sections:
            for spec in dataclasses.fields(getattr(owner, section)):
                value = getattr(getattr(owner, section), spec.name)
                if f"{section}.{spec.name}" in ignored and value != spec.default:
                    reason = ignored[f"{section}.{spec.name}"]
                    raise ValueError(
                        f"{section}.{spec.name} = {value!r} does not apply to model.name = "
                        f'"{self.model.name}", {reason}: leave it out'
                    )

    def _check_phase(self, phase: PhaseConfig, schedule_steps: int) -> None:
        for section, keys in PHASE_KEYS.items():
            own, base = getattr(phase, section), getattr(self, section)
            if section == "train":  # a phase does not inherit where the whole run stops
                base = dataclasses.replace(base, stop_at_step=None)
                own = own if self.phase else base
            for key in (spec.name for spec in dataclasses.fields(own)):
                if key not in keys and getattr(own, key) != getattr(base, key):
                    allowed = [f"{s}.{k}" for s, keys in PHASE_KEYS.items() for k in keys]
                    raise ValueError(
                        f"{section}.{key} cannot change within a run, [schedule] and "
                        f"{', '.join(allowed)} can: set it for all phases, or use two runs and "
                        "train.init_from"
                    )
        if isinstance(self.model, BertConfig) and phase.data.length > self.model.max_positions:
            raise ValueError(
                f"data.length = {phase.data.length} is longer than "
                f"model.max_positions = {self.model.max_positions}: lower one or raise the other"
            )
        if phase.schedule.warmup_steps > schedule_steps:
            raise ValueError(
                f"schedule.warmup_steps = {phase.schedule.warmup_steps} is more than "
                f"train.steps = {schedule_steps}"
            )
        if phase.schedule.name != "plateau":
            return
        if phase.schedule.min_lr > phase.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr = {phase.schedule.min_lr} is more than "
                f"optimizer.lr = {phase.optimizer.lr}: lower it"
            )
        if phase.schedule.watch == "held-out" and not self.evaluation.every_steps:
            raise ValueError(
                'schedule.watch = "held-out" needs evaluations, which evaluation.every_steps = 0 '
                'turns off: set it, or schedule.watch = "training"'
            )


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: path of a TOML file, or the name of a recipe that comes with prothpc.
        overrides: `section.key=value` each; the value is TOML, or else taken as a string.

    Raises:
        InputError: unreadable file, bad TOML, unknown or missing key, wrong type, value refused.
    """
    path = _find_recipe(source)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error
    for override in overrides:
        _apply_override(document, override)
    _complete_objective(document)
    _complete_phases(document)
    return build(Recipe, document, where=str(path))


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with prothpc."""
    folder = resources.files("hpc") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name[-5:] == ".toml")


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as plain values, section by section; None is left out.

    `phase`, a list with the complete sections of each, is there if the recipe has phases.
    """
    resolved = _without_none(dataclasses.asdict(recipe))
    if not recipe.phase:
        del resolved["phase"]
    return resolved


def _find_recipe(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if path.name == str(source) and str(source).removesuffix(".toml") in recipe_names():
        return Path(str(resources.files("hpc") / "recipes" / path.with_suffix(".toml").name))
    raise InputError(
        f"no recipe {str(source)!r}: give the path of a TOML file, or one of "
        f"{', '.join(recipe_names())}"
    )


def _apply_override(document: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *path, key = name.strip().split(".")
    if not (equals and path and all(path) and key):
        raise InputError(f"{override!r} is no override: write section.key=value")
    table = document
    if path[0] == "phase":
        phases, number = _phase_tables(document), path[1] if len(path) > 1 else ""
        if not (number.isdecimal() and 1 <= int(number) <= len(phases)):
            raise InputError(
                f"{override!r}: the recipe has {len(phases)} phases, counted from 1: write "
                "phase.NUMBER.section.key=value"
            )
        table, path = phases[int(number) - 1], path[2:]
    if len(path) > 1:
        raise InputError(f"{override!r} is no override: write section.key=value")
    for section in path:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InputError(f"{override!r}: {section} is no section")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table[key] = value


def _complete_objective(document: dict[str, Any]) -> None:
    """Name the objective that goes with the model, where the recipe does not name one."""
    model, objective = document.get("model"), document.setdefault("objective", {})
    if isinstance(model, dict) and isinstance(objective, dict):
        recurrent = model.get("name") == TransformerXLConfig.name
        named = NextResidueConfig.name if recurrent else ObjectiveConfig.name
        objective.setdefault("name", named)


def _complete_phases(document: dict[str, Any]) -> None:
    """Give each phase what it leaves out of the recipe's sections, and the run their steps.

    Tables of a wrong kind and steps that are no numbers stay, for `build` to refuse.
    """
    total = 0
    for phase in _phase_tables(document):
        for section in ("data", "train", "optimizer", "schedule"):
            own, base = phase.setdefault(section, {}), document.get(section, {})
            if isinstance(own, dict) and isinstance(base, dict):
                phase[section] = {**_inherited(section, base, own), **own}
        if isinstance(phase["train"], dict):
            steps = phase["train"].get("steps")
            total += steps if type(steps) is int and steps > 0 else 0
    if "phase" in document and isinstance(document.get("train"), dict):
        document["train"].setdefault("steps", total or 1)


def _phase_tables(document: dict[str, Any]) -> list[dict[str, Any]]:
    tables = document.get("phase")
    return [t for t in tables if isinstance(t, dict)] if isinstance(tables, list) else []


def _inherited(section: str, base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What a phase takes from the recipe's section of the same name."""
    left_out: set[str] = set()
    if section == "train":
        left_out = {"steps", "stop_at_step"}  # about the whole run
    elif section == "schedule" and "name" in own:
        left_out = {*base}  # another schedule has other options
    elif section == "schedule" and {"warmup_steps", "warmup_epochs"} & own.keys():
        left_out = {"warmup_steps", "warmup_epochs"}
    return {key: value for key, value in base.items() if key not in left_out}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} = {getattr(config, name)} must be greater than 0")
