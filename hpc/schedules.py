"""Learning rate as a function of the steps whose update was applied."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hpc.config import ScheduleConfig

Sum = Callable[[Sequence[float]], list[float]]
"""Adds up host numbers over all ranks; see `Engine.sum_over_ranks`."""

_MIN_DELTA = 1e-4
"""A loss counts as lower if it is by this much; default of Keras's ReduceLROnPlateau."""


def rate_at(done: int, config: ScheduleConfig, *, peak: float, steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        done: steps applied before this one.
        config: shape and warm-up, in steps. For a plateau, the rate before any cut.
        peak: rate at the end of warm-up.
        steps: of the whole schedule.
    """
    if done < config.warmup_steps:
        return peak * (done + 1) / config.warmup_steps
    if config.name in ("constant", "plateau"):
        return peak
    if config.name == "inverse-sqrt":  # Vaswani et al. 2017, section 5.3
        return peak * math.sqrt(max(1, config.warmup_steps) / (done + 1))
    share = min(1.0, (done - config.warmup_steps) / max(1, steps - config.warmup_steps))
    if config.name == "cosine":  # Loshchilov and Hutter 2017, eq. 5
        falling = 0.5 * (1.0 + math.cos(math.pi * share))
    else:
        falling = (1.0 - share) ** (config.power if config.name == "polynomial" else 1.0)
    return peak * (config.final_ratio + (1.0 - config.final_ratio) * falling)


def in_steps(config: ScheduleConfig, steps_per_epoch: float) -> ScheduleConfig:
    """Return the schedule with its warm-up in whole steps.

    Args:
        config: warm-up in steps or in epochs.
        steps_per_epoch: training records / global batch.
    """
    if not config.warmup_epochs:
        return config
    warmup_steps = math.ceil(config.warmup_epochs * steps_per_epoch)
    return dataclasses.replace(config, warmup_epochs=0.0, warmup_steps=warmup_steps)


class Schedule:
    """The learning rate of a phase, or of several if it goes on.

    Args:
        config: shape and warm-up, in steps.
        peak: rate at the end of warm-up.
        steps: of the whole schedule.
        start: updates applied before its first step.
        plateau: what the phase before has observed, if its schedule goes on.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        *,
        peak: float,
        steps: int,
        start: int,
        plateau: "Plateau | None" = None,
    ) -> None:
        self._config = config
        self._peak = peak
        self._steps = steps
        self.start = start
        self.plateau = plateau or Plateau()

    def rate(self, applied: int) -> float:
        """Return the rate of the step after `applied` updates of the whole run."""
        done = applied - self.start
        rate = rate_at(done, self._config, peak=self._peak, steps=self._steps)
        if self._config.name != "plateau" or self._warms_up(applied):
            return rate
        return max(self._config.min_lr, rate * self.plateau.scale)

    def after_step(self, applied: int, loss: torch.Tensor | float, sum_over_ranks: Sum) -> None:
        """Take in a training loss.

        Args:
            applied: updates before the step.
            loss: scalar, this rank's share of the global loss.
            sum_over_ranks: adds up host numbers of all ranks, which call this at the same steps.
        """
        config = self._config
        if config.name == "plateau" and config.watch == "training" and not self._warms_up(applied):
            self.plateau.add(loss, config, sum_over_ranks)

    def after_evaluation(self, applied: int, loss: float) -> None:
        """Take in a held-out loss after `applied` updates, the same on all ranks."""
        config = self._config
        if config.name == "plateau" and config.watch == "held-out" and not self._warms_up(applied):
            self.plateau.observe(loss, config)

    def state_dict(self, sum_over_ranks: Sum) -> dict[str, Any]:
        """Return the state of all ranks together, which all have to ask for."""
        state: dict[str, Any] = {"start": self.start}
        if self._config.name == "plateau":
            state["plateau"] = self.plateau.state_dict(sum_over_ranks)
        return state

    def load_state_dict(self, state: dict[str, Any], rank: int) -> None:
        """Go on from a saved state, on any number of ranks."""
        self.start = state["start"]
        if "plateau" in state:
            self.plateau.load_state_dict(state["plateau"], rank)

    def _warms_up(self, applied: int) -> bool:
        return applied - self.start < self._config.warmup_steps


class Plateau:
    """Cuts a rate when a loss stops falling, as Keras's ReduceLROnPlateau does.

    The training loss is added up in float64, where sums of float32 numbers of like size are exact,
    so that it does not matter where a run was stopped in between.
    """

    def __init__(self) -> None:
        self.scale = 1.0
        """Product of the cuts so far."""
        self._best: float | None = None
        self._waited = 0
        self._loss: torch.Tensor | float = 0.0
        self._steps = 0

    def add(self, loss: torch.Tensor | float, config: ScheduleConfig, sum_over_ranks: Sum) -> None:
        """Take in a step's share of the loss; every `window` steps, observe the mean."""
        self._loss = self._loss + (loss.double() if isinstance(loss, torch.Tensor) else loss)
        self._steps += 1
        if self._steps >= config.window:
            (total,) = sum_over_ranks([float(self._loss)])
            self.observe(total / self._steps, config)
            self._loss, self._steps = 0.0, 0

    def observe(self, loss: float, config: ScheduleConfig) -> None:
        """Cut the rate if this is the `patience`-th loss in a row that is not below the best."""
        if self._best is None or loss < self._best - _MIN_DELTA:
            self._best, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited >= config.patience:
            self._waited = 0
            self.scale *= config.factor

    def state_dict(self, sum_over_ranks: Sum) -> dict[str, Any]:
        """Return the state of all ranks together."""
        (loss,) = sum_over_ranks([float(self._loss)])
        return {
            "scale": self.scale,
            "best": self._best,
            "waited": self._waited,
            "loss": loss,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any], rank: int) -> None:
        """Go on from a saved state; rank 0 takes over what had been added up."""
        self.scale, self._best, self._waited = state["scale"], state["best"], state["waited"]
        self._loss, self._steps = (0.0 if rank else state["loss"]), state["steps"]
