"""LAMB, layer-wise adaptive moments (You et al. 2020), as four programs compute it.

All of them go along u = m / (√v + ε) + λw, with the moments m and v of Adam and the decay λ, and
differ in how far each tensor w goes: w ← w − η·r·u with learning rate η and trust ratio r.

| variant     | m and v        | ε    | trust ratio r                                              |
|-------------|----------------|------|------------------------------------------------------------|
| `txl`       | as they are    | 1e-6 | min(‖w‖, 10) / (‖u‖ + ε)                                   |
| `apex`      | bias-corrected | 1e-6 | ‖w‖ / ‖u‖ where the tensor decays, else 1                  |
| `deepspeed` | bias-corrected | 1e-8 | ‖w‖ / ‖u‖, at least 0.01 and at most 10                    |
| `you2020`   | bias-corrected | 1e-6 | ‖w‖ / ‖u‖                                                  |

r is 1 where ‖w‖ or ‖u‖ is 0. Sources: `txl` is lamb.py of Transformer-XL in NVIDIA's
DeepLearningExamples; `apex` is FusedLAMB of NVIDIA apex, where `use_nvlamb` gives r = ‖w‖ / ‖u‖
to every tensor; `deepspeed` is FusedLamb of DeepSpeed; `you2020` is Algorithm 2 of the paper, φ
being the identity as in its experiments. Only apex's clips the gradient by itself; here engines
clip, as a gradient may be spread over ranks, and a variant sets the default of `clip_norm`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TrustRatio = Callable[[Tensor, Tensor, float], Tensor]
"""(‖w‖ [n], ‖u‖ [n], ε) → r [n], for norms that are not 0."""

_LARGEST_WEIGHT_NORM = 10.0  # lamb.py: weight_norm.clamp_(0, 10)
_SMALLEST_COEFFICIENT, _LARGEST_COEFFICIENT = 0.01, 10.0  # FusedLamb: min_coeff, max_coeff

_PIECE = 65536
"""Elements whose squares are added in float32 on a CPU. There torch's norm adds in sequence: over
ten million elements it is off by 3e-4, differently for a tensor and for its parts."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What tells one LAMB from another."""

    bias_correction: bool
    eps: float
    """Default of ε."""
    clip_norm: float
    """Default of the largest gradient norm."""
    trust_ratio: TrustRatio


VARIANTS = {
    "txl": Variant(
        bias_correction=False,
        eps=1e-6,
        clip_norm=math.inf,
        trust_ratio=lambda w, u, eps: w.clamp(max=_LARGEST_WEIGHT_NORM) / (u + eps),
    ),
    "apex": Variant(
        bias_correction=True, eps=1e-6, clip_norm=1.0, trust_ratio=lambda w, u, _eps: w / u
    ),
    "deepspeed": Variant(
        bias_correction=True,
        eps=1e-8,
        clip_norm=math.inf,
        trust_ratio=lambda w, u, _eps: (w / u).clamp(_SMALLEST_COEFFICIENT, _LARGEST_COEFFICIENT),
    ),
    "you2020": Variant(
        bias_correction=True, eps=1e-6, clip_norm=math.inf, trust_ratio=lambda w, u, _eps: w / u
    ),
}


class Lamb(torch.optim.Optimizer):
    """LAMB with one kernel launch for many tensors.

    State of a parameter, as in torch's AdamW: `step` (float32 scalar in host memory), `exp_avg` and
    `exp_avg_sq`. A step needs memory for one more copy of the parameters, for the updates.

    Args:
        params: float32 parameters, or groups of them.
        lr: learning rate η.
        variant: a row of the table above.
        betas: decay rates of the first and the second moment.
        eps: ε; None: the variant's own.
        weight_decay: λ.
        use_nvlamb: let `apex` apply its trust ratio to tensors without decay, too.
        norm_reducer: called once a step with a float64 [n, 2] tensor of the squared norms of
            weights and updates; has to add it up over ranks, in place. Needed where a parameter is
            one rank's part of a tensor (ZeRO 1 and 2). Then every rank needs the same groups in the
            same order, one parameter in each, and a gradient for each.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        variant: str,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        use_nvlamb: bool = False,
        norm_reducer: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.variant = variant
        self.norm_reducer = norm_reducer
        self._rules = VARIANTS[variant]
        self._only_decaying = variant == "apex" and not use_nvlamb
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": self._rules.eps if eps is None else eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes loss and gradients anew; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [
            (group, weights, self._updates(weights, group))
            for group, weights in self._weights_by_settings()
        ]
        if not batches:
            return loss
        squares = torch.cat(
            [
                torch.stack([_squared_norms(weights), _squared_norms(updates)], dim=1)
                for _, weights, updates in batches
            ]
        )
        if self.norm_reducer is not None:
            self.norm_reducer(squares)
        norms = squares.sqrt().split([len(weights) for _, weights, _ in batches])
        for (group, weights, updates), norm in zip(batches, norms, strict=True):
            if group["weight_decay"] or not self._only_decaying:
                ratios = self._trust_ratios(norm[:, 0], norm[:, 1], group["eps"])
                torch._foreach_mul_(updates, list(ratios.float().unbind()))
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
        return loss

    def _weights_by_settings(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Put together parameters of groups that agree, so that kernels get many at a time."""
        batches: dict[tuple[Any, ...], tuple[dict[str, Any], list[Tensor]]] = {}
        for group in self.param_groups:
            settings = tuple(group[key] for key in ("lr", "betas", "eps", "weight_decay"))
            _, weights = batches.setdefault(settings, (group, []))
            weights += [p for p in group["params"] if p.grad is not None]
            if self.norm_reducer is not None and any(p.grad is None for p in group["params"]):
                raise RuntimeError(
                    "a parameter has no gradient: ranks would add up norms of unlike tensors"
                )
        return [(group, weights) for group, weights in batches.values() if weights]

    def _updates(self, weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Move the moments of parameters with equal settings on, and return their u."""
        beta1, beta2 = group["betas"]
        gradients = [p.grad for p in weights if p.grad is not None]
        states = [self._state(p) for p in weights]
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

        # u = (m / c₁) / (√(v / c₂) + ε), in place of one temporary.
        updates = torch._foreach_sqrt(second)
        if self._rules.bias_correction:
            steps = [state["step"].item() for state in states]
            torch._foreach_div_(updates, [math.sqrt(1 - beta2**step) for step in steps])
            torch._foreach_add_(updates, group["eps"])
            torch._foreach_mul_(updates, [1 - beta1**step for step in steps])
        else:
            torch._foreach_add_(updates, group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, first)
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        return list(updates)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _trust_ratios(self, weight_norms: Tensor, update_norms: Tensor, eps: float) -> Tensor:
        ratios = self._rules.trust_ratio(weight_norms, update_norms, eps)
        return torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)


def _squared_norms(tensors: list[Tensor]) -> Tensor:
    """Return float64 [n]: the squared norm of each tensor, the same to 1e-6 for any partition."""
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors)).double().square()
    pieces = [torch._foreach_norm(tensor.reshape(-1).split(_PIECE)) for tensor in tensors]
    return torch.stack([torch.stack(norms).double().square().sum() for norms in pieces])
