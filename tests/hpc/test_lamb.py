"""Each LAMB is the one it is named after, whole or in parts."""

import copy
import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpc.config import OptimizerConfig
from hpc.lamb import VARIANTS, Lamb

Array = np.ndarray
STEPS = 6
LR, BETA1, BETA2 = 0.02, 0.9, 0.98


def tensors() -> list[Array]:
    """Weights for which the rules matter: long, short, zero, and norms at either clamp."""
    draw = np.random.default_rng(0)
    return [
        draw.normal(0, 0.1, (7, 5)),
        draw.normal(1, 0.1, 5),
        draw.normal(0, 1, (20, 20)),  # norm 20: over the 10 of txl
        draw.normal(0, 100, (4, 4)),  # ratio far over the 10 of deepspeed
        draw.normal(0, 1e-4, (3, 3)),  # ratio far below its 0.01
        draw.normal(1, 0.1, 6),  # updates as small as ε
        draw.normal(1, 0.1, 3),  # gradient 0: no update
        np.zeros((2, 3)),  # neither weight nor update
        np.zeros(4),
    ]


def gradients(step: int) -> list[Array]:
    """Those of a step: small, large, growing and shrinking, or 0."""
    draw = np.random.default_rng(100 + step)
    scales = (1.0, 0.1, 10.0 ** (step % 3), 1.0, 1e-3, 1e-11, 0.0, 0.0, 0.5)
    return [draw.normal(0, s, w.shape) for s, w in zip(scales, tensors(), strict=True)]


def decays(weight_decay: float) -> list[float]:
    return [weight_decay * (w.ndim > 1) for w in tensors()]


class Adam:
    """The moments of one tensor (Kingma and Ba 2015), which all variants have."""

    def __init__(self, like: Array) -> None:
        self.m, self.v, self.t = np.zeros_like(like), np.zeros_like(like), 0

    def update(self, g: Array) -> None:
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * g
        self.v = BETA2 * self.v + (1 - BETA2) * g * g


def norm(x: Array) -> float:
    return math.sqrt(float((x * x).sum()))


def corrected(adam: Adam, eps: float) -> Array:
    m_hat = adam.m / (1 - BETA1**adam.t)
    v_hat = adam.v / (1 - BETA2**adam.t)
    return m_hat / (np.sqrt(v_hat) + eps)


def txl(w: Array, adam: Adam, decay: float) -> Array:
    """NVIDIA DeepLearningExamples, Transformer-XL/pytorch/lamb.py."""
    u = adam.m / (np.sqrt(adam.v) + 1e-6) + decay * w
    weight_norm = min(max(norm(w), 0.0), 10.0)
    zero = weight_norm == 0 or norm(u) == 0
    return w - LR * (1.0 if zero else weight_norm / (norm(u) + 1e-6)) * u


def apex(w: Array, adam: Adam, decay: float) -> Array:
    """NVIDIA apex, csrc/multi_tensor_lamb.cu with use_nvlamb off."""
    u = corrected(adam, 1e-6) + decay * w
    adaptive = decay != 0 and norm(w) != 0 and norm(u) != 0
    return w - LR * (norm(w) / norm(u) if adaptive else 1.0) * u


def nvlamb(w: Array, adam: Adam, decay: float) -> Array:
    """The same with use_nvlamb on."""
    u = corrected(adam, 1e-6) + decay * w
    adaptive = norm(w) != 0 and norm(u) != 0
    return w - LR * (norm(w) / norm(u) if adaptive else 1.0) * u


def deepspeed(w: Array, adam: Adam, decay: float) -> Array:
    """DeepSpeed, csrc/lamb/fused_lamb_cuda_kernel.cu with FusedLamb's defaults."""
    u = corrected(adam, 1e-8) + decay * w
    coefficient = 1.0
    if norm(w) != 0 and norm(u) != 0:
        coefficient = max(min(norm(w) / norm(u), 10.0), 0.01)
    return w - LR * coefficient * u


def you2020(w: Array, adam: Adam, decay: float) -> Array:
    """You et al. 2020, Algorithm 2, φ(z) = z; 0/0 is left open there and taken as 1."""
    r = corrected(adam, 1e-6)
    direction = r + decay * w
    if norm(w) == 0 or norm(direction) == 0:
        return w - LR * direction
    return w - LR * norm(w) / norm(direction) * direction


