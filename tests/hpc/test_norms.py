"""apex's norms come in where apex is, and change nothing but the kernel."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from hpc.norms import fuse_norms, is_norm
from models.bert import Bert, BertConfig

CUDA = torch.device("cuda")


class FusedLayerNorm(nn.LayerNorm):
    """A stand-in for apex's that records its calls and computes with torch."""

    calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        FusedLayerNorm.calls += 1
        return super().forward(inputs)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    package, normalization = ModuleType("apex"), ModuleType("apex.normalization")
    normalization.FusedLayerNorm = FusedLayerNorm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.normalization", normalization)
    monkeypatch.setattr(FusedLayerNorm, "calls", 0)


def tiny() -> Bert:
    torch.manual_seed(0)
    return Bert(BertConfig(hidden_size=8, layers=2, heads=2, intermediate_size=16, max_positions=8))


@pytest.mark.usefixtures("apex")
def test_every_norm_becomes_apexs_with_the_same_parameters() -> None:
    model, plain = tiny(), tiny()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert fuse_norms(model, CUDA)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    tokens = torch.arange(6)[None] + 5
    assert torch.equal(model(tokens), plain(tokens))
    assert FusedLayerNorm.calls == 2 + 2 * 2  # embeddings, head, and two a layer
    assert sum(is_norm(module) for module in model.modules()) == 6


@pytest.mark.usefixtures("apex")
def test_a_cpu_keeps_torchs() -> None:
    model = tiny()
    assert not fuse_norms(model, torch.device("cpu"))
    assert not any(isinstance(module, FusedLayerNorm) for module in model.modules())


def test_without_apex_or_with_another_apex_torchs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    assert not fuse_norms(tiny(), CUDA)
