"""An engine in which every rank holds the whole model, whatever sums the gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from hpc.config import OptimizerConfig, TrainConfig
from hpc.engines import LossSums, Moments, Update
from hpc.loss_scale import LossScale
from hpc.optimizers import build_optimizer, set_moments
from hpc.precision import HALF_PRECISIONS, computation, round_weights
from hpc.world import World


class Communication(Protocol):
    """How replicas sum gradients and agree on host numbers."""

    needs_warm_up: bool
    """Whether the first backward pass differs from all others, so that its sums would too."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return what to call in the place of `module`, so that its gradients are summed."""
        ...

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Return a context for forward and backward of a micro-batch; sums after the last one."""
        ...

    def finish(self) -> None:
        """Wait until every gradient is the sum over all ranks."""
        ...

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """See `Engine.sum_over_ranks`."""
        ...

    def from_rank_0(self, value: Any) -> Any:
        """See `Engine.from_rank_0`."""
        ...

    def close(self) -> None:
        """See `Engine.close`."""
        ...


class ReplicaEngine:
    """Plain data parallelism: master weights, loss scale, clipping and optimiser are all here.

    Args:
        model: float32, with the same initial weights on every rank; moved to `device`.
        loss_sums: `(model, batch)` → loss sums per objective.
        optimizer: its settings.
        train: precision and loss scale.
        communication: torch's or Horovod's.
        world: this rank and the others, already connected.
        device: where this rank computes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_sums: LossSums,
        *,
        optimizer: OptimizerConfig,
        train: TrainConfig,
        communication: Communication,
        world: World,
        device: torch.device,
    ) -> None:
        self.world = world
        self.device = device
        self._model = model.to(device)
        self._parameters = list(model.parameters())
        self._loss_sums = loss_sums
        self._precision = train.precision
        self._local = computation(self._model, train.precision)
        self._communication = communication
        self._wrapped = communication.wrap(self._local)
        self._optimizer, self.kernels = build_optimizer(self._model, optimizer)
        self._clip_norm = optimizer.clip_norm
        self._loss_scale: LossScale | None = None
        if train.precision in HALF_PRECISIONS:
            self._loss_scale = LossScale(
                train.loss_scale, train.loss_scale_window, train.min_loss_scale
            )
        round_weights(self._parameters, self._precision)

    def micro_step(self, batch: Any, denominators: Mapping[str, float], last: bool) -> torch.Tensor:
        """See `Engine.micro_step`."""
        if self._communication.needs_warm_up:
            self._communication.needs_warm_up = False
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices), self._communication.accumulating(True):
                self._loss(batch, denominators).backward()
            self._optimizer.zero_grad()
        scale = self._loss_scale.scale if self._loss_scale else 1.0
        with self._communication.accumulating(last):
            loss = self._loss(batch, denominators)
            (loss * scale).backward()
        return loss.detach()

    def step(self, lr: float) -> Update:
        """See `Engine.step`: sum, unscale, clip, update, in this order."""
        self._communication.finish()
        scale = self._loss_scale.scale if self._loss_scale else 1.0
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        applied = self._loss_scale is None or bool(norm.isfinite())
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            round_weights(self._parameters, self._precision)
        self._optimizer.zero_grad()
        if self._loss_scale:
            self._loss_scale.update(applied)
        return Update(norm, applied)

    def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """See `Engine.compute`."""
        self._model.eval()
        with torch.no_grad():
            result = self._local(function, *args)
        self._model.train()
        return result

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """See `Engine.sum_over_ranks`."""
        return self._communication.sum_over_ranks(values)

    def from_rank_0(self, value: Any) -> Any:
        """See `Engine.from_rank_0`."""
        return self._communication.from_rank_0(value)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.weights`; live tensors, not copies."""
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    def moments(self) -> Moments:
        """See `Engine.moments`; live tensors, not copies."""
        kinds: Moments = {}
        for name, parameter in self._model.named_parameters():
            for kind, tensor in self._optimizer.state.get(parameter, {}).items():
                if kind != "step":
                    kinds.setdefault(kind, {})[name] = tensor
        return kinds

    def load(self, weights: Mapping[str, torch.Tensor], moments: Moments, steps: int) -> None:
        """See `Engine.load`."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(weights[name])
        round_weights(self._parameters, self._precision)
        if steps:
            set_moments(self._optimizer, self._model.named_parameters(), moments, steps)

    def state_dict(self) -> dict[str, Any]:
        """See `Engine.state_dict`."""
        return {"loss_scale": self._loss_scale.state_dict()} if self._loss_scale else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        if self._loss_scale and "loss_scale" in state:
            self._loss_scale.load_state_dict(state["loss_scale"])

    def close(self) -> None:
        """See `Engine.close`."""
        self._communication.close()

    def _loss(self, batch: Any, denominators: Mapping[str, float]) -> torch.Tensor:
        sums = self._wrapped(self._loss_sums, batch)
        return torch.stack([sums[name] / denominators[name] for name in sums]).sum()


def fixed_groups(
    parameters: Iterable[nn.Parameter], bytes_per_group: int
) -> list[list[nn.Parameter]]:
    """Cut parameters into groups of about `bytes_per_group`, last ones first, as backward goes."""
    groups: list[list[nn.Parameter]] = []
    filled = bytes_per_group
    for parameter in reversed(list(parameters)):
        if filled >= bytes_per_group:
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += parameter.numel() * parameter.element_size()
    return groups