PUBLISHED = {"txl": txl, "apex": apex, "deepspeed": deepspeed, "you2020": you2020}
CASES = [*((v, False, f) for v, f in PUBLISHED.items()), ("apex", True, nvlamb)]


def published(
    rule: Callable[[Array, Adam, float], Array], weight_decay: float, clip: float = math.inf
) -> list[Array]:
    """The weights after STEPS steps, in float64."""
    weights = tensors()
    adams = [Adam(w) for w in weights]
    for step in range(STEPS):
        grads = gradients(step)
        total = math.sqrt(sum(norm(g) ** 2 for g in grads))
        scale = total / clip if total > clip else 1.0  # multi_tensor_lamb.cu
        for i, (g, decay) in enumerate(zip(grads, decays(weight_decay), strict=True)):
            adams[i].update(g / scale)
            weights[i] = rule(weights[i], adams[i], decay)
    return weights


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(w, dtype=torch.float32)) for w in tensors()]


def groups(params: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def lamb(groups: object, variant: str, **options: object) -> Lamb:
    return Lamb(groups, LR, variant=variant, betas=(BETA1, BETA2), **options)  # type: ignore[arg-type]


def advance(
    optimizer: Lamb, params: list[nn.Parameter], steps: range, clip: float = math.inf
) -> None:
    for step in steps:
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = torch.tensor(g, dtype=torch.float32)
        nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("variant", "use_nvlamb", "rule"), CASES)
def test_each_variant_follows_its_published_definition(
    variant: str, use_nvlamb: bool, rule: Callable[..., Array], weight_decay: float
) -> None:
    params = parameters()
    optimizer = lamb(groups(params, weight_decay), variant, use_nvlamb=use_nvlamb)
    advance(optimizer, params, range(STEPS))
    for p, expected, before in zip(params, published(rule, weight_decay), tensors(), strict=True):
        moved = np.abs(expected - before).max(initial=0)
        np.testing.assert_allclose(
            p.detach().numpy(), expected, rtol=1e-6, atol=max(1e-5 * moved, 1e-12)
        )


def test_apex_with_the_default_clip_follows_its_definition() -> None:
    config = OptimizerConfig(name="lamb", variant="apex", lr=LR)
    assert config.clip_norm == 1.0
    params = parameters()
    advance(lamb(groups(params, 0.1), "apex"), params, range(STEPS), clip=config.clip_norm)
    for p, expected in zip(params, published(apex, 0.1, clip=1.0), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=2e-5, atol=1e-9)


