"""Optimisers, which parameters decay, and which kernel updates them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hpc.config import OptimizerConfig
from hpc.lamb import Lamb


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, partitioned: bool = False
) -> tuple[torch.optim.Optimizer, str]:
    """Return the optimiser over `model`, and what runs it, for the banner.

    It does not clip: the engine does, with `config.clip_norm`.

    Args:
        model: float32 parameters, on the device where they are trained.
        config: kind, rates, decays and epsilon.
        partitioned: ranks will hold parts of the parameters (ZeRO 1 and 2). LAMB then gets a group
            for each tensor, and its `norm_reducer` has to be set.
    """
    if config.name == "adamw":
        adamw = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        return adamw, "torch AdamW fused"
    groups = parameter_groups(model, config.weight_decay, each_tensor=partitioned)
    fused = None
    if config.variant == "apex" and not partitioned and _device_type(model) == "cuda":
        fused = _apex_lamb()
    if fused is not None:
        optimizer = fused(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            max_grad_norm=math.inf,  # the engine has clipped
            use_nvlamb=config.use_nvlamb,
        )
        return optimizer, "apex FusedLAMB"
    lamb = Lamb(
        groups,
        config.lr,
        variant=config.variant,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        use_nvlamb=config.variant == "apex" and config.use_nvlamb,
    )
    return lamb, f"LAMB {config.variant} foreach"


def parameter_groups(
    model: nn.Module, weight_decay: float, *, each_tensor: bool = False
) -> list[dict[str, Any]]:
    """Return two groups: matrices and embeddings decay; biases and layer norms do not.

    Decay would pull a norm's scale, which starts at 1, and biases towards 0 (BERT's published
    optimiser excludes "LayerNorm", "layer_norm" and "bias"); these are the one-dimensional ones.

    Args:
        model: whose parameters are meant.
        weight_decay: of the first group.
        each_tensor: make a group of each parameter instead, in the order of `model.parameters()`.
    """
    parameters = list(model.parameters())
    if each_tensor:
        return [{"params": [p], "weight_decay": weight_decay * (p.ndim > 1)} for p in parameters]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def set_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[tuple[str, nn.Parameter]],
    moments: Mapping[str, Mapping[str, torch.Tensor]],
    steps: int,
) -> None:
    """Give an optimiser made by `build_optimizer` the moments that it had after some steps.

    Args:
        optimizer: state that it has is replaced.
        parameters: its parameters, with names.
        moments: kind of moment → name → tensor of the parameter's shape; copied.
        steps: updates that the moments have seen, which bias correction counts.
    """
    fused = bool(optimizer.defaults.get("fused"))
    counts_by_group = "bias_correction" in optimizer.defaults  # apex
    for name, parameter in parameters:
        state = {
            kind: tensors[name].to(parameter.device, copy=True) for kind, tensors in moments.items()
        }
        if not counts_by_group:
            # Where each kernel reads it: torch's fused one on the device, ours in host memory.
            device = parameter.device if fused else "cpu"
            state["step"] = torch.tensor(float(steps), device=device)
        optimizer.state[parameter] = state
    if counts_by_group:
        for group in optimizer.param_groups:
            group["step"] = steps


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _apex_lamb() -> Any | None:
    """NVIDIA apex's LAMB, if apex is here and was built with its CUDA kernels.

    FusedMixedPrecisionLamb would keep the float32 masters of float16 parameters; our parameters are
    the masters. The `apex` on PyPI is another project, without `apex.optimizers`.
    """
    try:
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedLAMB
    except ImportError:
        return None
    return FusedLAMB if multi_tensor_applier.available else None
