"""Engines: who distributes a training step. Each is a small class with the methods below."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hpc.world import World

Moments = dict[str, dict[str, torch.Tensor]]
"""Optimiser state: kind of moment (`exp_avg`) → parameter name → float32 tensor."""

LossSums = Callable[[Any, Any], dict[str, torch.Tensor]]
"""`(model, batch)` → loss sum of each objective."""


@dataclass(frozen=True)
class Update:
    """What became of a step's gradient."""

    grad_norm: torch.Tensor
    """float32 scalar: norm of the global gradient before clipping."""
    applied: bool
    """False if a float16 gradient overflowed and the update was left out, on all ranks alike."""


class Engine(Protocol):
    """What the trainer asks of an engine.

    An engine only ever *sums* gradients over micro-batches and ranks; whatever divisors its
    library applies are undone inside it.
    """

    world: World
    device: torch.device
    kernels: str
    """What updates the weights, for the banner."""

    def micro_step(self, batch: Any, denominators: Mapping[str, float], last: bool) -> torch.Tensor:
        """Compute one micro-batch's share of the global step's loss and add up its gradients.

        Args:
            batch: a prepared batch on `device`.
            denominators: targets of each objective in the whole global step.
            last: this is the rank's last micro-batch of the step, after which gradients are summed
                over the ranks.

        Returns:
            float32 scalar on `device`, detached: this micro-batch's part of the global loss.
        """
        ...

    def step(self, lr: float) -> Update:
        """Clip, update the weights at learning rate `lr`, and clear the gradients.

        Raises:
            InputError: if the loss scale falls below its floor.
        """
        ...

    def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(model, *args)` in the run's precision, without gradients."""
        ...

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks of some host numbers, in float64."""
        ...

    def from_rank_0(self, value: Any) -> Any:
        """Return rank 0's value of a small Python object, on every rank."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the float32 parameters by name; all ranks must call it together."""
        ...

    def moments(self) -> Moments:
        """Return the optimiser's moments by parameter name; all ranks must call it together."""
        ...

    def load(self, weights: Mapping[str, torch.Tensor], moments: Moments, steps: int) -> None:
        """Take over weights, and moments after `steps` optimiser steps (0: there are none)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what else the engine remembers: the loss scale."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of any engine in the same precision."""
        ...

    def close(self) -> None:
        """End the connection between the ranks, when the run ended well."""
        ...