def test_no_two_variants_are_the_same() -> None:
    ends = {variant: published(rule, 0.1) for variant, rule in PUBLISHED.items()}
    ends["nvlamb"] = published(nvlamb, 0.1)
    ends.pop("you2020")  # nvlamb, computed by another formula
    np.testing.assert_allclose(ends["nvlamb"][2], published(you2020, 0.1)[2])
    for one in ends:
        for other in ends:
            differ = [
                not np.allclose(a, b, rtol=1e-3)
                for a, b in zip(ends[one], ends[other], strict=True)
            ]
            assert any(differ) == (one != other), (one, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_many_tensors_at_a_time_move_as_each_alone(variant: str) -> None:
    together, alone = parameters(), parameters()
    advance(lamb(groups(together, 0.1), variant), together, range(STEPS))
    optimizers = [
        lamb([p], variant, weight_decay=decay) for p, decay in zip(alone, decays(0.1), strict=True)
    ]
    for step in range(STEPS):
        for p, g, optimizer in zip(alone, gradients(step), optimizers, strict=True):
            p.grad = torch.tensor(g, dtype=torch.float32)
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


class Ranks:
    """Threads that stand for ranks, and the all-reduce between them."""

    def __init__(self, size: int) -> None:
        self._shares: list[Tensor | None] = [None] * size
        self._barrier = threading.Barrier(size)
        self.shapes: list[torch.Size] = []
        """Of the reductions that rank 0 took part in."""

    def reducer(self, rank: int) -> Callable[[Tensor], None]:
        def reduce(values: Tensor) -> None:
            if rank == 0:
                self.shapes.append(values.shape)
            self._shares[rank] = values.clone()
            self._barrier.wait(timeout=30)
            values.copy_(sum(self._shares))  # type: ignore[arg-type]
            self._barrier.wait(timeout=30)

        return reduce


def parts_of(tensor: Tensor, size: int) -> list[Tensor]:
    """Flat equal parts, the last ones filled up with zeros, as ZeRO makes them."""
    flat = tensor.detach().reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % size)])
    return [part.clone() for part in padded.chunk(size)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_tensors_on_ranks_move_as_whole_ones(variant: str, size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    large = torch.randn(300_001, generator=generator)
    start = [*(p.detach() for p in parameters()), large]
    grads = [
        [
            *(torch.tensor(g, dtype=torch.float32) for g in gradients(step)),
            torch.randn(300_001, generator=generator),
        ]
        for step in range(STEPS)
    ]
    decay_of = [*decays(0.1), 0.1]

    whole = [nn.Parameter(t.clone()) for t in start]
    optimizer = lamb(
        [{"params": [p], "weight_decay": d} for p, d in zip(whole, decay_of, strict=True)], variant
    )
    for step in range(STEPS):
        for p, g in zip(whole, grads[step], strict=True):
            p.grad = g.clone()
        optimizer.step()

    ranks = Ranks(size)
    results: list[list[nn.Parameter]] = [[] for _ in range(size)]

    def run(rank: int) -> None:
        mine = [nn.Parameter(parts_of(t, size)[rank]) for t in start]
        optimizer = lamb(
            [{"params": [p], "weight_decay": d} for p, d in zip(mine, decay_of, strict=True)],
            variant,
            norm_reducer=ranks.reducer(rank),
        )
        for step in range(STEPS):
            for p, g in zip(mine, grads[step], strict=True):
                p.grad = parts_of(g, size)[rank]
            optimizer.step()
        results[rank] = mine

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ranks.shapes == [torch.Size([len(start), 2])] * STEPS, "one collective a step"
    for i, expected in enumerate(whole):
        joined = torch.cat([results[rank][i].detach() for rank in range(size)])
        joined = joined[: expected.numel()].view_as(expected)
        error = (joined - expected.detach()).abs().max()
        assert error <= 2e-7 * expected.detach().abs().max()


def test_norms_of_large_tensors_are_exact() -> None:
    """Added up in sequence in float32 they are wrong by 1e-4, and otherwise in each part."""
    weight = torch.randn(4_000_000, generator=torch.Generator().manual_seed(1))
    weight[0] = 0.0
    param = nn.Parameter(weight.clone())
    param.grad = torch.ones_like(param)
    lamb([param], "you2020").step()
    ratio = float(weight.double().norm()) / math.sqrt(param.numel())
    assert float(param.detach()[0]) == pytest.approx(-LR * ratio, rel=2e-6)  # u is 1 everywhere


def test_ranks_refuse_to_add_up_norms_of_unlike_tensors() -> None:
    params = parameters()
    optimizer = lamb(params, "txl", norm_reducer=lambda _: None)
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match="no gradient"):
        optimizer.step()


def test_parameters_without_gradient_stay() -> None:
    params = parameters()
    optimizer = lamb(params, "txl")
    optimizer.step()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not torch.equal(params[0], parameters()[0])
    assert all(torch.equal(p, q) for p, q in zip(params[1:], parameters()[1:], strict=True))
    assert list(optimizer.state) == [params[0]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_state_goes_on_bit_for_bit(variant: str) -> None:
    params = parameters()
    optimizer = lamb(groups(params, 0.1), variant)
    advance(optimizer, params, range(3))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    restored = lamb(groups(others, 0.1), variant)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(optimizer, params, range(3, STEPS))
    advance(restored, others, range(3, STEPS))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_the_state_has_the_names_of_adamw() -> None:
    described = []
    for build in (torch.optim.AdamW, lambda params: lamb(params, "txl")):
        (param,) = params = parameters()[:1]
        optimizer = build(params)
        param.grad = torch.ones_like(param)
        optimizer.step()
        state = optimizer.state[param]
        described.append({(k, v.shape, v.dtype, v.device) for k, v in state.items()})
    assert described[0] == described[1]


def test_a_closure_computes_the_loss() -> None:
    (param,) = params = [nn.Parameter(torch.ones(2, 2))]
    optimizer = lamb(params, "txl")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 4.0
    assert float(closure()) < 4.0
