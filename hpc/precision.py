"""Number formats of a training step, applied to a model from outside.

The model's parameters stay float32: they are the master weights, and gradients arrive, accumulate
and are reduced in float32 whatever computes (Micikevicius et al. 2018, section 3.1).

| precision     | computes in                  | weights                             | loss scale |
|---------------|------------------------------|-------------------------------------|------------|
| `fp32`        | float32                      | float32                             |            |
| `amp-bf16`    | bfloat16 where autocast says | float32                             |            |
| `amp-fp16`    | float16 where autocast says  | float32                             | dynamic    |
| `bf16`        | bfloat16                     | bfloat16 copy of a float32 master   |            |
| `fp16-master` | float16, norms in float32    | float16 copy of a float32 master    | dynamic    |
| `fp16`        | float16, norms in float32    | rounded to float16 after an update  | dynamic    |

`fp32`, `amp-fp16`, `fp16-master` and `fp16` are apex's O0, O1, O2 and O3; ProtTrans' "almost FP16"
is O2. `fp16` is there to compare with: without a master, small updates are rounded away.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hpc.norms import is_norm

HALF_PRECISIONS = ("fp16", "amp-fp16", "fp16-master")
"""Precisions whose gradients underflow without a loss scale."""

_COPIES = {"bf16": torch.bfloat16, "fp16-master": torch.float16, "fp16": torch.float16}
_AUTOCASTS = {"amp-bf16": torch.bfloat16, "amp-fp16": torch.float16}


def computation(model: nn.Module, precision: str) -> nn.Module:
    """Return a module that runs functions of `model` in a precision: `module(function, *args)`.

    Args:
        model: float32 parameters.
        precision: a row of the table above.
    """
    call: nn.Module = _Call(model)
    if precision in _AUTOCASTS:
        return _Autocast(call, _AUTOCASTS[precision])
    if precision in _COPIES:
        return _CastWeights(call, _COPIES[precision])
    return call


def round_weights(parameters: list[nn.Parameter], precision: str) -> None:
    """After an update in `fp16`, forget what float16 cannot hold; nothing in other precisions."""
    if precision == "fp16":
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(parameter.half())


class _Call(nn.Module):
    """Runs functions of a model inside a forward, where engines look."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


class _Autocast(nn.Module):
    """Lets torch choose the format operation by operation."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self._dtype = dtype

    def forward(self, *args: Any) -> Any:
        device = next(self.inner.parameters()).device.type
        with torch.autocast(device, self._dtype):
            return self.inner(*args)


class _CastWeights(nn.Module):
    """Computes with a low-precision copy of the weights, made anew at each call.

    The cast is part of the graph, so its backward gives the float32 masters float32 gradients.
    """

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self._dtype = dtype
        self._kept: set[str] = set()
        if dtype == torch.float16:
            # float16 overflows in a sum of squares; bfloat16 has float32's range.
            for name, module in inner.named_modules():
                if is_norm(module):
                    self._kept |= {f"{name}.{part}" for part, _ in module.named_parameters()}
                    module.register_forward_pre_hook(_input_to_float)
                    module.register_forward_hook(self._output_to_half)

    def forward(self, *args: Any) -> Any:
        weights = {
            name: parameter if name in self._kept else parameter.to(self._dtype)
            for name, parameter in self.inner.named_parameters()
        }
        return functional_call(self.inner, weights, args)

    def _output_to_half(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.to(self._dtype)


def _input_to_float(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.float() for tensor in inputs)
