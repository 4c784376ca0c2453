"""The parts of a run, each with its own lengths, batches and learning rate."""

import dataclasses
from dataclasses import dataclass

from hpc.config import DataConfig, Recipe, ScheduleConfig, TrainConfig
from hpc.data import StreamLoader
from hpc.evaluation import HeldOut
from hpc.schedules import Schedule, in_steps
from hpc.streams import StreamOrder, mix, streams_of_rank
from preprocessing.errors import InputError

_PHASE_DRAW = 3  # tells the seeds of phases from other hashes of the run's seed


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a run, with everything worked out."""

    number: int
    """Counted from 1."""
    data: DataConfig
    train: TrainConfig
    """With the seed of this phase: its streams start afresh, in an order of their own."""
    lr: float
    schedule: ScheduleConfig
    """Warm-up in steps."""
    schedule_steps: int
    """Steps of the schedule, which may go on over several phases."""
    reset_step: bool
    """The schedule begins anew."""
    first_step: int
    """Steps of the run before this phase."""
    end_step: int
    """Steps of the run when this phase is over."""

    def schedule_after(self, before: Schedule | None, applied: int) -> Schedule:
        """Return the schedule of this phase.

        Args:
            before: of the phase before.
            applied: updates of the whole run so far.
        """
        goes_on = before is not None and not self.reset_step
        return Schedule(
            self.schedule,
            peak=self.lr,
            steps=self.schedule_steps,
            start=before.start if before and goes_on else applied,
            plateau=before.plateau if before and goes_on else None,
        )


@dataclass(frozen=True)
class Inputs:
    """What one rank reads during a phase."""

    loader: StreamLoader
    """Its micro-batches."""
    held_out: HeldOut | None
    """Held-out proteins; None: no evaluation."""


def plan_phases(recipe: Recipe, *, records: int, ranks: int) -> list[Phase]:
    """Return the phases of a run, checked against records and ranks.

    Args:
        recipe: the run; without `[[phase]]` it has one phase, which is the whole run.
        records: training records.
        ranks: world size.

    Raises:
        InputError: if in any phase the ranks cannot share the streams evenly, records are too few
            for the streams, or warm-up is longer than the schedule.
    """
    phases: list[Phase] = []
    for number, config in enumerate(recipe.phases, 1):
        train, first_step = config.train, phases[-1].end_step if phases else 0
        if number > 1:
            seed = int(mix(train.seed, _PHASE_DRAW, number)) >> 1
            train = dataclasses.replace(train, seed=seed)
        phase = Phase(
            number=number,
            data=config.data,
            train=train,
            lr=config.optimizer.lr,
            schedule=in_steps(config.schedule, records / train.global_batch),
            schedule_steps=recipe.schedule_steps[number - 1],
            reset_step=config.reset_step,
            first_step=first_step,
            end_step=first_step + train.steps,
        )
        try:
            _check(phase, config.schedule, records, ranks)
        except InputError as error:
            raise InputError(f"phase {number}: {error}" if recipe.phase else str(error)) from error
        phases.append(phase)
    return phases


def _check(phase: Phase, schedule: ScheduleConfig, records: int, ranks: int) -> None:
    streams_of_rank(phase.train.streams, 0, ranks)
    StreamOrder(
        seed=phase.train.seed,
        stream=0,
        streams=phase.train.streams,
        records=records,
        block_records=phase.data.block_records,
        pool_blocks=phase.data.pool_blocks,
    )
    if phase.schedule.warmup_steps > phase.schedule_steps:
        raise InputError(
            f"schedule.warmup_epochs = {schedule.warmup_epochs} is {phase.schedule.warmup_steps} "
            f"steps of train.global_batch = {phase.train.global_batch}, more than the "
            f"{phase.schedule_steps} steps of the schedule: lower it, or train for longer"
        )
