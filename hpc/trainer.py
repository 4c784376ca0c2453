"""The training loop: load, while not done: step, log, maybe evaluate, maybe save."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hpc.checkpoint import Checkpoint, CheckpointWriter
from hpc.config import Recipe, as_dict
from hpc.engines import Engine
from hpc.flops import batch_flops, peak_flops
from hpc.lane_memory import load_lanes, save_lanes
from hpc.monitor import Monitor, peak_memory_gib
from hpc.phases import Inputs, Phase
from hpc.stopping import StopSignals
from hpc.streams import mix, streams_of_rank
from hpc.tasks import PreparedBatch, Task
from preprocessing.errors import InputError, OtherRankError

_DROPOUT_DRAW = 2  # tells dropout's seeds from other hashes of the run's seed


class TrainingDivergedError(InputError):
    """Loss or gradient is no number any more."""


@dataclass
class Interval:
    """What has been added up since the last log line."""

    loss: torch.Tensor | float = 0.0
    """This rank's shares of the global losses, summed over steps."""
    steps: int = 0
    tokens: float = 0.0
    slots: float = 0.0
    flops: float = 0.0
    """What the model computes on real tokens, on all ranks together."""
    waited: float = 0.0
    began: float = field(default_factory=time.monotonic)


class Trainer:
    """One rank's part of a run.

    Args:
        recipe: the run.
        engine: computes and distributes.
        task: what is learned.
        phases: parts of the run.
        open_inputs: gives what this rank reads during a phase.
        optimizer_steps: updates that the optimiser's moments have seen before step 0.
        monitor: rank 0's reporter.
        writer: rank 0's checkpoints.
        facts: what a checkpoint says of model and records besides the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        engine: Engine,
        task: Task,
        phases: Sequence[Phase],
        open_inputs: Callable[[Phase], Inputs],
        optimizer_steps: int,
        monitor: Monitor,
        writer: CheckpointWriter,
        facts: dict[str, Any],
    ) -> None:
        self._recipe = recipe
        self._engine = engine
        self._task = task
        self._phases = phases
        self._open_inputs = open_inputs
        self._monitor = monitor
        self._writer = writer
        self._facts = facts
        self._interval = Interval()
        self._peak = peak_flops(engine.device, recipe.train.precision, recipe.log.peak_tflops)
        self._saved_step: int | None = None
        self._evaluation_due = False
        self._grad_norm: torch.Tensor | float = 0.0
        self._applied = False
        self.step = 0
        self.optimizer_steps = optimizer_steps
        """Updates that the moments have seen; a float16 overflow leaves one out."""
        self.tokens = 0.0
        self._phase = phases[0]
        self._inputs = open_inputs(self._phase)
        self._schedule = self._phase.schedule_after(None, self.optimizer_steps)

    def run(self, signals: StopSignals) -> bool:
        """Train to the last step, or until a signal, the clock or `train.stop_at_step`; save.

        Returns:
            Whether the run should go on, after a signal or at the end of its time.

        Raises:
            InputError: if training diverges, a shard cannot be read or a checkpoint not written.
        """
        recipe = self._recipe
        last_step = recipe.train.stop_at_step or recipe.train.steps
        self._interval = Interval()
        stopping = False
        if self._evaluation_due:  # an earlier attempt was stopped in it, or just before it
            stopping = self._evaluate(signals)
            if self.step == last_step and not stopping:
                self._saved_step = None  # what is there says that the evaluation is due
                self._save()
        while self.step < last_step and not stopping:
            if self.step == self._phase.end_step:
                self._begin(self._phases[self._phase.number])
            stopping = self._train_step(signals)
            self._monitor.advance(self.step)
            if self.step % recipe.log.every_steps == 0 or self.step == last_step or stopping:
                self._log()
            if self._due(recipe.evaluation.every_steps) or self.step == recipe.train.steps:
                self._evaluation_due = True
                stopping = stopping or self._evaluate(signals)
            if stopping and self._interval.steps:
                self._log()
            if self._due(recipe.checkpoint.every_steps) or self.step == last_step or stopping:
                self._save()
        self._writer.wait()
        return stopping and (self.step < recipe.train.steps or self._evaluation_due)

    def state_dict(self) -> dict[str, Any]:
        """Return all mutable state but weights and moments; the cursors are those of all ranks."""
        streams, world = self._phase.train.streams, self._engine.world
        owned = streams_of_rank(streams, world.rank, world.size)
        own = self._inputs.loader.state_dict()["cursors"]
        width = len(own[0])
        cursors = [[0] * width] * streams
        cursors[owned.start : owned.stop] = own
        flat = self._engine.sum_over_ranks([float(n) for cursor in cursors for n in cursor])
        gathered = [[int(n) for n in flat[i : i + width]] for i in range(0, len(flat), width)]
        return {
            "step": self.step,
            "optimizer_steps": self.optimizer_steps,
            "tokens": int(self.tokens),
            "phase": {"number": self._phase.number, "first_step": self._phase.first_step},
            "schedule": self._schedule.state_dict(self._engine.sum_over_ranks),
            "streams": gathered,
            "engine": self._engine.state_dict(),
            "evaluation_due": self._evaluation_due,
            **self._facts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run of any number of ranks was."""
        self.step = self._saved_step = state["step"]
        self.optimizer_steps = state["optimizer_steps"]
        self._engine.load_state_dict(state["engine"])
        self.tokens = float(state["tokens"])
        self._evaluation_due = state.get("evaluation_due", False)
        world = self._engine.world
        if state["phase"]["number"] != self._phase.number:
            self._begin(self._phases[state["phase"]["number"] - 1])
        self._schedule.load_state_dict(state["schedule"], world.rank)
        owned = streams_of_rank(self._phase.train.streams, world.rank, world.size)
        cursors = state["streams"][owned.start : owned.stop]
        self._inputs.loader.load_state_dict({"cursors": cursors})

    def load_lanes(self, path: Path) -> None:
        """Take over from a checkpoint what the lanes remember; after `load_state_dict`.

        Raises:
            InputError: on all ranks, if one of them cannot read its part.
        """
        memory, world = self._task.memory, self._engine.world
        if memory is None or memory.mode == "reset":
            return
        error, found = None, True
        try:
            owned = streams_of_rank(self._phase.train.streams, world.rank, world.size)
            found = load_lanes(memory, self._engine, path, owned)
        except InputError as caught:
            error = caught
        (errors,) = self._engine.sum_over_ranks([float(error is not None)])
        if error is not None:
            raise error
        if errors:
            raise OtherRankError("another rank could not go on, and says why")
        if not found:
            self._monitor.say(f"{path} holds no memory of the lanes: it begins empty")

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._inputs.loader.close()

    def _begin(self, phase: Phase) -> None:
        """Go over to another phase: new streams and schedule; weights and moments stay."""
        self._inputs.loader.close()
        if self._task.memory:
            self._task.memory.clear()
        self._phase = phase
        self._inputs = self._open_inputs(phase)
        self._schedule = phase.schedule_after(self._schedule, self.optimizer_steps)
        self._monitor.say(
            f"phase {phase.number} of {len(self._phases)}: steps {phase.first_step + 1} to "
            f"{phase.end_step}, length {phase.data.length}, {phase.train.global_batch} sequences "
            f"a step, learning rate {phase.lr:.2e}"
        )

    def _train_step(self, signals: StopSignals) -> bool:
        """Do one optimiser step; return whether any rank was asked to stop."""
        engine, seed = self._engine, self._recipe.train.seed
        batches, denominators, stop = self._next_batches(signals)
        step_loss: torch.Tensor | float = 0.0
        for index, batch in enumerate(batches):
            # Dropout depends on step and stream, not on the rank or on what was drawn before.
            torch.manual_seed(int(mix(seed, _DROPOUT_DRAW, self.step, batch.stream)) >> 1)
            last = index == len(batches) - 1
            loss = engine.micro_step(batch.to(engine.device), denominators, last)
            step_loss = step_loss + loss
        self._interval.loss = self._interval.loss + step_loss
        self._rate = self._schedule.rate(self.optimizer_steps)
        update = engine.step(self._rate)
        if self._task.memory:
            self._task.memory.advance()
        self._grad_norm = update.grad_norm
        self._applied = update.applied
        if update.applied:
            self._schedule.after_step(self.optimizer_steps, step_loss, engine.sum_over_ranks)
            self.optimizer_steps += 1
        self._interval.steps += 1
        self.step += 1
        return stop

    def _next_batches(
        self, signals: StopSignals
    ) -> tuple[list[PreparedBatch], dict[str, float], bool]:
        """Load a step's micro-batches and agree with the other ranks on what concerns all."""
        began = time.monotonic()
        error: InputError | None = None
        batches: list[PreparedBatch] = []
        try:
            batches = self._inputs.loader.next_step()
        except InputError as caught:
            error = caught
        self._interval.waited += time.monotonic() - began
        objectives = self._task.objectives
        reason = signals.reason(self._writer.seconds)
        *counts, tokens, slots, flops, stops, errors = self._engine.sum_over_ranks(
            [
                *(float(sum(batch.counts[name] for batch in batches)) for name in objectives),
                float(sum(batch.real_tokens for batch in batches)),
                float(sum(batch.inputs.numel() for batch in batches)),
                sum(batch_flops(self._recipe.model, batch) for batch in batches),
                float(reason is not None),
                float(error is not None),
            ]
        )
        if error is not None:
            raise error
        if errors:
            raise OtherRankError("another rank could not go on, and says why")
        self.tokens += tokens
        self._interval.tokens += tokens
        self._interval.slots += slots
        self._interval.flops += flops
        if stops:
            self._say_ending(reason)
        denominators = {
            name: max(1.0, count) for name, count in zip(objectives, counts, strict=True)
        }
        return batches, denominators, stops > 0

    def _log(self) -> None:
        interval, self._interval = self._interval, Interval()
        size = self._engine.world.size
        loss, waited = self._engine.sum_over_ranks([float(interval.loss), interval.waited])
        norm = self._finite_grad_norm()
        seconds = time.monotonic() - interval.began
        flops_per_rank = interval.flops / size / seconds
        metrics = {
            "train/loss": loss / interval.steps,
            "train/lr": self._rate,
            "train/grad_norm": norm,
            "train/skipped_steps": self.step - self.optimizer_steps,
            "train/tokens": self.tokens,
            "train/tokens_per_second": interval.tokens / seconds,
            "train/padding": 1 - interval.tokens / interval.slots,
            "train/data_wait": waited / size / seconds,
            "train/memory_gib": peak_memory_gib(self._engine.device),
            "train/tflops": flops_per_rank / 1e12,
        }
        if self._peak is not None:
            metrics["train/mfu"] = flops_per_rank / self._peak
        self._monitor.training(self.step, metrics)

    def _evaluate(self, signals: StopSignals) -> bool:
        """Evaluate; return whether any rank was asked to stop, which leaves it for later."""
        held_out = self._inputs.held_out
        if held_out is None:
            self._evaluation_due = False
            return False
        began = time.monotonic()
        result = held_out.evaluate(
            self._engine, lambda: signals.reason(self._writer.seconds) is not None
        )
        if result is None:
            self._say_ending(signals.reason(self._writer.seconds))
            return True
        self._evaluation_due = False
        self._schedule.after_evaluation(self.optimizer_steps, result.loss)
        self._monitor.record(self.step, result.metrics())
        self._monitor.say(
            f"step {self.step}  held-out: loss {result.loss:.4f} (shuffled "
            f"{result.loss_shuffled:.4f}), learned {result.learned:.4f} ± {result.learned_se:.4f} "
            f"nats a residue, accuracy {result.accuracy:.1%}, {result.proteins} proteins"
        )
        self._interval.began += time.monotonic() - began  # tokens/s counts training only
        return False

    def _say_ending(self, reason: str | None) -> None:
        self._monitor.say(f"{reason or 'a rank was asked to end'}: saving and ending")

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        self._finite_grad_norm()
        lanes = {}
        if self._task.memory:
            streams = self._phase.train.streams
            lanes = save_lanes(self._task.memory, self._engine, streams, self._writer, self.step)
        state = self.state_dict()
        weights, moments = self._engine.weights(), self._engine.moments()
        if self._engine.world.rank == 0:
            self._writer.save(
                Checkpoint(
                    step=self.step,
                    weights=weights,
                    moments=moments,
                    state=state,
                    recipe=as_dict(self._recipe),
                    lanes=lanes,
                )
            )
        self._saved_step = self.step

    def _finite_grad_norm(self) -> float:
        """Return the last gradient norm; weights are finite as long as those applied are."""
        norm = float(self._grad_norm)
        if self._applied and not math.isfinite(norm):
            raise TrainingDivergedError(
                f"training diverged: the gradient norm is {norm} at step {self.step}; the last "
                "checkpoint is sound: lower optimizer.lr or raise schedule.warmup_steps, and run "
                "the same command again"
            )
        return norm

    def _due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.step % every_steps == 0
