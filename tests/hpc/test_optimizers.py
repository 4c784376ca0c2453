"""Which parameters decay, which kernel updates them, and what a recipe may ask for."""

import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hpc import optimizers
from hpc.config import OptimizerConfig
from hpc.lamb import VARIANTS, Lamb
from hpc.optimizers import build_optimizer, parameter_groups, set_moments
from models.bert import Bert, BertConfig


@pytest.fixture
def model() -> Bert:
    torch.manual_seed(0)
    return Bert(BertConfig(hidden_size=8, layers=1, heads=2, intermediate_size=16, max_positions=8))


def config(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 1e-2, **settings})


def test_biases_and_norms_do_not_decay_and_all_else_does(model: Bert) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, free = (
        {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1)
    )
    assert decaying | free == set(names.values())
    assert all("bias" in name or "norm" in name for name in free)
    assert not any("bias" in name or "norm" in name for name in decaying)


def test_partitioned_lamb_has_a_group_for_each_tensor(model: Bert) -> None:
    settings = config(name="lamb", variant="txl", weight_decay=0.1)
    whole, _ = build_optimizer(model, settings)
    parts, kernel = build_optimizer(model, settings, partitioned=True)
    assert kernel == "LAMB txl foreach"
    assert [g["params"] for g in parts.param_groups] == [[p] for p in model.parameters()]
    decay = {id(p): g["weight_decay"] for g in whole.param_groups for p in g["params"]}
    assert all(decay[id(g["params"][0])] == g["weight_decay"] for g in parts.param_groups)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recipe_reaches_the_optimizer(model: Bert, variant: Any) -> None:
    settings = config(name="lamb", variant=variant, beta1=0.8, beta2=0.9, eps=1e-3)
    lamb, kernel = build_optimizer(model, settings)
    assert kernel == f"LAMB {variant} foreach"
    assert isinstance(lamb, Lamb)
    assert lamb.variant == variant
    for group, decay in zip(lamb.param_groups, (0.01, 0.0), strict=True):
        assert group["betas"] == (0.8, 0.9)
        assert (group["lr"], group["eps"], group["weight_decay"]) == (1e-2, 1e-3, decay)
    adamw, kernel = build_optimizer(model, config(weight_decay=0.2))
    assert kernel == "torch AdamW fused"
    assert adamw.param_groups[0]["weight_decay"] == 0.2
    assert adamw.param_groups[0]["fused"]


def test_each_optimizer_has_its_own_epsilon_and_clip() -> None:
    assert (config().eps, config().clip_norm) == (1e-8, 1.0)
    found = {
        variant: (settings.eps, settings.clip_norm)
        for variant in VARIANTS
        for settings in [config(name="lamb", variant=variant)]
    }
    assert found == {
        "txl": (1e-6, math.inf),
        "apex": (1e-6, 1.0),
        "deepspeed": (1e-8, math.inf),
        "you2020": (1e-6, math.inf),
    }
    assert config(name="lamb", variant="txl", clip_norm=0.25, eps=1e-5).clip_norm == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lamb"}, r"needs a variant.*txl, apex, deepspeed, you2020"),
        ({"variant": "txl"}, r"variant = 'txl' does not apply to name = 'adamw'.*name = \"lamb\""),
        ({"use_nvlamb": False}, r"use_nvlamb = False does not apply to name = 'adamw'"),
        (
            {"name": "lamb", "variant": "txl", "use_nvlamb": True},
            r"use_nvlamb = True does not apply to variant = 'txl'.*variant = \"apex\"",
        ),
        (
            {"name": "lamb", "variant": "apex", "weight_decay": 0.0},
            r"no trust ratio anywhere.*use_nvlamb = true, or choose variant = \"txl\"",
        ),
        ({"weight_decay": -0.1}, r"weight_decay = -0.1 is negative"),
        ({"eps": 0.0}, r"eps = 0.0 must be greater than 0"),
    ],
)
def test_what_would_be_ignored_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_moments_go_on_by_name_bit_for_bit(model: Bert, variant: Any) -> None:
    settings = config(name="lamb", variant=variant) if variant else config()
    optimizer, _ = build_optimizer(model, settings)
    train(model, optimizer, range(3))
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    moments = {k: {n: s[k] for n, s in state.items()} for k in ("exp_avg", "exp_avg_sq")}
    other = Bert(model.config)
    other.load_state_dict(model.state_dict())
    restored, _ = build_optimizer(other, settings)
    set_moments(restored, other.named_parameters(), moments, 3)
    train(model, optimizer, range(3, 5))
    train(other, restored, range(3, 5))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


