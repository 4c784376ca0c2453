"""`prothpc train`: build everything from a recipe, in one visible order, and run it."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from hpc import launch, resume
from hpc.checkpoint import CheckpointWriter
from hpc.config import Recipe, as_dict
from hpc.data import Batcher, Readable, StreamLoader, check_vocabulary, open_streams
from hpc.engines import Engine
from hpc.engines.build import build_engine
from hpc.evaluation import HeldOut
from hpc.lanes import open_lanes, whole_proteins
from hpc.launch import World
from hpc.monitor import Monitor
from hpc.phases import Inputs, Phase, plan_phases
from hpc.stopping import REQUEUE_EXIT_CODE, StopSignals
from hpc.tasks import Task, build_task
from hpc.trainer import Trainer
from models.architectures import build_model, num_parameters
from preprocessing.errors import InputError
from preprocessing.records import RecordSet
from preprocessing.vocabulary import Vocabulary, get_vocabulary


def train(recipe: Recipe, *, resume_from: str = "auto", signals: StopSignals | None = None) -> int:
    """Train on this rank, together with the others that the launcher started.

    Args:
        recipe: the run.
        resume_from: `auto` (the run's newest whole checkpoint, if any), `never`, or the path of a
            checkpoint or run directory.
        signals: what asks the run to end; by default, signals and the job's clock.

    Returns:
        Exit code: 0, or 85 if a signal or the clock ended the run early and the job should go on.

    Raises:
        InputError: whatever the user can mend.
    """
    signals = signals or StopSignals()
    world = launch.world_from_environment()
    device = launch.device_of(world)
    _use_threads(world)

    # What can be checked alone is checked before ranks wait for one another.
    vocabulary = get_vocabulary(recipe.data.vocabulary)
    records = RecordSet(Path(recipe.data.records))
    check_vocabulary(records, vocabulary, recipe.model.vocab_size)
    phases = plan_phases(recipe, records=len(records), ranks=world.size)

    task = build_task(recipe, vocabulary)
    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe.model)
    engine = build_engine(
        model,
        task.loss_sums,
        optimizer=recipe.optimizer,
        train=recipe.train,
        world=world,
        device=device,
    )
    resume.on_rank_0(engine, records.check_files)
    say = print if world.rank == 0 else _nothing
    say(_banner(recipe, records, engine, num_parameters(model)), flush=True)
    started = resume.start(
        recipe, engine, records=records.fingerprint, resume=resume_from, report=say
    )

    def open_inputs(phase: Phase) -> Inputs:
        ranks = world.rank, world.size
        streams: Sequence[Readable]
        if task.memory:
            streams = open_lanes(records, vocabulary, phase.data, phase.train, *ranks)
        else:
            batcher = Batcher(records, vocabulary, phase.data, phase.train.seed)
            streams = open_streams(batcher, phase.data, phase.train, len(records), *ranks)
        loader = StreamLoader(streams, task.prepare)
        return Inputs(loader, _held_out(recipe, phase, vocabulary, task))

    monitor = Monitor(
        Path(recipe.train.run_dir),
        steps=recipe.train.steps,
        first_step=started.state["step"] if started.state else 0,
        active=world.rank == 0,
        tensorboard=recipe.log.tensorboard,
    )
    trainer = Trainer(
        recipe,
        engine=engine,
        task=task,
        phases=phases,
        open_inputs=open_inputs,
        optimizer_steps=started.optimizer_steps,
        monitor=monitor,
        writer=CheckpointWriter(Path(recipe.train.run_dir), recipe.checkpoint.keep),
        facts={"model": resume.model_facts(recipe.model), "records": records.fingerprint},
    )
    try:
        if started.state and started.path:
            trainer.load_state_dict(started.state)
            trainer.load_lanes(started.path)
        stopped = trainer.run(signals)
        monitor.say(f"{_ending(recipe, trainer.step)}; results are in {recipe.train.run_dir}")
    finally:
        trainer.close()
        monitor.close()
    # Launchers end all ranks once one has ended with another code than 0: rank 0 has to be ready.
    engine.sum_over_ranks([0.0])
    engine.close()
    return REQUEUE_EXIT_CODE if stopped else 0


def _held_out(recipe: Recipe, phase: Phase, vocabulary: Vocabulary, task: Task) -> HeldOut | None:
    """The same proteins in every phase, at the phase's length."""
    if not recipe.evaluation.every_steps:
        return None
    try:
        records = RecordSet(Path(recipe.data.records), split="holdout")
    except InputError as error:
        raise InputError(f"{error}; or train without, evaluation.every_steps=0") from error
    make = whole_proteins if task.memory else Batcher
    batcher = make(records, vocabulary, phase.data, recipe.train.seed)
    return HeldOut(batcher, len(records), recipe.evaluation, task)


def _banner(recipe: Recipe, records: RecordSet, engine: Engine, parameters: int) -> str:
    """The resolved recipe and what it runs on."""
    world, resolved = engine.world, as_dict(recipe)
    phases = resolved.pop("phase", [])
    sections = [
        f"[{section}] " + "  ".join(f"{key}={value}" for key, value in values.items())
        for section, values in resolved.items()
    ]
    for number, phase in enumerate(phases, 1):
        changes = [
            f"{section}.{key}={value}"
            for section, values in phase.items()
            if section in resolved
            for key, value in values.items()
            if resolved[section].get(key) != value
        ]
        reset_step = f"reset_step={phase['reset_step']}"
        sections.append("  ".join([f"[phase {number}] {reset_step}", *changes]))
    where = (
        f"{parameters:,} parameters on {world.size} rank{'s' if world.size > 1 else ''} "
        f"({world.launcher}, {engine.device.type}, {torch.get_num_threads()} threads each), "
        f"{len(records):,} training records; kernels: {engine.kernels}"
    )
    return "\n".join([*sections, where])


def _ending(recipe: Recipe, step: int) -> str:
    if step == recipe.train.steps:
        return f"finished all {step} steps"
    return f"saved at step {step} of {recipe.train.steps}; the same command goes on from there"


def _use_threads(world: World) -> None:
    """Share a node's cores among its ranks, where neither user nor launcher has done so."""
    cores = len(os.sched_getaffinity(0))
    if "OMP_NUM_THREADS" not in os.environ:
        bound = cores < (os.cpu_count() or cores)
        torch.set_num_threads(cores if bound else max(1, cores // world.local_size))


def _nothing(*_: object, **__: object) -> None:
    """What ranks other than 0 say."""
