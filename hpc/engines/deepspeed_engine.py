"""DeepSpeed: ZeRO stages 1, 2 and 3; stage 0 is replicas whose gradients DeepSpeed sums.

ZeRO (Rajbhandari et al. 2020) shares out over the ranks the optimiser's state (stage 1), the
gradients too (2), and the weights too (3). Loss scale and learning rate stay ours; reduction,
clipping and the partitioned update are DeepSpeed's.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hpc.config import OptimizerConfig, TrainConfig
from hpc.engines import LossSums, Moments, Update
from hpc.engines.torch_engine import TorchCommunication
from hpc.lamb import Lamb
from hpc.loss_scale import LossScale
from hpc.optimizers import build_optimizer
from hpc.precision import HALF_PRECISIONS, computation
from hpc.world import World
from preprocessing.errors import InputError

_NATIVE = {"bf16": "bf16", "fp16-master": "fp16"}
"""Precisions with low-precision weights, which ZeRO keeps by itself beside partitioned masters."""


_PARTITIONS = (
    "fp32_partitioned_groups_flat",  # stage 3
    "single_partition_of_fp32_groups",  # stages 1 and 2
    "fp32_groups_flat_partition",  # stage 1 in bf16 with float32 gradients
)


def import_deepspeed(device: torch.device) -> Any:
    """Return the module `deepspeed`, told which device it is for.

    Raises:
        InputError: if it is not installed or does not import.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read at import; it would look for a compiler else
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f"train.engine = 'deepspeed' needs DeepSpeed, which cannot be imported ({error}): "
            "install it with 'make deepspeed', or use train.engine=torch"
        ) from error
    return deepspeed


class DeepSpeedCommunication(TorchCommunication):
    """Stage 0: whole replicas, gradients summed by DeepSpeed's buckets after the backward pass."""

    def __init__(self, world: World, device: torch.device) -> None:
        super().__init__(world, device)
        self.needs_warm_up = False
        self._world = world
        self._deepspeed = import_deepspeed(device)
        _join(world, device)

    def wrap(self, module: nn.Module) -> nn.Module:
        """See `Communication.wrap`."""
        self._parameters = list(module.parameters())
        config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": None}
        self._engine, *_ = self._deepspeed.initialize(
            model=module, config=config, dist_init_required=False
        )
        return module

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """See `Communication.accumulating`."""
        return nullcontext()

    def finish(self) -> None:
        """See `Communication.finish`."""
        if self._world.size > 1:
            self._engine.allreduce_gradients()
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            torch._foreach_mul_(gradients, float(self._world.size))  # DeepSpeed averages