class RecordedLamb(torch.optim.Optimizer):
    """Stands in for apex.optimizers.FusedLAMB: takes the same arguments, and records them."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        self.call = {"lr": lr, "betas": betas, "eps": eps, "max_grad_norm": max_grad_norm}
        self.call |= {"use_nvlamb": use_nvlamb, "bias_correction": bias_correction}
        self.call |= {"adam_w_mode": adam_w_mode, "grad_averaging": grad_averaging}
        defaults = {"lr": lr, "bias_correction": bias_correction, "weight_decay": weight_decay}
        super().__init__(params, defaults)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a stand-in for apex, and the device where it would run, in place."""

    def install(*, kernels: bool = True, device: str = "cuda", other_project: bool = False) -> None:
        package = types.ModuleType("apex")
        monkeypatch.setitem(sys.modules, "apex", package)
        if not other_project:
            fused = types.ModuleType("apex.optimizers")
            fused.FusedLAMB = RecordedLamb  # type: ignore[attr-defined]
            applier = types.ModuleType("apex.multi_tensor_apply")
            applier.multi_tensor_applier = types.SimpleNamespace(  # type: ignore[attr-defined]
                available=kernels
            )
            monkeypatch.setitem(sys.modules, "apex.optimizers", fused)
            monkeypatch.setitem(sys.modules, "apex.multi_tensor_apply", applier)
        monkeypatch.setattr(optimizers, "_device_type", lambda _: device)

    return install


def test_apex_runs_its_own_variant_on_a_gpu(model: Bert, apex: Callable[..., None]) -> None:
    apex()
    settings = config(name="lamb", variant="apex", beta2=0.98, use_nvlamb=True, weight_decay=0.1)
    optimizer, kernel = build_optimizer(model, settings)
    assert kernel == "apex FusedLAMB"
    assert isinstance(optimizer, RecordedLamb)
    assert optimizer.call == {
        "lr": 1e-2,
        "betas": (0.9, 0.98),
        "eps": 1e-6,
        "max_grad_norm": math.inf,
        "use_nvlamb": True,
        "bias_correction": True,
        "adam_w_mode": True,
        "grad_averaging": True,
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    moments = {
        kind: {name: torch.ones_like(p) for name, p in model.named_parameters()}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    set_moments(optimizer, model.named_parameters(), moments, 7)
    assert [group["step"] for group in optimizer.param_groups] == [7, 7]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("installed", "settings", "partitioned"),
    [
        ({}, {"variant": "you2020"}, False),
        ({}, {"variant": "apex"}, True),
        ({"device": "cpu"}, {"variant": "apex"}, False),
        ({"kernels": False}, {"variant": "apex"}, False),
        ({"other_project": True}, {"variant": "apex"}, False),
    ],
)
def test_without_apex_or_where_it_does_not_fit_ours_runs(
    model: Bert,
    apex: Callable[..., None],
    installed: dict[str, Any],
    settings: dict[str, Any],
    partitioned: bool,
) -> None:
    apex(**installed)
    optimizer, kernel = build_optimizer(
        model, config(name="lamb", **settings), partitioned=partitioned
    )
    assert isinstance(optimizer, Lamb)
    assert kernel == f"LAMB {settings['variant']} foreach"
