"""Layer normalisation kernels: torch's own, or apex's where it is installed with its kernels."""

import torch
from torch import nn


def fuse_norms(model: nn.Module, device: torch.device) -> bool:
    """Put apex's FusedLayerNorm in the place of every `nn.LayerNorm`, if apex is here.

    Parameters stay the same tensors under the same names, so checkpoints do not change.

    Args:
        model: changed in place.
        device: where it will run; apex's kernels are for CUDA only.

    Returns:
        Whether apex's kernels are used.
    """
    if device.type != "cuda":
        return False
    try:
        from apex.normalization import FusedLayerNorm
    except ImportError:  # not there, or the `apex` of PyPI, which is another project
        return False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.LayerNorm:
                fused = FusedLayerNorm(child.normalized_shape, eps=child.eps)
                fused.weight, fused.bias = child.weight, child.bias
                setattr(module, name, fused)
    return True


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer normalisation, torch's or apex's."""
    return type(module).__name__ in ("LayerNorm", "FusedLayerNorm")