class DeepSpeedEngine:
    """ZeRO stages 1 to 3.

    Args:
        model: float32, with the same initial weights on every rank.
        loss_sums: `(model, batch)` → loss sums per objective.
        optimizer: its settings.
        train: stage, precision and loss scale.
        world: this rank and the others.
        device: where this rank computes.

    Raises:
        InputError: if DeepSpeed is missing, or cannot do what the recipe asks.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_sums: LossSums,
        *,
        optimizer: OptimizerConfig,
        train: TrainConfig,
        world: World,
        device: torch.device,
    ) -> None:
        deepspeed = import_deepspeed(device)
        _refuse(optimizer, train, deepspeed)
        self.world = world
        self.device = device
        self._communication = TorchCommunication(world, device)
        _join(world, device)
        self._model = model.to(device)
        self._named = list(model.named_parameters())
        initial = {name: parameter.detach().clone() for name, parameter in self._named}
        self._loss_sums = loss_sums
        native = _NATIVE.get(train.precision)
        module = computation(self._model, "fp32" if native else train.precision)
        basic, kernels = build_optimizer(self._model, optimizer, partitioned=True)
        self.kernels = f"{kernels}, ZeRO {train.zero_stage}"
        if isinstance(basic, Lamb):
            # A partition holds part of a tensor; trust ratios are of whole ones.
            basic.norm_reducer = dist.all_reduce
        self._decay = [group["weight_decay"] for group in basic.param_groups]
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=module,
            optimizer=basic,
            config=_configuration(train, optimizer, native),
            dist_init_required=False,
        )
        self._loss_scale: LossScale | None = None
        if train.precision in HALF_PRECISIONS:
            self._loss_scale = LossScale(
                train.loss_scale, train.loss_scale_window, train.min_loss_scale
            )
        self._stage = train.zero_stage
        self._kinds: list[str] = []
        self.load(initial, {}, 0)

    def micro_step(self, batch: Any, denominators: Mapping[str, float], last: bool) -> torch.Tensor:
        """See `Engine.micro_step`."""
        self._engine.set_gradient_accumulation_boundary(last)
        if self._loss_scale:
            self._zero.override_loss_scale(self._loss_scale.scale)
        sums = self._engine(self._loss_sums, batch)
        loss = torch.stack([sums[name] / denominators[name] for name in sums]).sum()
        # DeepSpeed averages gradients over the ranks; the rule wants their sum.
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)
        return loss.detach().float()

    def step(self, lr: float) -> Update:
        """See `Engine.step`."""
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
        overflow = bool(self._zero.overflow)
        if self._loss_scale:
            self._loss_scale.update(not overflow)
            return Update(norm, not overflow)
        return Update(norm, True)  # a norm that is no number then means divergence

    def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """See `Engine.compute`."""
        self._engine.eval()
        with torch.no_grad():
            result = self._engine(function, *args)
        self._engine.train()
        return result

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """See `Engine.sum_over_ranks`."""
        return self._communication.sum_over_ranks(values)

    def from_rank_0(self, value: Any) -> Any:
        """See `Engine.from_rank_0`."""
        return self._communication.from_rank_0(value)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.weights`: gathered from the partitions."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).cpu() for name, p in self._named}

    def moments(self) -> Moments:
        """See `Engine.moments`: gathered from the partitions."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return {
            kind: {name: safe_get_full_optimizer_state(p, kind).cpu() for name, p in self._named}
            for kind in self._moment_kinds()
        }

    def load(self, weights: Mapping[str, torch.Tensor], moments: Moments, steps: int) -> None:
        """See `Engine.load`: each rank takes its partitions."""
        self._create_optimizer_state()
        for name, parameter in self._named:
            self._set(parameter, weights[name], None)
            for kind in self._moment_kinds():
                value = moments[kind][name] if steps else torch.zeros_like(weights[name])
                self._set(parameter, value, kind)
        for state in self._zero.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(steps))
        self._copy_masters_to_weights()

    def state_dict(self) -> dict[str, Any]:
        """See `Engine.state_dict`."""
        return {"loss_scale": self._loss_scale.state_dict()} if self._loss_scale else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        if self._loss_scale and "loss_scale" in state:
            self._loss_scale.load_state_dict(state["loss_scale"])

    def close(self) -> None:
        """See `Engine.close`."""
        if self.world.size == 1:
            dist.destroy_process_group()
        self._communication.close()

    def _partitions(self) -> list[torch.Tensor]:
        """This rank's flat float32 masters, one per group of parameters."""
        for name in _PARTITIONS:
            if hasattr(self._zero, name):
                return getattr(self._zero, name)
        raise AssertionError(f"{type(self._zero).__name__} keeps its masters elsewhere")

    def _moment_kinds(self) -> list[str]:
        states = self._zero.optimizer.state
        return [
            kind
            for kind, value in next(iter(states.values())).items()
            if kind != "step" and torch.is_tensor(value)
        ]

    def _create_optimizer_state(self) -> None:
        """Do a step that changes nothing: before its first step the optimiser has no state."""
        if self._zero.optimizer.state:
            return
        groups = self._zero.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["weight_decay"] = 0.0
        partitions = self._partitions()
        gradients = [partition.grad for partition in partitions]
        for partition in partitions:
            partition.grad = torch.zeros_like(partition)
        if self._stage == 3:
            for number in range(len(partitions)):
                self._zero._optimizer_step(number)
        else:
            self._zero.optimizer.step()
            # DeepSpeed links moments to parameters after the first group's step, when the other
            # groups have none yet; here all have.
            self._zero._lazy_init_hp_params_optimizer_state()
        for partition, gradient in zip(partitions, gradients, strict=True):
            partition.grad = gradient
        for group, rate, decay in zip(groups, rates, self._decay, strict=True):
            group["lr"], group["weight_decay"] = rate, decay

    def _set(self, parameter: nn.Parameter, value: torch.Tensor, kind: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._stage < 3:
            if kind is None:
                safe_set_full_fp32_param(parameter, value.to(self.device))
            else:
                safe_set_full_optimizer_state(parameter, value.to(self.device), kind)
            return
        # safe_set_full_* of stage 3 fails where a partition is padded, so the cut is made here.
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]  # ZeRO 3 adds it
        flat = torch.zeros(size * self.world.size, dtype=torch.float32)
        flat[: value.numel()] = value.flatten()
        part = flat[size * self.world.rank : size * (self.world.rank + 1)].to(self.device)
        if kind is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    def _copy_masters_to_weights(self) -> None:
        """Make the weights that the model computes with those of the masters."""
        if self._stage < 3:
            with torch.no_grad():
                for name, weight in self.weights().items():
                    dict(self._named)[name].copy_(weight)
            return
        for number in range(len(self._partitions())):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)


def _refuse(optimizer: OptimizerConfig, train: TrainConfig, deepspeed: Any) -> None:
    """Refuse what DeepSpeed cannot do.

    Raises:
        InputError: with the reason and the alternatives.
    """
    if train.precision == "fp16":
        raise InputError(
            "DeepSpeed keeps float32 masters whenever weights are float16, so train.engine = "
            "'deepspeed' cannot do train.precision = 'fp16': use fp16-master, or another engine"
        )
    if (
        train.precision == "fp16-master"
        and not deepspeed.accelerator.get_accelerator().is_fp16_supported()
    ):
        raise InputError(
            "DeepSpeed finds no float16 arithmetic on this device, so train.precision = "
            "'fp16-master' cannot run on ZeRO here: use bf16, or train.engine=torch"
        )
    if optimizer.name == "lamb" and train.zero_stage == 3:
        raise InputError(
            "ZeRO 3 cuts every tensor into parts, and LAMB's trust ratios are of whole tensors: "
            "use train.zero_stage=2 or less, or optimizer.name=adamw"
        )


def _configuration(
    train: TrainConfig, optimizer: OptimizerConfig, native: str | None
) -> dict[str, Any]:
    """DeepSpeed's configuration for what the recipe asks."""
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    configuration: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if optimizer.clip_norm == float("inf") else optimizer.clip_norm,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
    }
    if native:
        configuration[native] = {"enabled": True}
        configuration["data_types"] = {"grad_accum_dtype": "fp32"}
    return configuration


def _join(world: World, device: torch.device) -> None:
    """Give DeepSpeed what it wants in any case: a process group, and the number of its device.

    It reads LOCAL_RANK, which srun and jsrun do not set, as a device's number: a rank that is bound
    to one GPU has number 0 only. Under Open MPI it insists on that launcher's own number.
    """
    own = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(device.index or 0))
    os.environ.setdefault("LOCAL_RANK", own)
    if world.size == 1 and not dist.is_initialized():
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
